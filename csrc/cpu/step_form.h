// The inner loop on the fast vector itself, step by step.
//
//   direct:  ∇L_S(φ) = Xᵀ (w ∘ ℓ'(p, y))/(S + n0),  p = m + b + X φ                 any loss
//   normal:  ∇L_S(φ) = 2/(S + n0) (M (φ − φ_0) − v),  M = Xᵀ W X,  v = Xᵀ W (y − p_0)   squared
//   loss, any S at one price
//
// Both keep φ_k; the adjoints differ only in how they multiply with the Hessian.
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct StepPath {
  bool normal;
  scalar_t* fast;         // φ_0 … φ_K [K + 1, layout.stride]
  scalar_t* slopes;       // ∇L_S(φ_k) + ρ (φ_k − φ_0) [K, layout.stride]
  scalar_t* derivatives;  // ℓ'/(S + n0) [K, S]; normal: filled in the adjoint
  scalar_t* curvatures;   // w ℓ''/(S + n0) [K, S]; normal: likewise
  scalar_t* matrix;       // M [width + 1, layout.stride], normal only
};

// M and v of the normal form.
template <typename scalar_t>
ALWAYS_INLINE void normal_equations(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                                    scalar_t* matrix, scalar_t* vector) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, rows = layout.width + 1;
  scalar_t* weighted = arena.take(S * layout.stride);
  scalar_t* residuals = arena.take(S);
  dots(task.start, task.rows, S, layout, residuals);
  for (int64_t s = 0; s < S; ++s) {
    residuals[s] = task.weights[s] * (task.targets[s] - task.base[s] - residuals[s]);
    for (int64_t d = 0; d < layout.stride; ++d)
      weighted[s * layout.stride + d] = task.weights[s] * task.rows[s * layout.stride + d];
  }
  combine(residuals, task.rows, S, layout, vector);
  multiply<scalar_t>({weighted, 1, layout.stride}, rows, task.rows, layout.stride, S, layout.stride,
                     matrix, layout.stride);
}

template <typename scalar_t>
MULTIVERSION void step_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, bool normal,
                               StepPath<scalar_t>& path) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, K = task.loop.steps, P = layout.stride;
  path.normal = normal;
  path.fast = arena.take((K + 1) * P);
  path.slopes = arena.take_zeros(K * P);
  path.derivatives = arena.take_zeros(K * S);
  path.curvatures = arena.take_zeros(K * S);
  path.matrix = nullptr;
  scalar_t* scores = arena.take(S);
  scalar_t* target = nullptr;  // v
  scalar_t* moved = arena.take_zeros(P);
  std::copy(task.start, task.start + P, path.fast);
  if (normal) {
    path.matrix = arena.take((layout.width + 1) * P);
    target = arena.take(P);
    normal_equations(task, arena, path.matrix, target);
  }

  const scalar_t pull = task.pull();
  for (int64_t k = 0; k < K; ++k) {
    const scalar_t* now = path.fast + k * P;
    const scalar_t* before = k == 0 ? now : now - P;
    scalar_t* next = path.fast + (k + 1) * P;
    scalar_t* slope = path.slopes + k * P;
    if (normal) {
      for (int64_t d = 0; d < P; ++d) moved[d] = now[d] - task.start[d];
      dots(moved, path.matrix, layout.width + 1, layout, slope);
      for (int64_t d = 0; d < P; ++d) slope[d] = 2 * task.mean() * (slope[d] - target[d]);
    } else {
      scalar_t* derivative = path.derivatives + k * S;
      dots(now, task.rows, S, layout, scores);
      for (int64_t s = 0; s < S; ++s) scores[s] += task.base[s];
      differentiate(task, scores, derivative, path.curvatures + k * S);
      for (int64_t s = 0; s < S; ++s) scores[s] = task.weights[s] * derivative[s];
      combine(scores, task.rows, S, layout, slope);
    }
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    for (int64_t d = 0; d < P; ++d) {
      slope[d] += pull * (now[d] - task.start[d]);
      next[d] = now[d] - rate * task.scale[d] * slope[d] + momentum * (now[d] - before[d]);
    }
  }
}

template <typename scalar_t>
MULTIVERSION void step_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                               const StepPath<scalar_t>& path,
                               const scalar_t* grad_path,  // φ̄_0 … φ̄_K of the outer loss, or
                               bool whole_path,            // only φ̄_K [layout.stride]
                               const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t S = task.size, K = task.loop.steps, P = layout.stride;
  const bool second_order = !task.loop.first_order;
  const scalar_t pull = task.pull();
  // X̄ = Σ_j C[s, j] basis[j] over  φ_0 … φ_{K−1}, η_0 … η_{K−1}  with η_k = A ∘ λ_{k+1}.
  scalar_t* basis = arena.take(2 * K * P);
  scalar_t* directions = basis + K * P;                  // η
  scalar_t* coefficients = arena.take_zeros(2 * K * S);  // [2K, S]: h_k, then −s_k w ∘ derivative
  scalar_t* adjoint = arena.take(P);                     // λ_{k+1}
  scalar_t* later = arena.take_zeros(P);                 // λ_{k+2}
  scalar_t* earlier = arena.take_zeros(P);               // λ_k
  scalar_t* restart = arena.take_zeros(P);               // Σ_k s_k ρ A ∘ λ_{k+1}
  scalar_t* along = arena.take_zeros(K * S);             // X η_k
  std::copy(path.fast, path.fast + K * P, basis);
  const scalar_t* last = whole_path ? grad_path + K * P : grad_path;
  std::copy(last, last + P, adjoint);

  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t* now = path.fast + k * P;
    const scalar_t* before = k == 0 ? now : now - P;
    const scalar_t* slope = path.slopes + k * P;
    scalar_t* direction = directions + k * P;
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    scalar_t lr_sum = 0, pull_sum = 0, momentum_sum = 0;
    for (int64_t d = 0; d < P; ++d) {
      direction[d] = task.scale[d] * adjoint[d];
      lr_sum += direction[d] * slope[d];
      pull_sum += direction[d] * (now[d] - task.start[d]);
      momentum_sum += adjoint[d] * (now[d] - before[d]);
    }
    if (grads.scale != nullptr)
      for (int64_t d = 0; d < P; ++d) grads.scale[d] -= rate * adjoint[d] * slope[d];
    if (grads.inner_lr) grads.inner_lr.add(k, -lr_sum);
    if (grads.prior_pull) grads.prior_pull.add(task.index, -rate * pull_sum);
    if (grads.momentum) grads.momentum.add(k, momentum_sum);

    if (second_order && path.normal) {
      dots(direction, path.matrix, layout.width + 1, layout, earlier);
      for (int64_t d = 0; d < P; ++d) earlier[d] *= -2 * task.mean() * rate;
    } else if (second_order) {
      scalar_t* h = coefficients + k * S;
      dots(direction, task.rows, S, layout, along + k * S);
      for (int64_t s = 0; s < S; ++s) h[s] = -rate * path.curvatures[k * S + s] * along[k * S + s];
      combine(h, task.rows, S, layout, earlier);
    } else {
      std::fill(earlier, earlier + P, scalar_t{0});
    }
    const scalar_t momentum_after = k + 1 < K ? task.loop.momentum[k + 1] : scalar_t{0};
    for (int64_t d = 0; d < P; ++d) {
      earlier[d] +=
          (1 + momentum) * adjoint[d] - rate * pull * direction[d] - momentum_after * later[d];
      restart[d] += rate * pull * direction[d];
    }
    if (whole_path)
      for (int64_t d = 0; d < P; ++d) earlier[d] += grad_path[k * P + d];
    std::swap(later, adjoint);  // later ← λ_{k+1}
    std::swap(adjoint, earlier);
  }
  const scalar_t first_momentum = K > 0 ? task.loop.momentum[0] : scalar_t{0};
  for (int64_t d = 0; d < P; ++d)
    grads.start[d] = adjoint[d] - first_momentum * later[d] + restart[d];

  if (!second_order) {
    if (grads.base != nullptr) std::fill(grads.base, grads.base + S, scalar_t{0});
    if (grads.rows != nullptr) std::fill(grads.rows, grads.rows + S * layout.dim, scalar_t{0});
    if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + S, scalar_t{0});
    return;
  }
  scalar_t* base = arena.take_zeros(S);  // Σ_k h_k
  if (path.normal) {
    // The rows were not touched on the way: now Xη_k and p_k − y = p_0 − y + X (φ_k − φ_0), all at
    // once.
    for (int64_t k = 0; k < K; ++k) {
      scalar_t* derivative = path.derivatives + k * S;
      dots(directions + k * P, task.rows, S, layout, along + k * S);
      dots(path.fast + k * P, task.rows, S, layout, derivative);
      for (int64_t s = 0; s < S; ++s) derivative[s] += task.base[s];
      differentiate(task, derivative, derivative, path.curvatures + k * S);
      for (int64_t s = 0; s < S; ++s)
        coefficients[k * S + s] =
            -task.loop.inner_lr[k] * path.curvatures[k * S + s] * along[k * S + s];
    }
  }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s) {
      base[s] += coefficients[k * S + s];
      coefficients[(K + k) * S + s] =
          -task.loop.inner_lr[k] * task.weights[s] * path.derivatives[k * S + s];
    }
  if (grads.weights != nullptr) {
    std::fill(grads.weights, grads.weights + S, scalar_t{0});
    for (int64_t k = 0; k < K; ++k)
      for (int64_t s = 0; s < S; ++s)
        grads.weights[s] -= task.loop.inner_lr[k] * path.derivatives[k * S + s] * along[k * S + s];
  }
  if (grads.base != nullptr) std::copy(base, base + S, grads.base);
  if (grads.rows != nullptr)
    write_rows<scalar_t>(task, {coefficients, 1, S}, basis, 2 * K, arena, grads.rows);
}

}  // namespace metarec_fast::cpu
