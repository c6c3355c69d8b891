// The activations of an MLP and their derivatives, of whole registers.
#pragma once

#include "vector_math.h"

namespace metarec_fast::cpu {

// (1 + 2a) Φ(−a)/e^(−a²/2) for a ≥ 0 is smooth in t = (a − 4)/(a + 4), which lies in [−1, 1): here
// is its Chebyshev interpolation there, by powers of t; to 2e-7 and 5e-16 of Φ(−a).
template <typename scalar_t>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float kTerms[] = {0.849695763f,    -0.0230089814f,  -0.0963793327f,
                                     0.128902995f,    -0.0952682628f,  0.0443939846f,
                                     -0.010478015f,   -0.00128153463f, 0.00150708915f,
                                     -6.42043439e-5f, -0.000134969188f};
};
template <>
struct NormalTail<double> {
  static constexpr double kTerms[] = {
      0.84969577171772043,     -0.023009233104596725,   -0.096379985890414863,
      0.12890813544489301,     -0.095260478962357348,   0.044364290439822142,
      -0.010512319260177505,   -0.0012100600250251949,  0.0015769785146465648,
      -0.00014330578624282293, -0.00020435496042877197, 3.7869338697720054e-5,
      3.1558369413531728e-5,   -6.0373314930214606e-6,  -5.8903448263309216e-6,
      6.0741200658511978e-7,   1.2037917948299314e-6,   5.0371291014090381e-8,
      -2.3813770440814567e-7,  -4.7789923447226214e-8,  4.0125363129636127e-8,
      1.2970106196045986e-8,   -4.8652027636529067e-9,  -1.5381028045222175e-9,
      3.0360618062331064e-10};
};

// σ(z), σ'(z), σ''(z)
template <typename scalar_t>
struct Activated {
  Vector<scalar_t> value, slope, bend;
};

// z Φ(z), with Φ the normal distribution and φ its density: σ' = Φ + z φ, σ'' = (2 − z²) φ.
template <typename scalar_t>
ALWAYS_INLINE Activated<scalar_t> gelu(const Vector<scalar_t>& z) {
  constexpr auto& kTerms = NormalTail<scalar_t>::kTerms;
  constexpr scalar_t kDensity = 0.3989422804014327;  // 1/√(2π)
  const Vector<scalar_t> a = absolute<scalar_t>(z), square = z * z;
  const Vector<scalar_t> bell = exp_of_negative<scalar_t>(scalar_t{-0.5} * square);
  const Vector<scalar_t> t = (a - 4) / (a + 4);
  Vector<scalar_t> series = {};
  for (int k = static_cast<int>(std::size(kTerms)) - 1; k >= 0; --k)
    series = series * t + kTerms[k];
  const Vector<scalar_t> tail = bell * series / (1 + 2 * a);
  const Vector<scalar_t> below = z < 0 ? tail : 1 - tail, density = kDensity * bell;
  return {z * below, below + z * density, (2 - square) * density};
}

template <typename scalar_t>
ALWAYS_INLINE Activated<scalar_t> relu(const Vector<scalar_t>& z) {
  const Vector<scalar_t> zero = {}, one = broadcast(scalar_t{1});
  return {z > 0 ? z : zero, z > 0 ? one : zero, zero};
}

}  // namespace metarec_fast::cpu
