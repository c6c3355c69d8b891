// Products on tensor cores, nearly as exact as those of float32.
//
// They multiply tf32, which is float32 without its last 13 bits. A number x is split into two such:
// its head, and the head of what is left, so that x = head + rest (1 + ε), |ε| < 2⁻¹⁰, and
//
//   x y ≈ head(x) head(y) + head(x) rest(y) + rest(x) head(y)
//
// What is missing: rest(x) rest(y) < 2⁻²⁰ |x y|, and two ends of rests, each < 2⁻²¹ |x y| since a
// rest has 13 bits, of which 11 are kept; together less than 2⁻¹⁹ |x y|.
#pragma once

#include <cstring>

#include "dialect.h"

namespace metarec_fast::cuda {

// x without what tf32 has no room for.
__device__ __forceinline__ float head_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= ~uint32_t{0x1fff};
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// sums [16, 8] += left [16, 8] · right [8, 8], by a warp. Lane l = 4 g + i holds
//
//   left  (g, i), (g + 8, i), (g, i + 4), (g + 8, i + 4)
//   right (i, g), (i + 4, g)
//   sums  (g, 2 i), (g, 2 i + 1), (g + 8, 2 i), (g + 8, 2 i + 1)
#ifndef METAREC_SIMULATED
__device__ __forceinline__ void multiply_add(const float (&left)[4], const float (&right)[2],
                                             float (&sums)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(left[0])), "r"(__float_as_uint(left[1])), "r"(__float_as_uint(left[2])),
        "r"(__float_as_uint(left[3])), "r"(__float_as_uint(right[0])),
        "r"(__float_as_uint(right[1])));
}
#else
// The same by exchanges between lanes: the simulator has no tensor cores.
inline void multiply_add(const float (&left)[4], const float (&right)[2], float (&sums)[4]) {
  constexpr int kDepth = 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, i = lane % 4;
  float rows[2][kDepth], columns[2][kDepth];  // of left and right
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kDepth; ++k) {
      rows[half][k] = __shfl_sync(kAllLanes, left[half + k / 4 * 2], 4 * g + k % 4);
      columns[half][k] = __shfl_sync(kAllLanes, right[k / 4], 4 * (2 * i + half) + k % 4);
    }
  for (int s = 0; s < 4; ++s)
    for (int k = 0; k < kDepth; ++k)
      sums[s] += head_of(rows[s / 2][k]) * head_of(columns[s % 2][k]);
}
#endif

}  // namespace metarec_fast::cuda
