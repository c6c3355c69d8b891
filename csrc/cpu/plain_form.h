// The inner loop where nothing but the gradient moves the fast vector, as in MAML:
//
//   φ_{k+1} = φ_k − s_k Xᵀ (w ∘ ℓ'(p_k, y))/(S + n0),    p_k = base + X φ_k
//
// no preconditioner, pull or momentum. A step goes over the rows twice, there and back, and over
// nothing else. λ_k is the gradient at φ_k:
//
//   λ_k = λ_{k+1} + Xᵀ h_k,   h_k = −s_k w ∘ ℓ''(p_k, y)/(S + n0) ∘ X λ_{k+1}
//   X̄ = Σ_k h_k φ_kᵀ − s_k w ∘ ℓ'/(S + n0) λ_{k+1}ᵀ
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct PlainPath {
  int64_t entries;         // R, padded
  scalar_t* fast;          // φ_0 … φ_K [K + 1, layout.stride]
  scalar_t* adjoints;      // λ_1 … λ_K, just before φ_0; filled on the way back
  scalar_t* pushes;        // w ∘ ℓ'/(S + n0) [K, entries]
  scalar_t* coefficients;  // of X̄: −s_k pushes of λ_{k+1}, then h_k of φ_k [2K, entries]
  scalar_t* curvatures;    // [K, entries], see differentiate
};

template <typename scalar_t>
void plain_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, PlainPath<scalar_t>& path);

template <typename scalar_t>
void plain_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                   const PlainPath<scalar_t>& path,
                   const scalar_t* grad_path,  // φ̄_0 … φ̄_K of the outer loss, or
                   bool whole_path,            // only φ̄_K [layout.stride]
                   const TaskGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
