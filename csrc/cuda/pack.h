// A few numbers that are loaded and stored together.
#pragma once

#include "dialect.h"

namespace metarec_fast::cuda {

template <typename scalar_t, int kCount>
struct alignas(sizeof(scalar_t) * kCount) Pack {
  scalar_t values[kCount];

  __device__ void operator+=(const Pack& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += other.values[i];
  }
};

template <typename scalar_t>
constexpr int kWidestPack = 16 / sizeof(scalar_t);

// As many lanes, a power of two, as a row has packs of `count` numbers; at most a warp.
inline int lanes_for(int64_t width, int count) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * count < width) lanes *= 2;
  return lanes;
}

template <typename PackType, typename scalar_t>
__device__ PackType load(const scalar_t* address) {
  return *reinterpret_cast<const PackType*>(address);
}

template <typename PackType, typename scalar_t>
__device__ void store(scalar_t* address, const PackType& pack) {
  *reinterpret_cast<PackType*>(address) = pack;
}

}  // namespace metarec_fast::cuda
