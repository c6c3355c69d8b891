// The inner loop on the rows themselves, φ in registers:
//
//   φ_{k+1} = φ_k − s_k A ∘ [Xᵀ(w ∘ ℓ'(p_k))/(S + n0) + ρ (φ_k − φ_0)] + β_k (φ_k − φ_{k−1})
//
// and back, λ_K = φ̄, η_k = A ∘ λ_{k+1}:
//
//   h_k = −s_k w/(S + n0) ∘ H_k X η_k
//   λ_k = (1 + β_k − s_k ρ A) ∘ λ_{k+1} − β_{k+1} λ_{k+2} + Xᵀ h_k
//   X̄ = Σ_k h_k φ_kᵀ − s_k (w ∘ ℓ'(p_k))/(S + n0) η_kᵀ
#pragma once

#include "task.h"

namespace metarec_fast::cuda {

// φ_K. With `keep` the path is kept, for the way back.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast direct_forward(const TaskType& task, bool keep) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  const InnerLoop<scalar_t>& loop = task.problem.loop;
  const Scratch<scalar_t>& scratch = task.scratch;
  const int R = task.rows();
  Fast now = task.start(), before = now;
  if (keep) task.keep(now, scratch.path(), scratch.path_bias(), 0);
#pragma unroll 1
  for (int k = 0; k < loop.steps; ++k) {
    scalar_t* push = scratch.pushes() + (keep ? k * R : 0);
    task.dots(now, task.rows(),
              [&](int r, scalar_t product) { scratch.scores()[r] = scratch.base()[r] + product; });
    task.differentiate(scratch.scores(), push, scratch.curvatures() + (keep ? k * R : 0));
    Fast slope = task.combine(push, task.rows());

    const scalar_t rate = loop.inner_lr[k], momentum = task.momentum(k), pull = task.pull();
    if (pull != 0)
      slope.update([=](scalar_t g, scalar_t u, scalar_t start) { return g + pull * (u - start); },
                   now, task.start());
    if (task.scaled()) slope.update([](scalar_t g, scalar_t a) { return g * a; }, task.scale());
    Fast next = now;
    next.add(-rate, slope);
    if (momentum != 0)
      next.update([=](scalar_t u, scalar_t a, scalar_t b) { return u + momentum * (a - b); }, now,
                  before);
    before = now;
    now = next;
    if (keep) task.keep(now, scratch.path(), scratch.path_bias(), k + 1);
  }
  task.team.sync();
  return now;
}

// The way back, step by step: begins with λ_K = φ̄ and ends with φ̄_0; leaves h, η and, of every row,
// b̄ and w̄ in scratch, where there is a second order.
template <typename TaskType>
struct DirectAdjoint {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;

  const TaskType& task;
  const Record<TaskType>& record;
  const Wanted wanted;

  // λ_{k+1}, which is kept as η_k = A ∘ λ_{k+1}.
  __device__ __forceinline__ Fast kept_adjoint(int k) const {
    const Scratch<scalar_t>& scratch = task.scratch;
    Fast result = task.load_kept(scratch.directions(), scratch.direction_bias(), k);
    if (task.scaled())  // A is 0 only where there are no columns
      result.update([](scalar_t n, scalar_t a) { return a == 0 ? scalar_t{0} : n / a; },
                    task.scale());
    return result;
  }

  // From λ_{k+1} to λ_k.
  __device__ __forceinline__ void undo(int k, Fast& adjoint) const {
    const InnerLoop<scalar_t>& loop = task.problem.loop;
    const Scratch<scalar_t>& scratch = task.scratch;
    const int R = task.rows();
    const bool second_order = !loop.first_order;
    const scalar_t rate = loop.inner_lr[k], pull = task.pull();
    const scalar_t* push = scratch.pushes() + k * R;
    Fast direction = adjoint;
    if (task.scaled()) direction.update([](scalar_t l, scalar_t a) { return l * a; }, task.scale());
    task.keep(direction, scratch.directions(), scratch.direction_bias(), k);
    task.team.sync();  // `along` of the step before has been read
    if (second_order || wanted.inner_lr())
      task.dots(direction, task.rows(),
                [&](int r, scalar_t product) { scratch.along()[r] = product; });
    task.team.sync();
    book(k, rate, push, adjoint, direction);

    Fast earlier = Fast::zero();
    if (second_order) {
      scalar_t* bends = scratch.bends() + k * R;
      task.bend(push, scratch.curvatures() + k * R, rate, scratch.along(), bends,
                wanted.support_weights());
      earlier = task.combine(bends, task.rows());
    }
    earlier.add(1 + task.momentum(k), adjoint);
    if (task.pulled()) earlier.add(-rate * pull, direction);
    if (task.moves_on() && k + 1 < loop.steps)
      earlier.add(-loop.momentum[k + 1], kept_adjoint(k + 1));
    adjoint = earlier;
  }

  // From λ_0 to φ̄_0, and b̄ = Σ_k h_k.
  __device__ __forceinline__ void finish(Fast& adjoint) const {
    const InnerLoop<scalar_t>& loop = task.problem.loop;
    const Scratch<scalar_t>& scratch = task.scratch;
    const int R = task.rows();
    task.team.sync();
    if (task.moves_on() && loop.steps > 0) adjoint.add(-loop.momentum[0], kept_adjoint(0));
    if (task.pulled())  // Σ_k s_k ρ η_k
#pragma unroll 1
      for (int k = 0; k < loop.steps; ++k)
        adjoint.add(loop.inner_lr[k] * task.pull(),
                    task.load_kept(scratch.directions(), scratch.direction_bias(), k));
    if (!loop.first_order)
      task.each(task.rows(), [&](int r) {
        scalar_t sum = 0;
#pragma unroll 2
        for (int k = 0; k < loop.steps; ++k) sum += scratch.bends()[k * R + r];
        scratch.grad_base()[r] = sum;
      });
    task.team.sync();
  }

 private:
  // s̄, β̄, ρ̄ and Ā of step k.
  __device__ __forceinline__ void book(int k, scalar_t rate, const scalar_t* push,
                                       const Fast& adjoint, const Fast& direction) const {
    const Scratch<scalar_t>& scratch = task.scratch;
    if (!(wanted.inner_lr() || wanted.prior_pull() || wanted.momentum() || wanted.preconditioner()))
      return;
    const bool pulls = task.pulled();
    Fast moved = Fast::zero();  // φ_k − φ_0
    if (pulls) {
      moved = task.load_kept(scratch.path(), scratch.path_bias(), k);
      moved.add(-1, task.start());
    }
    const scalar_t pulled = pulls ? task.dot(direction, moved) : scalar_t{0};
    if (wanted.prior_pull()) record.add(record.at.pull(), -rate * pulled);
    if (wanted.inner_lr()) {
      scalar_t sum = 0;
      task.each(task.rows(), [&](int r) { sum += push[r] * scratch.along()[r]; });
      sum = task.team.sum(sum, scratch.partial());
      record.add(record.at.inner_lr() + k, -(sum + task.pull() * pulled));
    }
    if (wanted.momentum()) {
      Fast step = task.load_kept(scratch.path(), scratch.path_bias(), k);
      step.add(-1, task.load_kept(scratch.path(), scratch.path_bias(), k == 0 ? 0 : k - 1));
      record.add(record.at.momentum() + k, task.dot(adjoint, step));
    }
    if (wanted.preconditioner()) {  // Ā −= s_k λ ∘ g
      Fast slope = task.combine(push, task.rows());
      slope.add(task.pull(), moved);
      slope.update([=](scalar_t g, scalar_t l) { return -rate * l * g; }, adjoint);
      record.add_vector(record.at.scale(), slope);
    }
  }
};

// X̄ of row r, in its group of lanes.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast direct_row(const TaskType& task, int r) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  const Scratch<scalar_t>& scratch = task.scratch;
  const int R = task.rows(), width = task.columns.width();
  Fast sum = Fast::zero();
#pragma unroll 2
  for (int k = 0; k < task.problem.loop.steps; ++k) {
    Fast basis;
    task.columns.load(scratch.path() + k * width, basis);
    basis.bias = 0;
    sum.add(scratch.bends()[k * R + r], basis);
    task.columns.load(scratch.directions() + k * width, basis);
    sum.add(-task.problem.loop.inner_lr[k] * scratch.pushes()[k * R + r], basis);
  }
  return sum;
}

}  // namespace metarec_fast::cuda
