// What the sparse optimisers make of one number p of a parameter and of what they keep of it, given
// its gradient g. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace metarec_fast {

// m ← m + (1 − β1)(g − m),  v ← v + (1 − β2)(g² − v),  p ← p − η m / (√v + ε)
template <typename scalar_t>
struct Adam {
  static constexpr int kStates = 2;    // m, v
  scalar_t share1, share2, rate, eps;  // 1 − β1, 1 − β2, η, ε

  HOST_DEVICE void update(scalar_t g, scalar_t& p, scalar_t& m, scalar_t& v) const {
    m += share1 * (g - m);
    v += share2 * (g * g - v);
    p -= rate * m / (std::sqrt(v) + eps);
  }
};

// η = lr √(1 − β2ᵗ) / (1 − β1ᵗ)
inline double adam_rate(double lr, double beta1, double beta2, int64_t step) {
  return lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
}

// s ← s + g²,  p ← p − lr g / (√s + ε)
template <typename scalar_t>
struct Adagrad {
  static constexpr int kStates = 1;  // s
  scalar_t rate, eps;

  HOST_DEVICE void update(scalar_t g, scalar_t& p, scalar_t& s) const {
    s += g * g;
    p -= rate * g / (std::sqrt(s) + eps);
  }
};

// p ← p − lr g
template <typename scalar_t>
struct Sgd {
  static constexpr int kStates = 0;
  scalar_t rate;

  HOST_DEVICE void update(scalar_t g, scalar_t& p) const { p -= rate * g; }
};

// A parameter, what a rule keeps of it, and the rows of its gradient.
template <typename scalar_t, template <typename> class Rule>
struct TableUpdate {
  static constexpr int kStates = Rule<scalar_t>::kStates;

  Rule<scalar_t> rule;
  scalar_t* param;                // [N, D]
  scalar_t* states[kStates + 1];  // kStates times [N, D]; no array is empty
  const scalar_t* rows;           // [n, D]
  int64_t width;                  // D
};

}  // namespace metarec_fast
