// The threads that work on one task: a warp, or all warps of a block.
#pragma once

#include "dialect.h"

namespace metarec_fast::cuda {

// Brings the cache line of an address into L2, while others compute.
__device__ __forceinline__ void prefetch_line([[maybe_unused]] const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

template <typename Number>
__device__ __forceinline__ Number warp_sum(Number value) {
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2)
    value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

template <typename Number>
__device__ __forceinline__ Number warp_max(Number value) {
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
    const Number other = __shfl_xor_sync(kAllLanes, value, apart);
    value = other > value ? other : value;
  }
  return value;
}

struct Team {
  int warps, warp, lane;

  __device__ __forceinline__ explicit Team(int warps_in)
      : warps(warps_in),
        warp(warps_in == 1 ? 0 : static_cast<int>(threadIdx.x) / kWarpSize),
        lane(static_cast<int>(threadIdx.x) % kWarpSize) {}

  __device__ __forceinline__ int thread() const { return warp * kWarpSize + lane; }
  __device__ __forceinline__ int size() const { return warps * kWarpSize; }
  __device__ __forceinline__ bool leads() const { return thread() == 0; }

  __device__ __forceinline__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  // The sum over all threads, for all of them; `scratch` [warps] may be used again at once.
  template <typename Number>
  __device__ __forceinline__ Number sum(Number value, Number* scratch) const {
    value = warp_sum(value);
    if (warps == 1) return value;
    if (lane == 0) scratch[warp] = value;
    sync();
    value = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) value += scratch[w];
    sync();
    return value;
  }
};

}  // namespace metarec_fast::cuda
