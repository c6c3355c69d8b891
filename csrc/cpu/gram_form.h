// The inner loop in the span of the support rows:  φ_k = φ_0 + A ∘ Xᵀ a_k,  scores p_k = p_0 + G
// a_k,  G = X diag(A) Xᵀ.
//
//   a_{k+1} = (1 − s_k ρ) a_k − s_k w ∘ ℓ'(p_k, y)/(S + n0) + β_k (a_k − a_{k−1})
//
// Only as many numbers move per step as there are rows, whatever D is. Exact unless there is both a
// preconditioner and a pull.
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct GramPath {
  int64_t stride;          // R, padded
  Rows<scalar_t> scaled;   // X diag(A); X itself without a preconditioner
  scalar_t* gram;          // G [R, stride]
  scalar_t* coefficients;  // a_0 … a_K [K + 1, stride]
  scalar_t* pushes;        // w ∘ ℓ'/(S + n0) [K, stride]
  scalar_t* curvatures;    // [K, stride], see differentiate
};

template <typename scalar_t>
void gram_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, GramPath<scalar_t>& path,
                  scalar_t* fast);

template <typename scalar_t>
void gram_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                  const GramPath<scalar_t>& path,
                  const scalar_t* grad_fast,  // φ̄ [layout.stride]
                  const TaskGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
