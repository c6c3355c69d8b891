#include "team.h"
#include "totals.h"

namespace metarec_fast::cuda {
namespace {

constexpr int kSummingThreads = 256;
constexpr int kSummingWarps = kSummingThreads / kWarpSize;

// The sum of each thread's value over the block, for thread 0.
__device__ __forceinline__ double block_sum(double value, double* of_warps) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kSummingWarps; ++w) value += of_warps[w];
  __syncthreads();
  return value;
}

// One block for each number that comes out.
template <typename scalar_t>
__global__ void __launch_bounds__(kSummingThreads)
    sum_records_kernel(const scalar_t* __restrict__ records, int64_t num_records, int record_size,
                       const __grid_constant__ RecordParts<scalar_t> all) {
  CUDA_SHARED(double, of_warps, kSummingWarps);
  int place = static_cast<int>(blockIdx.x), part = 0;
  for (;; ++part) {
    const int outs = all.parts[part].folded ? 1 : all.parts[part].count;
    if (place < outs) break;
    place -= outs;
  }
  const RecordPart<scalar_t>& from = all.parts[part];
  const int first = from.at + (from.folded ? 0 : place), count = from.folded ? from.count : 1;
  double sum = 0;
  for (int i = first; i < first + count; ++i)
    for (int64_t record = threadIdx.x; record < num_records; record += kSummingThreads)
      sum += records[record * record_size + i];
  sum = block_sum(sum, of_warps);
  if (threadIdx.x == 0) from.out[place] = static_cast<scalar_t>(sum);
}

// One thread for each number of a record and every kSummingWarps-th record; a block has one warp of
// numbers.
template <typename scalar_t>
__global__ void __launch_bounds__(kSummingThreads)
    sum_long_records_kernel(const scalar_t* __restrict__ records,  // [num_records, record_size]
                            int64_t num_records, int record_size,
                            const __grid_constant__ RecordParts<scalar_t> all) {
  CUDA_SHARED(double, of_warps, kSummingThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int place = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  double sum = 0;
  if (place < record_size)
#pragma unroll 4
    for (int64_t record = warp; record < num_records; record += kSummingWarps)
      sum += records[record * record_size + place];
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kSummingWarps; ++w) sum += of_warps[w * kWarpSize + lane];
  for (int i = 0; i < all.num_parts; ++i) {
    const RecordPart<scalar_t>& part = all.parts[i];
    if (place >= part.at && place < part.at + part.count)
      part.out[place - part.at] = static_cast<scalar_t>(sum);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSummingThreads)
    sum_task_weights_kernel(const scalar_t* __restrict__ task_weights,  // [T], or nullptr
                            const int64_t* __restrict__ offsets,        // [T + 1]
                            int64_t num_tasks, bool entered,
                            scalar_t* __restrict__ normalisers) {  // [2]
  CUDA_SHARED(double, of_warps, kSummingWarps);
  double total = 0, with_entries = 0;
  for (int64_t t = threadIdx.x; t < num_tasks; t += kSummingThreads) {
    const double weight = task_weights == nullptr ? 1 : static_cast<double>(task_weights[t]);
    total += weight;
    if (offsets[t + 1] > offsets[t]) with_entries += weight;
  }
  total = block_sum(total, of_warps);
  with_entries = block_sum(with_entries, of_warps);
  if (threadIdx.x != 0) return;
  const auto inverse = [](double sum) { return static_cast<scalar_t>(sum > 0 ? 1 / sum : 0); };
  normalisers[0] = inverse(entered ? with_entries : total);
  normalisers[1] = inverse(with_entries);
}

}  // namespace

template <typename scalar_t>
const char* sum_records(const scalar_t* records, int64_t num_records, int record_size,
                        const RecordParts<scalar_t>& parts, cudaStream_t stream) {
  unsigned outs = 0;
  for (int i = 0; i < parts.num_parts; ++i)
    outs += parts.parts[i].folded ? 1 : static_cast<unsigned>(parts.parts[i].count);
  if (outs == 0) return nullptr;
  return launch("sum_records", sum_records_kernel<scalar_t>, dim3(outs), dim3(kSummingThreads), 0,
                stream, records, num_records, record_size, parts);
}

template <typename scalar_t>
const char* sum_long_records(const scalar_t* records, int64_t num_records, int record_size,
                             const RecordParts<scalar_t>& parts, cudaStream_t stream) {
  return launch("sum_long_records", sum_long_records_kernel<scalar_t>,
                dim3(blocks_for(record_size, kWarpSize)), dim3(kSummingThreads), 0, stream, records,
                num_records, record_size, parts);
}

template <typename scalar_t>
const char* sum_task_weights(const scalar_t* task_weights, const int64_t* offsets,
                             int64_t num_tasks, bool entered, scalar_t* normalisers,
                             cudaStream_t stream) {
  return launch("sum_task_weights", sum_task_weights_kernel<scalar_t>, dim3(1),
                dim3(kSummingThreads), 0, stream, task_weights, offsets, num_tasks, entered,
                normalisers);
}

#define METAREC_TOTALS(scalar_t)                                                                  \
  template const char* sum_records<scalar_t>(const scalar_t* records, int64_t num_records,        \
                                             int record_size, const RecordParts<scalar_t>& parts, \
                                             cudaStream_t stream);                                \
  template const char* sum_long_records<scalar_t>(                                                \
      const scalar_t* records, int64_t num_records, int record_size,                              \
      const RecordParts<scalar_t>& parts, cudaStream_t stream);                                   \
  template const char* sum_task_weights<scalar_t>(                                                \
      const scalar_t* task_weights, const int64_t* offsets, int64_t num_tasks, bool entered,      \
      scalar_t* normalisers, cudaStream_t stream)

METAREC_TOTALS(float);
METAREC_TOTALS(double);

}  // namespace metarec_fast::cuda
