// The inner loop in the span of the support rows:  φ_k = φ_0 + A ∘ Xᵀ a_k,  scores p_k = p_0 + G
// a_k,  G = X diag(A) Xᵀ.
//
//   a_{k+1} = (1 − s_k ρ) a_k − s_k w ∘ d_k + β_k (a_k − a_{k−1}),   d_k = ℓ'(p_k, y)/(S + n0)
//
// Only S numbers move per step, whatever D is. Exact unless there is both a preconditioner and a
// pull.
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct GramPath {
  int64_t stride;          // S, padded
  scalar_t* scaled_rows;   // X diag(A) [S, layout.stride]; X itself without a preconditioner
  scalar_t* gram;          // G [S, stride]
  scalar_t* coefficients;  // a_0 … a_K [K + 1, stride]
  scalar_t* derivatives;   // d_0 … d_{K−1} [K, stride]
  scalar_t* curvatures;    // w ∘ ℓ''/(S + n0) [K, stride]
};

template <typename scalar_t>
MULTIVERSION void gram_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                               GramPath<scalar_t>& path, scalar_t* fast) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, K = task.loop.steps, stride = padded<scalar_t>(S);
  path.stride = stride;
  path.scaled_rows = const_cast<scalar_t*>(task.rows);
  if (task.loop.preconditioner != nullptr) {
    path.scaled_rows = arena.take(S * layout.stride);
    for (int64_t s = 0; s < S; ++s)
      for (int64_t d = 0; d < layout.stride; ++d)
        path.scaled_rows[s * layout.stride + d] = task.scale[d] * task.rows[s * layout.stride + d];
  }
  path.gram = arena.take_zeros(S * stride);
  path.coefficients = arena.take_zeros((K + 1) * stride);
  path.derivatives = arena.take_zeros(K * stride);
  path.curvatures = arena.take_zeros(K * stride);
  scalar_t* first_scores = arena.take_zeros(stride);
  scalar_t* scores = arena.take_zeros(stride);

  dots(task.start, task.rows, S, layout, first_scores);
  for (int64_t s = 0; s < S; ++s) first_scores[s] += task.base[s];
  for (int64_t s = 0; s < S; ++s) {
    dots(path.scaled_rows + s * layout.stride, task.rows, s + 1, layout, path.gram + s * stride);
    for (int64_t r = 0; r < s; ++r) path.gram[r * stride + s] = path.gram[s * stride + r];
  }

  for (int64_t k = 0; k < K; ++k) {
    const scalar_t* now = path.coefficients + k * stride;
    const scalar_t* before = k == 0 ? now : now - stride;
    scalar_t* next = path.coefficients + (k + 1) * stride;
    scalar_t* derivative = path.derivatives + k * stride;
    multiply<scalar_t>({now, 0, 1}, 1, path.gram, stride, S, stride, scores, stride);
    for (int64_t s = 0; s < S; ++s) scores[s] += first_scores[s];
    differentiate(task, scores, derivative, path.curvatures + k * stride);
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    const scalar_t keep = 1 - rate * task.pull() + momentum;
    for (int64_t s = 0; s < S; ++s)
      next[s] = keep * now[s] - rate * task.weights[s] * derivative[s] - momentum * before[s];
  }

  combine(path.coefficients + K * stride, path.scaled_rows, S, layout, fast);
  for (int64_t d = 0; d < layout.stride; ++d) fast[d] += task.start[d];
}

template <typename scalar_t>
MULTIVERSION void gram_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                               const GramPath<scalar_t>& path,
                               const scalar_t* grad_fast,  // φ̄ [layout.stride]
                               const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, K = task.loop.steps, stride = path.stride;
  const bool second_order = !task.loop.first_order;
  scalar_t* adjoint = arena.take_zeros(stride);   // ā_{k+1}
  scalar_t* later = arena.take_zeros(stride);     // ā_{k+2}
  scalar_t* earlier = arena.take_zeros(stride);   // ā_k
  scalar_t* push = arena.take_zeros(K * stride);  // h_k
  scalar_t* grad_scores = arena.take_zeros(stride);
  if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + S, scalar_t{0});

  dots(grad_fast, path.scaled_rows, S, layout, adjoint);
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t* now = path.coefficients + k * stride;
    const scalar_t* before = k == 0 ? now : now - stride;
    const scalar_t* derivative = path.derivatives + k * stride;
    const scalar_t* curvature = path.curvatures + k * stride;
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    const scalar_t pull = task.pull();
    scalar_t lr_sum = 0, pull_sum = 0, momentum_sum = 0;
    for (int64_t s = 0; s < S; ++s) {
      pull_sum += adjoint[s] * now[s];
      lr_sum += adjoint[s] * task.weights[s] * derivative[s];
      momentum_sum += adjoint[s] * (now[s] - before[s]);
    }
    if (grads.inner_lr) grads.inner_lr.add(k, -(lr_sum + pull * pull_sum));
    if (grads.prior_pull) grads.prior_pull.add(task.index, -rate * pull_sum);
    if (grads.momentum) grads.momentum.add(k, momentum_sum);

    const scalar_t keep = 1 - rate * pull + momentum;
    const scalar_t momentum_after = k + 1 < K ? task.loop.momentum[k + 1] : scalar_t{0};
    if (second_order) {
      scalar_t* h = push + k * stride;
      for (int64_t s = 0; s < S; ++s) {
        h[s] = -rate * curvature[s] * adjoint[s];
        grad_scores[s] += h[s];
      }
      if (grads.weights != nullptr)
        for (int64_t s = 0; s < S; ++s) grads.weights[s] -= rate * derivative[s] * adjoint[s];
      multiply<scalar_t>({h, 0, 1}, 1, path.gram, stride, S, stride, earlier, stride);
    } else {
      std::fill(earlier, earlier + stride, scalar_t{0});
    }
    for (int64_t s = 0; s < S; ++s) earlier[s] += keep * adjoint[s] - momentum_after * later[s];
    std::swap(later, adjoint);  // later ← ā_{k+1}
    std::swap(adjoint, earlier);
  }

  combine(grad_scores, task.rows, S, layout, grads.start);
  for (int64_t d = 0; d < layout.stride; ++d) grads.start[d] += grad_fast[d];
  if (grads.base != nullptr) std::copy(grad_scores, grad_scores + S, grads.base);
  const scalar_t* last = path.coefficients + K * stride;

  // C = Ḡ + Ḡᵀ with Ḡ = Σ_k h_k a_kᵀ, then two more columns: X̄ = C X diag(A) + p̄ φ_0ᵀ + a_K (A ∘
  // φ̄)ᵀ.
  const bool wants_rows = grads.rows != nullptr && second_order;
  if (!second_order && grads.rows != nullptr)
    std::fill(grads.rows, grads.rows + S * layout.dim, scalar_t{0});
  if (!wants_rows && grads.scale == nullptr) return;
  scalar_t* grad_gram = arena.take_zeros(S * stride);  // Ḡ
  if (second_order)
    multiply<scalar_t>({push, 1, stride}, S, path.coefficients, stride, K, stride, grad_gram,
                       stride);
  if (grads.scale != nullptr) {  // Ā = φ̄ ∘ Xᵀ a_K + diag(Xᵀ Ḡ X)
    scalar_t* row = arena.take(layout.stride);
    combine(last, task.rows, S, layout, row);
    for (int64_t d = 0; d < layout.stride; ++d) grads.scale[d] += grad_fast[d] * row[d];
    for (int64_t s = 0; s < S; ++s) {
      combine(grad_gram + s * stride, task.rows, S, layout, row);
      for (int64_t d = 0; d < layout.stride; ++d)
        grads.scale[d] += task.rows[s * layout.stride + d] * row[d];
    }
  }
  if (!wants_rows) return;
  scalar_t* basis = arena.take((S + 2) * layout.stride);
  std::copy(path.scaled_rows, path.scaled_rows + S * layout.stride, basis);
  std::copy(task.start, task.start + layout.stride, basis + S * layout.stride);
  for (int64_t d = 0; d < layout.stride; ++d)
    basis[(S + 1) * layout.stride + d] = task.scale[d] * grad_fast[d];
  scalar_t* coefficients = arena.take(S * (S + 2));
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t r = 0; r < S; ++r)
      coefficients[s * (S + 2) + r] = grad_gram[s * stride + r] + grad_gram[r * stride + s];
    coefficients[s * (S + 2) + S] = grad_scores[s];
    coefficients[s * (S + 2) + S + 1] = last[s];
  }
  write_rows<scalar_t>(task, {coefficients, S + 2, 1}, basis, S + 2, arena, grads.rows);
}

}  // namespace metarec_fast::cpu
