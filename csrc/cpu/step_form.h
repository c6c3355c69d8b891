// The inner loop on the fast vector itself, step by step.
//
//   direct:  ∇L_S(φ) = Xᵀ (w ∘ ℓ'(p, y))/(S + n0),  p = base + X φ              any loss
//   normal:  ∇L_S(φ) = 2/(S + n0) (M (φ − φ_0) − v),  M = Xᵀ W X,  v = Xᵀ W (y − p_0)
//            squared loss; a step costs the same for any S
//
// Both keep φ_k; the adjoints differ only in how they multiply with the Hessian.
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct StepPath {
  bool normal;
  int64_t entries;        // R, padded
  scalar_t* fast;         // φ_0 … φ_K [K + 1, layout.stride]
  scalar_t* slopes;       // ∇L_S(φ_k) + ρ (φ_k − φ_0) [K, layout.stride]
  scalar_t* pushes;       // w ∘ ℓ'/(S + n0) [K, entries]; normal: filled in the adjoint
  scalar_t* curvatures;   // [K, entries], see differentiate; normal: likewise
  Rows<scalar_t> matrix;  // M [width + 1, layout.stride], normal only
};

template <typename scalar_t>
void step_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, bool normal,
                  StepPath<scalar_t>& path);

template <typename scalar_t>
void step_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                  const StepPath<scalar_t>& path,
                  const scalar_t* grad_path,  // φ̄_0 … φ̄_K of the outer loss, or
                  bool whole_path,            // only φ̄_K [layout.stride]
                  const TaskGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
