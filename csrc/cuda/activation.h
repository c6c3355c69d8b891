// The activations of an MLP and their derivatives, of single numbers.
#pragma once

#include <cmath>

#include "../activations.h"
#include "dialect.h"

namespace metarec_fast::cuda {

// σ(z), σ'(z), σ''(z)
template <typename scalar_t>
struct Activated {
  scalar_t value, slope, bend;
};

// z Φ(z), with Φ the normal distribution and φ its density: σ' = Φ + z φ, σ'' = (2 − z²) φ.
template <typename scalar_t>
__device__ __forceinline__ Activated<scalar_t> gelu(scalar_t z) {
  constexpr scalar_t kDensity = 0.3989422804014327;   // 1/√(2π)
  constexpr scalar_t kHalfRoot = 0.7071067811865476;  // 1/√2
  const scalar_t below = std::erfc(-kHalfRoot * z) / 2;
  const scalar_t density = kDensity * std::exp(-z * z / 2);
  return {z * below, below + z * density, (2 - z * z) * density};
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t relu(scalar_t z) {
  return z > 0 ? z : scalar_t{0};
}

}  // namespace metarec_fast::cuda
