// How a task adapts:  φ ← φ − s_k A ∘ [∇L_S(φ) + ρ (φ − φ_0)] + β_k (φ − φ_before),  k = 0 … K−1.
#pragma once

#include <cstdint>

#include "losses.h"

namespace metarec_fast {

enum class Form { kAuto, kGram, kDirect, kNormal, kPlain };  // kPlain: kDirect of a plain loop

constexpr int64_t kExact = -1;  // for `steps`: the limit of many steps, in closed form

// Which gradients are wanted; the same bits stand in metarec_fast/_autograd.py.
struct Wanted {
  int64_t bits;

  HOST_DEVICE bool start() const { return bits & 1; }  // user_init, user_bias_init, offset
  HOST_DEVICE bool items() const { return bits & 2; }
  HOST_DEVICE bool inner_lr() const { return bits & 4; }
  HOST_DEVICE bool preconditioner() const { return bits & 8; }
  HOST_DEVICE bool prior_pull() const { return bits & 16; }
  HOST_DEVICE bool momentum() const { return bits & 32; }
  HOST_DEVICE bool support_weights() const { return bits & 64; }
  HOST_DEVICE bool any() const { return bits != 0; }
};

// A number for every step or task, or one for all: stride 0.
template <typename scalar_t>
struct PerIndex {
  const scalar_t* values;  // nullptr: zero everywhere
  int64_t stride;

  HOST_DEVICE scalar_t operator[](int64_t index) const {
    return values == nullptr ? scalar_t{0} : values[index * stride];
  }
};

template <typename scalar_t>
struct InnerLoop {
  int64_t steps;                   // K, or kExact
  PerIndex<scalar_t> inner_lr;     // s_k, by step
  PerIndex<scalar_t> momentum;     // β_k, by step
  PerIndex<scalar_t> prior_pull;   // ρ, by task
  const scalar_t* preconditioner;  // A [D + 1], or nullptr: ones
  scalar_t extra_count;            // n0
  Loss loss;
  bool first_order;  // ∇L_S counts as constant when differentiating
  Form form;

  HOST_DEVICE bool exact() const { return steps == kExact; }
  // Whether nothing but the gradient moves the fast vector, as in MAML.
  HOST_DEVICE bool plain() const {
    return preconditioner == nullptr && prior_pull.values == nullptr && momentum.values == nullptr;
  }
};

}  // namespace metarec_fast
