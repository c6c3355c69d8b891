#include "item_shares.h"
#include "sorted_ids.h"
#include "team.h"

namespace metarec_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// One warp for each task writes its number to its entries.
__global__ void __launch_bounds__(kThreads)
    number_entries_kernel(const int64_t* __restrict__ offsets,               // [T + 1]
                          int64_t num_tasks, int64_t* __restrict__ tasks) {  // [n]
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (t >= num_tasks) return;
  for (int64_t e = offsets[t] + threadIdx.x % kWarpSize; e < offsets[t + 1]; e += kWarpSize)
    tasks[e] = t;
}

// One warp for each place among the sorted entries. If an item begins there, it sums the weights of
// the item's tasks, which come in order, once each.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    item_shares_kernel(const SortedEntries sorted, const int64_t* __restrict__ tasks,  // [n]
                       const scalar_t* __restrict__ task_weights,  // [T], or nullptr
                       scalar_t* __restrict__ shares) {            // [n]
  const int64_t begin = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (begin >= sorted.count) return;
  const int64_t id = sorted.ids[begin];
  if (begin > 0 && sorted.ids[begin - 1] == id) return;
  const int lane = threadIdx.x % kWarpSize;
  const auto belongs = [&](int64_t place) {
    return place < sorted.count && sorted.ids[place] == id;
  };
  scalar_t sum = 0;
  for (int64_t place = begin + lane; belongs(place); place += kWarpSize) {
    const int64_t task = tasks[sorted.entries[place]];
    const bool again = place > begin && tasks[sorted.entries[place - 1]] == task;
    if (!again) sum += task_weights == nullptr ? scalar_t{1} : task_weights[task];
  }
  __syncwarp();
  sum = warp_sum(sum);
  const scalar_t share = sum > 0 ? 1 / sum : scalar_t{0};
  for (int64_t place = begin + lane; belongs(place); place += kWarpSize)
    shares[sorted.entries[place]] = share;
}

}  // namespace

Tensor item_shares(const RaggedItems& support, const OptionalTensor& task_weights, ScalarType dtype,
                   cudaStream_t stream) {
  const int64_t count = support.size(), num_tasks = support.num_tasks;
  Tensor shares = empty(support.items, dtype, {count});
  if (count == 0) return shares;
  Tensor tasks = empty(support.items, ScalarType::Long, {count});
  const SortedIds sorted(support.items);
  const int64_t* offsets = support.offsets.const_data_ptr<int64_t>();
  int64_t* numbers = tasks.mutable_data_ptr<int64_t>();
  check_launch("reptile_step",
               launch("number_entries", number_entries_kernel, dim3(blocks_for(num_tasks, kWarps)),
                      dim3(kThreads), 0, stream, offsets, num_tasks, numbers));
  dispatch_floating(dtype, "reptile_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    check_launch("reptile_step",
                 launch("item_shares", item_shares_kernel<scalar_t>,
                        dim3(blocks_for(count, kWarps)), dim3(kThreads), 0, stream, sorted.view(),
                        numbers, task_weights ? task_weights->const_data_ptr<scalar_t>() : nullptr,
                        shares.mutable_data_ptr<scalar_t>()));
  });
  return shares;
}

}  // namespace metarec_fast::cuda
