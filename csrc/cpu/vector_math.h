// exp and log(1 + z) of whole vectors, to rounding.
#pragma once

#include <cstring>

#include "vector.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t vector __attribute__((vector_size(kRegisterBytes<float>), may_alias));
  static constexpr float kLowest = -87.0f,
                         kRound = 0x1.8p23f;  // kRound: adding it rounds to whole numbers
  static constexpr float kLn2High = 0x1.62e400p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int kMantissa = 23, kExponentBias = 127, kExpTerms = 7, kLogTerms = 8;
};
template <>
struct Bits<double> {
  typedef int64_t vector __attribute__((vector_size(kRegisterBytes<double>), may_alias));
  static constexpr double kLowest = -708.0, kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr int kMantissa = 52, kExponentBias = 1023, kExpTerms = 13, kLogTerms = 17;
};

// e^x for x ≤ 0:  2^n e^r with |r| ≤ ln 2 / 2, and e^r by its Taylor series, whose remainder is
// below half a unit in the last place.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> exp_of_negative(Vector<scalar_t> x) {
  using B = Bits<scalar_t>;
  const Vector<scalar_t> lowest = broadcast(B::kLowest);
  x = x < lowest ? lowest : x;
  const Vector<scalar_t> shifted = x * scalar_t{1.4426950408889634} + B::kRound;
  const Vector<scalar_t> n = shifted - B::kRound;
  const Vector<scalar_t> r = (x - n * B::kLn2High) - n * B::kLn2Low;
  Vector<scalar_t> result = broadcast(scalar_t{1});
  for (int k = B::kExpTerms; k > 0; --k) result = 1 + result * r * (scalar_t{1} / k);
  typename B::vector exponent, rounding;
  const Vector<scalar_t> round = broadcast(B::kRound);
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  std::memcpy(&rounding, &round, sizeof(rounding));
  exponent = (exponent - rounding + B::kExponentBias) << B::kMantissa;  // the bits of 2^n
  Vector<scalar_t> power;
  std::memcpy(&power, &exponent, sizeof(power));
  return result * power;
}

// log(1 + z) for z in [0, 1]:  2 artanh(z/(2 + z)), whose series falls by 1/9 from term to term.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> log1p_of_fraction(const Vector<scalar_t>& z) {
  const Vector<scalar_t> s = z / (2 + z), square = s * s;
  Vector<scalar_t> sum = {};
  for (int k = Bits<scalar_t>::kLogTerms; k >= 0; --k)
    sum = sum * square + scalar_t{1} / (2 * k + 1);
  return 2 * s * sum;
}

template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> absolute(const Vector<scalar_t>& x) {
  return x < 0 ? -x : x;
}

// σ(p)
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> sigmoid(const Vector<scalar_t>& score) {
  const Vector<scalar_t> small = exp_of_negative<scalar_t>(-absolute<scalar_t>(score));
  const Vector<scalar_t> one = broadcast(scalar_t{1});
  return (score < 0 ? small : one) / (1 + small);
}

// log(1 + eᵖ)
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> softplus(const Vector<scalar_t>& score) {
  const Vector<scalar_t> positive = score > 0 ? score : Vector<scalar_t>{};
  return positive +
         log1p_of_fraction<scalar_t>(exp_of_negative<scalar_t>(-absolute<scalar_t>(score)));
}

// What the loss formulas want to know of a register of numbers.
template <typename scalar_type>
struct VectorMath {
  using scalar_t = scalar_type;
  ALWAYS_INLINE static Vector<scalar_t> sigmoid(const Vector<scalar_t>& p) {
    return cpu::sigmoid<scalar_t>(p);
  }
  ALWAYS_INLINE static Vector<scalar_t> softplus(const Vector<scalar_t>& p) {
    return cpu::softplus<scalar_t>(p);
  }
  ALWAYS_INLINE static Vector<scalar_t> one() { return broadcast(scalar_t{1}); }
};

}  // namespace metarec_fast::cpu
