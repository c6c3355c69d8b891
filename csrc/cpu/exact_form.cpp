#include "exact_form.h"

#include <cmath>

#include "normal_equations.h"

namespace metarec_fast::cpu {
namespace {

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

}  // namespace

template <typename scalar_t>
void exact_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, ExactPath<scalar_t>& path) {
  const Layout<scalar_t>& layout = task.layout;
  const Rows<scalar_t>& rows = task.rows;
  const int64_t S = task.size, P = layout.stride, normal_size = layout.width + 1;
  path.dual_system = S <= layout.dim + 1;
  path.size = path.dual_system ? S : normal_size;
  path.ridge = task.pull() * (static_cast<scalar_t>(S) + task.loop.extra_count) / 2;
  path.factor = arena.take(path.size * path.size);
  path.dual = arena.take(S);
  path.fast = arena.take_zeros(P);
  scalar_t* residuals = arena.take(S);  // y − p_0
  score_rows(rows, task.base, task.start, residuals);
  for (int64_t s = 0; s < S; ++s) residuals[s] = task.targets[s] - residuals[s];

  if (path.dual_system) {
    scalar_t* products = arena.take(S);
    for (int64_t s = 0; s < S; ++s) {
      dots<scalar_t>(rows[s], {rows.at, s + 1, rows.width, rows.bias}, rows.bias * rows.bias,
                     nullptr, products);
      std::copy(products, products + s + 1, path.factor + s * S);
      path.factor[s * S + s] += path.ridge / task.weights[s];
      path.dual[s] = residuals[s];
    }
    cholesky(path.factor, S);
    cholesky_solve(path.factor, S, path.dual);
    combine<scalar_t>(path.dual, rows, nullptr, path.fast);
  } else {
    scalar_t* matrix = arena.take(normal_size * P);
    normal_equations(task, arena, matrix, path.fast);
    for (int64_t i = 0; i < normal_size; ++i) {
      std::copy(matrix + i * P, matrix + i * P + normal_size, path.factor + i * normal_size);
      path.factor[i * normal_size + i] += path.ridge;
    }
    cholesky(path.factor, normal_size);
    cholesky_solve(path.factor, normal_size, path.fast);
    dots<scalar_t>(path.fast, rows, rows.bias * path.fast[layout.width], nullptr, path.dual);
    for (int64_t s = 0; s < S; ++s)  // a = W (y − p)/λ
      path.dual[s] = task.weights[s] / path.ridge * (residuals[s] - path.dual[s]);
  }
  for (int64_t d = 0; d < P; ++d) path.fast[d] += task.start[d];
}

template <typename scalar_t>
void exact_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                   const ExactPath<scalar_t>& path,
                   const scalar_t* grad_fast,  // φ̄ [layout.stride]
                   const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t>& layout = task.layout;
  const Rows<scalar_t>& rows = task.rows;
  const int64_t S = task.size, P = layout.stride;
  scalar_t* v = arena.take(S);
  if (path.dual_system) {
    dots<scalar_t>(grad_fast, rows, rows.bias * grad_fast[layout.width], nullptr, v);
    cholesky_solve(path.factor, S, v);
  } else {  // v = W X (Xᵀ W X + λ I)⁻¹ φ̄
    scalar_t* solved = arena.take_zeros(P);
    std::copy(grad_fast, grad_fast + path.size, solved);
    cholesky_solve(path.factor, path.size, solved);
    dots<scalar_t>(solved, rows, rows.bias * solved[layout.width], nullptr, v);
    for (int64_t s = 0; s < S; ++s) v[s] *= task.weights[s];
  }

  scalar_t* basis = arena.take(2 * P);  // φ̄ − Xᵀ v, φ
  combine<scalar_t>(v, rows, nullptr, basis);
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
    write_rows<scalar_t>(layout, {coefficients, 1, S}, S, Stack<scalar_t>{basis, P}, 2, arena,
                         grads.rows, layout.dim, grads.stream);
}

template void exact_forward<float>(const Task<float>& task, Arena<float>& arena,
                                   ExactPath<float>& path);
template void exact_forward<double>(const Task<double>& task, Arena<double>& arena,
                                    ExactPath<double>& path);
template void exact_adjoint<float>(const Task<float>& task, Arena<float>& arena,
                                   const ExactPath<float>& path, const float* grad_fast,
                                   const TaskGradients<float>& grads);
template void exact_adjoint<double>(const Task<double>& task, Arena<double>& arena,
                                    const ExactPath<double>& path, const double* grad_fast,
                                    const TaskGradients<double>& grads);

}  // namespace metarec_fast::cpu
