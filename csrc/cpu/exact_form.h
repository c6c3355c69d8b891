// The limit of many inner steps with a pull, squared loss: the ridge  (Xᵀ W X + λ I)(φ − φ_0) = Xᵀ
// W (y − p_0), λ = ρ (S + n0)/2. With S ≤ D + 1 its dual of size S is solved, (λ W⁻¹ + X Xᵀ) a = y
// − p_0 and φ = φ_0 + Xᵀ a.
//
// The adjoint needs one more solve with the same factor: v = (λ W⁻¹ + X Xᵀ)⁻¹ X φ̄.
#pragma once

#include <cmath>

#include "step_form.h"

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

// A ← L with A = L Lᵀ, the lower half of [size, size]. A must be positive definite; λ > 0 was
// checked before.
template <typename scalar_t>
ALWAYS_INLINE void cholesky(scalar_t* matrix, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    scalar_t* row = matrix + i * size;
    for (int64_t j = 0; j <= i; ++j) {
      const scalar_t* other = matrix + j * size;
      scalar_t sum = row[j];
      for (int64_t k = 0; k < j; ++k) sum -= row[k] * other[k];
      row[j] = i == j ? std::sqrt(sum) : sum / other[j];
    }
  }
}

// x ← (L Lᵀ)⁻¹ x
template <typename scalar_t>
ALWAYS_INLINE void cholesky_solve(const scalar_t* factor, int64_t size, scalar_t* x) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t k = 0; k < i; ++k) x[i] -= factor[i * size + k] * x[k];
    x[i] /= factor[i * size + i];
  }
  for (int64_t i = size - 1; i >= 0; --i) {
    x[i] /= factor[i * size + i];
    for (int64_t k = 0; k < i; ++k) x[k] -= factor[i * size + k] * x[i];
  }
}

template <typename scalar_t>
MULTIVERSION void exact_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                                ExactPath<scalar_t>& path) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, P = layout.stride, normal_size = layout.width + 1;
  path.dual_system = S <= layout.dim + 1;
  path.size = path.dual_system ? S : normal_size;
  path.ridge = task.pull() * (static_cast<scalar_t>(S) + task.loop.extra_count) / 2;
  path.factor = arena.take(path.size * path.size);
  path.dual = arena.take(S);
  path.fast = arena.take_zeros(P);

  if (path.dual_system) {
    dots(task.start, task.rows, S, layout, path.dual);
    for (int64_t s = 0; s < S; ++s) {
      path.dual[s] = task.targets[s] - task.base[s] - path.dual[s];
      dots(task.rows + s * P, task.rows, s + 1, layout, path.factor + s * S);
      path.factor[s * S + s] += path.ridge / task.weights[s];
    }
    cholesky(path.factor, S);
    cholesky_solve(path.factor, S, path.dual);
    combine(path.dual, task.rows, S, layout, path.fast);
  } else {
    scalar_t* matrix = arena.take(normal_size * P);
    normal_equations(task, arena, matrix, path.fast);
    for (int64_t i = 0; i < normal_size; ++i) {
      std::copy(matrix + i * P, matrix + i * P + normal_size, path.factor + i * normal_size);
      path.factor[i * normal_size + i] += path.ridge;
    }
    cholesky(path.factor, normal_size);
    cholesky_solve(path.factor, normal_size, path.fast);
    dots(path.fast, task.rows, S, layout, path.dual);
    scalar_t* first_scores = arena.take(S);
    dots(task.start, task.rows, S, layout, first_scores);
    for (int64_t s = 0; s < S; ++s)  // a = W (y − p)/λ
      path.dual[s] = task.weights[s] / path.ridge *
                     (task.targets[s] - task.base[s] - first_scores[s] - path.dual[s]);
  }
  for (int64_t d = 0; d < P; ++d) path.fast[d] += task.start[d];
}

//   p̄_0 = −v    X̄ = a φ̄ᵀ − v φᵀ − a (Xᵀ v)ᵀ    φ̄_0 = φ̄ − Xᵀ v    w̄ = λ v a/w²    λ̄ = −Σ v a/w
template <typename scalar_t>
MULTIVERSION void exact_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                                const ExactPath<scalar_t>& path,
                                const scalar_t* grad_fast,  // φ̄ [layout.stride]
                                const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, P = layout.stride;
  scalar_t* v = arena.take(S);
  if (path.dual_system) {
    dots(grad_fast, task.rows, S, layout, v);
    cholesky_solve(path.factor, S, v);
  } else {  // v = W X (Xᵀ W X + λ I)⁻¹ φ̄
    scalar_t* solved = arena.take_zeros(P);
    std::copy(grad_fast, grad_fast + path.size, solved);
    cholesky_solve(path.factor, path.size, solved);
    dots(solved, task.rows, S, layout, v);
    for (int64_t s = 0; s < S; ++s) v[s] *= task.weights[s];
  }

  scalar_t* basis = arena.take(2 * P);  // φ̄ − Xᵀ v, φ
  combine(v, task.rows, S, layout, basis);
  for (int64_t d = 0; d < P; ++d) {
    basis[d] = grad_fast[d] - basis[d];
    basis[P + d] = path.fast[d];
    grads.start[d] = basis[d];
  }
  scalar_t* coefficients = arena.take(2 * S);  // a, −v
  scalar_t grad_ridge = 0;
  for (int64_t s = 0; s < S; ++s) {
    coefficients[s] = path.dual[s];
    coefficients[S + s] = -v[s];
    grad_ridge -= v[s] * path.dual[s] / task.weights[s];
    if (grads.base != nullptr) grads.base[s] = -v[s];
    if (grads.weights != nullptr)
      grads.weights[s] = path.ridge * v[s] * path.dual[s] / (task.weights[s] * task.weights[s]);
  }
  if (grads.prior_pull)
    grads.prior_pull.add(task.index,
                         grad_ridge * (static_cast<scalar_t>(S) + task.loop.extra_count) / 2);
  if (grads.rows != nullptr)
    write_rows<scalar_t>(task, {coefficients, 1, S}, basis, 2, arena, grads.rows);
}

}  // namespace metarec_fast::cpu
