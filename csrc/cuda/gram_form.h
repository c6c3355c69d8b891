// The inner loop in the span of the rows (A = 1): only R numbers move, whatever D is.
//
//   G = X Xᵀ, p_0 = base + X φ_0,   φ_k = φ_0 + Xᵀ a_k,  p_k = p_0 + G a_k,  a_0 = 0
//   a_{k+1} = (1 − s_k ρ) a_k − s_k w ∘ ℓ'(p_k)/(S + n0) + β_k (a_k − a_{k−1})
//
// and back, ā_K = X φ̄:
//
//   h_k = −s_k w/(S + n0) ∘ H_k ā_{k+1}
//   ā_k = (1 − s_k ρ + β_k) ā_{k+1} − β_{k+1} ā_{k+2} + G h_k,   p̄ = Σ_k h_k,   C = Σ_k h_k a_kᵀ +
//   a_k h_kᵀ φ̄_0 = φ̄ + Xᵀ p̄,   X̄ = p̄ φ_0ᵀ + a_K φ̄ᵀ + C X
#pragma once

#include "task.h"

namespace metarec_fast::cuda {

// (G x)_r; consecutive threads read consecutive numbers, as G is symmetric.
template <typename scalar_t>
__device__ __forceinline__ scalar_t gram_product(const scalar_t* gram, const scalar_t* x, int r,
                                                 int R) {
  scalar_t sum = 0;
#pragma unroll 4
  for (int j = 0; j < R; ++j) sum += gram[j * R + r] * x[j];
  return sum;
}

template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast gram_forward(const TaskType& task) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  const InnerLoop<scalar_t>& loop = task.problem.loop;
  const Scratch<scalar_t>& scratch = task.scratch;
  const int R = task.rows();
  scalar_t* first_scores = scratch.grad_base();  // p_0; its gradient comes later
  task.dots(task.start(), R,
            [&](int r, scalar_t product) { first_scores[r] = scratch.base()[r] + product; });
  for (int j = 0; j < R; ++j) {
    Fast other;
    task.columns.load(task.row(j), other);
    other.bias = task.row_bias;
    task.dots(other, R, [&](int r, scalar_t product) { scratch.gram()[j * R + r] = product; });
  }
  task.each(R, [&](int r) { scratch.coefficients()[r] = 0; });
  for (int k = 0; k < loop.steps; ++k) {
    const scalar_t* now = scratch.coefficients() + k * R;
    scalar_t *next = scratch.coefficients() + (k + 1) * R, *push = scratch.pushes() + k * R;
    task.team.sync();
    task.each(R, [&](int r) {
      scratch.scores()[r] = first_scores[r] + gram_product(scratch.gram(), now, r, R);
    });
    task.differentiate(scratch.scores(), push, scratch.curvatures() + k * R);
    const scalar_t rate = loop.inner_lr[k], momentum = loop.momentum[k];
    task.each(R, [&](int r) {
      const scalar_t before = k == 0 ? now[r] : now[r - R];
      next[r] = (1 - rate * task.pull()) * now[r] - rate * push[r] + momentum * (now[r] - before);
    });
  }
  task.team.sync();
  Fast fast = task.combine(scratch.coefficients() + loop.steps * R, R);
  fast.add(1, task.start());
  return fast;
}

// From φ̄ to φ̄_0; leaves C in place of G and, of every row, b̄ = p̄ and w̄ in scratch.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast gram_adjoint(
    const TaskType& task, const Record<TaskType>& record, Wanted wanted,
    const typename TaskType::Fast& grad_fast) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  const InnerLoop<scalar_t>& loop = task.problem.loop;
  const Scratch<scalar_t>& scratch = task.scratch;
  const int R = task.rows();
  const bool second_order = !loop.first_order;
  scalar_t* adjoint = scratch.along();  // ā_{k+1}, and ā_k of the same row at once
  scalar_t* later = scratch.scores();   // ā_{k+2}
  const scalar_t pull = task.pull();
  task.dots(grad_fast, R, [&](int r, scalar_t product) { adjoint[r] = product; });
  task.each(R, [&](int r) { later[r] = scratch.grad_base()[r] = 0; });
  for (int k = static_cast<int>(loop.steps) - 1; k >= 0; --k) {
    const scalar_t *now = scratch.coefficients() + k * R, *push = scratch.pushes() + k * R;
    const scalar_t* before = k == 0 ? now : now - R;
    const scalar_t rate = loop.inner_lr[k], momentum = loop.momentum[k];
    scalar_t* bends = scratch.bends() + k * R;
    task.team.sync();
    // Σ_r ā_{k+1} value(r), added to the record with a factor
    const auto total = [&](int place, scalar_t factor, const auto& value) {
      scalar_t sum = 0;
      task.each(R, [&](int r) { sum += adjoint[r] * value(r); });
      record.add(place, factor * task.team.sum(sum, scratch.partial()));
    };
    if (wanted.inner_lr())
      total(record.at.inner_lr() + k, -1, [&](int r) { return push[r] + pull * now[r]; });
    if (wanted.prior_pull()) total(record.at.pull(), -rate, [&](int r) { return now[r]; });
    if (wanted.momentum())
      total(record.at.momentum() + k, 1, [&](int r) { return now[r] - before[r]; });
    if (second_order)
      task.bend(push, scratch.curvatures() + k * R, rate, adjoint, bends, wanted.support_weights());
    const scalar_t after = k + 1 < loop.steps ? loop.momentum[k + 1] : scalar_t{0};
    task.each(R, [&](int r) {
      scalar_t earlier = (1 - rate * pull + momentum) * adjoint[r] - after * later[r];
      if (second_order) {
        earlier += gram_product(scratch.gram(), bends, r, R);
        scratch.grad_base()[r] += bends[r];
      }
      later[r] = adjoint[r];
      adjoint[r] = earlier;
    });
  }
  task.team.sync();
  if (!second_order) return grad_fast;
  Fast start = task.combine(scratch.grad_base(), R);
  start.add(1, grad_fast);
  task.each(R * R, [&](int at) {
    const int r = at / R, j = at % R;
    scalar_t sum = 0;
    for (int k = 0; k < loop.steps; ++k) {
      const scalar_t *a = scratch.coefficients() + k * R, *h = scratch.bends() + k * R;
      sum += h[r] * a[j] + a[r] * h[j];
    }
    scratch.gram()[at] = sum;
  });
  task.team.sync();
  return start;
}

// X̄ of row r, in its group of lanes.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast gram_row(
    const TaskType& task, int r, const typename TaskType::Fast& grad_fast) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  const Scratch<scalar_t>& scratch = task.scratch;
  const int R = task.rows();
  Fast sum = Fast::zero();
  sum.add(scratch.grad_base()[r], task.start());
  sum.add(scratch.coefficients()[task.problem.loop.steps * R + r], grad_fast);
#pragma unroll 4
  for (int j = 0; j < R; ++j) {
    Fast other;
    task.columns.load(task.row(j), other);
    other.bias = 0;
    sum.add(scratch.gram()[r * R + j], other);
  }
  return sum;
}

}  // namespace metarec_fast::cuda
