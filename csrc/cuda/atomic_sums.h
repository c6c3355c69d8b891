// Sums of the rows of equal ids by atomics: without sorting, and in whatever order the additions to
// a row happen to come, so that the last bits differ from run to run. Only where that is allowed.
#pragma once

#include "launch.h"
#include "pack.h"

namespace metarec_fast::cuda {

// Whether somebody has asked for it, and nobody for deterministic algorithms (csrc/library.cpp).
inline bool atomics_allowed() { return ask(C10_STRINGIZE(METAREC_NAMESPACE) "::atomics_allowed"); }

constexpr int kAddingThreads = 256;  // of a block

// Adds each number of a pack in one piece, and does not ask what was there before. Subnormal
// float32 count as 0, as in all float32 atomics on global memory.
template <typename scalar_t, int kCount>
__device__ void atomic_add(scalar_t* address, const Pack<scalar_t, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) atomicAdd(address + i, pack.values[i]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The same by one instruction.
__device__ inline void atomic_add(float* address, const Pack<float, 4>& pack) {
  const float* values = pack.values;
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(address)), "f"(values[0]), "f"(values[1]),
                 "f"(values[2]), "f"(values[3])
               : "memory");
}
#endif

// table[ids[e]] += factor · rows[e]  for every entry e.
// A group of `lanes` lanes, a power of two, owns an entry; lane j has the packs j, j + lanes, …
template <int kCount, typename scalar_t>
__global__ void __launch_bounds__(kAddingThreads)
    add_rows_kernel(const int64_t* __restrict__ ids,    // [n]
                    const scalar_t* __restrict__ rows,  // [n, D]
                    int64_t count,                      // n
                    int64_t width,                      // D
                    int lanes,                          //
                    scalar_t factor,                    //
                    scalar_t* table) {                  // [N, D]
  const int64_t entry = (int64_t{blockIdx.x} * kAddingThreads + threadIdx.x) / lanes;
  if (entry >= count) return;
  const int64_t id = ids[entry];
  for (int64_t column = int64_t{threadIdx.x % lanes} * kCount; column < width;
       column += int64_t{lanes} * kCount) {
    auto row = load<Pack<scalar_t, kCount>>(rows + entry * width + column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) row.values[i] *= factor;
    atomic_add(table + id * width + column, row);
  }
}

template <int kCount, typename scalar_t>
const char* launch_add_rows(const int64_t* ids, const scalar_t* rows, int64_t count, int64_t width,
                            scalar_t factor, scalar_t* table, cudaStream_t stream) {
  const int lanes = lanes_for(width, kCount);
  return launch("add_rows_kernel", add_rows_kernel<kCount, scalar_t>,
                blocks_for(count * lanes, kAddingThreads), kAddingThreads, 0, stream, ids, rows,
                count, width, lanes, factor, table);
}

// The same, on `count` > 0 entries; as many numbers at once as fit.
template <typename scalar_t>
const char* add_rows(const int64_t* ids, const scalar_t* rows, int64_t count, int64_t width,
                     scalar_t factor, scalar_t* table, cudaStream_t stream) {
  constexpr int kWidest = kWidestPack<scalar_t>;
  if (width % kWidest == 0 && is_aligned(rows) && is_aligned(table))
    return launch_add_rows<kWidest>(ids, rows, count, width, factor, table, stream);
  return launch_add_rows<1>(ids, rows, count, width, factor, table, stream);
}

}  // namespace metarec_fast::cuda
