// The limit of many inner steps with a pull, squared loss: the ridge  (Xᵀ W X + λ I)(φ − φ_0) = Xᵀ
// W (y − p_0), λ = ρ (S + n0)/2. With S ≤ D + 1 its dual of size S is solved, (λ W⁻¹ + X Xᵀ) a = y
// − p_0 and φ = φ_0 + Xᵀ a.
//
// The adjoint needs one more solve with the same factor: v = (λ W⁻¹ + X Xᵀ)⁻¹ X φ̄.
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct ExactPath {
  bool dual_system;  // of size S, else the normal equations of size width + 1
  int64_t size;
  scalar_t ridge;    // λ
  scalar_t* factor;  // Cholesky factor, lower [size, size]
  scalar_t* dual;    // a [S]
  scalar_t* fast;    // φ [layout.stride]
};

template <typename scalar_t>
void exact_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, ExactPath<scalar_t>& path);

//   p̄_0 = −v    X̄ = a φ̄ᵀ − v φᵀ − a (Xᵀ v)ᵀ    φ̄_0 = φ̄ − Xᵀ v    w̄ = λ v a/w²    λ̄ = −Σ v a/w
template <typename scalar_t>
void exact_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                   const ExactPath<scalar_t>& path,
                   const scalar_t* grad_fast,  // φ̄ [layout.stride]
                   const TaskGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
