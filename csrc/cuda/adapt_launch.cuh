// Chooses the kernel for a width and a way, and launches it.
#pragma once

#include "adapt_items.cuh"
#include "adapt_users.cuh"

namespace metarec_fast::cuda {
namespace {

// Calls body with the kernel. Only the forms of which speed is asked have one for narrow rows, in
// shared memory, too.
template <typename scalar_t, typename table_t, typename Body>
auto with_kernel(const AdaptWork<scalar_t, table_t>& work, const Body& body) {
  if constexpr (sizeof(scalar_t) == sizeof(float))
    if (work.problem.shape.dim <= kWidestChunk && work.launch.workspace == nullptr) {
      if (work.launch.way == Way::kPlain)
        return body(adapt_users_kernel<scalar_t, table_t, 1, Way::kPlain>);
      if (work.launch.way == Way::kGram)
        return body(adapt_users_kernel<scalar_t, table_t, 1, Way::kGram>);
    }
  switch (work.launch.way) {
    case Way::kPlain:
    case Way::kDirect:
      return body(adapt_users_kernel<scalar_t, table_t, kMostChunks, Way::kDirect>);
    case Way::kGram:
      return body(adapt_users_kernel<scalar_t, table_t, kMostChunks, Way::kGram>);
    case Way::kExact:
      return body(adapt_users_kernel<scalar_t, table_t, kMostChunks, Way::kExact>);
    default:
      return body(adapt_items_kernel<scalar_t, table_t, kMostChunks>);
  }
}

}  // namespace

template <typename scalar_t, typename table_t>
int64_t resident_adapt_blocks(const AdaptWork<scalar_t, table_t>& work, size_t shared_bytes) {
  const int threads = work.launch.warps * work.launch.teams_per_block * kWarpSize;
  return with_kernel(work,
                     [&](auto* kernel) { return resident_blocks(kernel, threads, shared_bytes); });
}

template <typename scalar_t, typename table_t>
const char* launch_adapt(const AdaptWork<scalar_t, table_t>& work, int64_t blocks,
                         size_t shared_bytes, cudaStream_t stream) {
  const int threads = work.launch.warps * work.launch.teams_per_block * kWarpSize;
  return with_kernel(work, [&](auto* kernel) {
    return launch(work.launch.way == Way::kItemsToo ? "adapt_items" : "adapt_users", kernel,
                  dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream, work);
  });
}

#define METAREC_ADAPT(scalar_t, table_t)                                                         \
  template int64_t resident_adapt_blocks<scalar_t, table_t>(                                     \
      const AdaptWork<scalar_t, table_t>& work, size_t shared_bytes);                            \
  template const char* launch_adapt<scalar_t, table_t>(const AdaptWork<scalar_t, table_t>& work, \
                                                       int64_t blocks, size_t shared_bytes,      \
                                                       cudaStream_t stream)

}  // namespace metarec_fast::cuda
