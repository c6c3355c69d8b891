// The limit of many steps on the squared loss, λ = ρ (S + n0)/2:
//
//   (λ W⁻¹ + X Xᵀ) a = y − p_0,   φ = φ_0 + Xᵀ a          where S ≤ D + 1, otherwise
//   (Xᵀ W X + λ I) (φ − φ_0) = Xᵀ W (y − p_0)
//
// and back:  v = (λ W⁻¹ + X Xᵀ)⁻¹ X φ̄ = W X (Xᵀ W X + λ I)⁻¹ φ̄,
//   p̄_0 = −v,  X̄ = a (φ̄ − Xᵀ v)ᵀ − v φᵀ,  φ̄_0 = φ̄ − Xᵀ v,  w̄ = λ v a/w²,  λ̄ = −Σ v a/w
#pragma once

#include "task.h"

namespace metarec_fast::cuda {

// A ← L with A = L Lᵀ, the lower half of [n, n], column by column.
template <typename scalar_t>
__device__ void cholesky(const Team& team, scalar_t* matrix, int n) {
  for (int j = 0; j < n; ++j) {
    team.sync();
    const scalar_t pivot = std::sqrt(matrix[j * n + j]);
    team.sync();
    for (int i = j + team.thread(); i < n; i += team.size())
      matrix[i * n + j] = i == j ? pivot : matrix[i * n + j] / pivot;
    team.sync();
    const int below = n - j - 1;
    for (int at = team.thread(); at < below * below; at += team.size()) {
      const int i = j + 1 + at / below, k = j + 1 + at % below;
      if (k <= i) matrix[i * n + k] -= matrix[i * n + j] * matrix[k * n + j];
    }
  }
  team.sync();
}

// x ← (L Lᵀ)⁻¹ x
template <typename scalar_t>
__device__ void cholesky_solve(const Team& team, const scalar_t* factor, int n, scalar_t* x) {
  for (int pass = 0; pass < 2; ++pass)
    for (int step = 0; step < n; ++step) {
      const int i = pass == 0 ? step : n - 1 - step;
      team.sync();
      const scalar_t solved = x[i] / factor[i * n + i];
      team.sync();
      if (team.leads()) x[i] = solved;
      const int first = pass == 0 ? i + 1 : 0, last = pass == 0 ? n : i;
      for (int k = first + team.thread(); k < last; k += team.size())
        x[k] -= solved * (pass == 0 ? factor[k * n + i] : factor[i * n + k]);
    }
  team.sync();
}

template <typename TaskType>
struct ExactForm {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;

  const TaskType& task;
  const Scratch<scalar_t>& scratch;
  const int S, n;
  const scalar_t ridge;  // λ

  __device__ __forceinline__ explicit ExactForm(const TaskType& task_in)
      : task(task_in),
        scratch(task_in.scratch),
        S(task_in.rows()),
        n(S <= task_in.problem.shape.dim + 1 ? S : task_in.problem.shape.dim + 1),
        ridge(positive(task_in.pull() *
                       (static_cast<scalar_t>(S) + task_in.problem.loop.extra_count) / 2)) {}

  // ρ ≤ 0 has no solution that could be relied on: the result is not a number.
  __device__ __forceinline__ static scalar_t positive(scalar_t value) {
    return value > 0 ? value : static_cast<scalar_t>(NAN);
  }

  __device__ __forceinline__ bool dual_system() const { return n == S; }

  // A vector between the lanes and `solved` [D + 1], the bias last.
  __device__ __forceinline__ void put(const Fast& vector) const {
    task.team.sync();
    if (task.team.warp == 0 && task.columns.group == 0) {
      task.columns.store_row(vector, /*packed=*/false, scratch.solved());
      if (task.columns.lane == 0) scratch.solved()[task.problem.shape.dim] = vector.bias;
    }
    task.team.sync();
  }
  __device__ __forceinline__ Fast get() const {
    Fast result;
    task.columns.load_row(scratch.solved(), /*packed=*/false, result);
    result.bias = scratch.solved()[task.problem.shape.dim];
    return result;
  }

  // Entry i of row r, a 1 appended.
  __device__ __forceinline__ scalar_t entry(int r, int i) const {
    return i == task.problem.shape.dim ? scalar_t{1} : task.row(r)[i];
  }

  __device__ __forceinline__ Fast forward() const {
    const Team& team = task.team;
    scalar_t* residuals = scratch.along();  // y − p_0
    task.dots(task.start(), S, [&](int s, scalar_t product) {
      residuals[s] = scratch.targets()[s] - (scratch.base()[s] + product);
    });
    Fast fast;
    if (dual_system()) {
      for (int j = 0; j < S; ++j) {
        Fast other;
        task.columns.load(task.row(j), other);
        other.bias = 1;
        task.dots(other, S, [&](int s, scalar_t product) {
          scratch.matrix()[s * S + j] = product + (s == j ? ridge / scratch.weights()[s] : 0);
        });
      }
      team.sync();
      task.each(S, [&](int s) { scratch.dual()[s] = residuals[s]; });
      cholesky(team, scratch.matrix(), S);
      cholesky_solve(team, scratch.matrix(), S, scratch.dual());
      fast = task.combine(scratch.dual(), S);
    } else {
      team.sync();
      for (int at = team.thread(); at < n * n; at += team.size()) {
        const int i = at / n, j = at % n;
        scalar_t sum = i == j ? ridge : 0;
        for (int s = 0; s < S; ++s) sum += scratch.weights()[s] * entry(s, i) * entry(s, j);
        scratch.matrix()[at] = sum;
      }
      task.each(S, [&](int s) { scratch.dual()[s] = scratch.weights()[s] * residuals[s]; });
      cholesky(team, scratch.matrix(), n);
      put(task.combine(scratch.dual(), S));
      cholesky_solve(team, scratch.matrix(), n, scratch.solved());
      fast = get();
      task.dots(fast, S, [&](int s, scalar_t product) {  // a = W (y − p)/λ
        scratch.dual()[s] = scratch.weights()[s] / ridge * (residuals[s] - product);
      });
      team.sync();
    }
    fast.add(1, task.start());
    return fast;
  }

  // From φ̄ to φ̄_0; leaves v in `along` and, of every row, b̄ and w̄ in scratch.
  __device__ __forceinline__ Fast adjoint(const Record<TaskType>& record, Wanted wanted,
                                          const Fast& grad_fast) const {
    const Team& team = task.team;
    scalar_t* v = scratch.along();
    if (dual_system()) {
      task.dots(grad_fast, S, [&](int s, scalar_t product) { v[s] = product; });
      cholesky_solve(team, scratch.matrix(), S, v);
    } else {
      put(grad_fast);
      cholesky_solve(team, scratch.matrix(), n, scratch.solved());
      task.dots(get(), S, [&](int s, scalar_t product) { v[s] = scratch.weights()[s] * product; });
      team.sync();
    }
    Fast start = grad_fast;
    start.add(-1, task.combine(v, S));
    scalar_t grad_ridge = 0;
    task.each(S, [&](int s) {
      const scalar_t share = v[s] * scratch.dual()[s] / scratch.weights()[s];
      grad_ridge -= share;
      scratch.grad_base()[s] = -v[s];
      scratch.grad_weights()[s] = ridge * share / scratch.weights()[s];
    });
    if (wanted.prior_pull())
      record.add(record.at.pull(), team.sum(grad_ridge, scratch.partial()) *
                                       (static_cast<scalar_t>(S) + task.problem.loop.extra_count) /
                                       2);
    team.sync();
    return start;
  }

  // X̄ of row r, in its group of lanes.
  __device__ __forceinline__ Fast row(int r, const Fast& fast, const Fast& grad_start) const {
    Fast sum = Fast::zero();
    sum.add(scratch.dual()[r], grad_start);
    sum.add(-scratch.along()[r], fast);
    return sum;
  }
};

}  // namespace metarec_fast::cuda
