#include "step_form.h"

#include "normal_equations.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
void step_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, bool normal,
                  StepPath<scalar_t>& path) {
  const Layout<scalar_t> layout = task.layout;
  const Rows<scalar_t> rows = task.rows;
  const scalar_t *start = task.start, *scale = task.scale, *base = task.base;
  const int64_t R = padded<scalar_t>(task.size), K = task.loop.steps, P = layout.stride;
  constexpr int64_t kLane = kLanes<scalar_t>;
  path.normal = normal;
  path.entries = R;
  path.fast = arena.take((K + 1) * P);
  path.slopes = arena.take(K * P);
  path.pushes = arena.take(K * R);
  path.curvatures = arena.take(K * R);
  scalar_t* scores = arena.take(R);
  scalar_t *target = nullptr, *moved = nullptr;  // v, φ − φ_0
  for (int64_t i = 0; i < P; i += kLane) store(path.fast + i) = load(start + i);
  if (normal) {
    scalar_t* matrix = arena.take((layout.width + 1) * P);
    target = arena.take(P);
    moved = arena.take(P);
    normal_equations(task, arena, matrix, target);
    path.matrix = rows_of<scalar_t>({matrix, P}, layout.width + 1, P, 0, arena);
  }

  const scalar_t pull = task.pull();
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    const scalar_t* now = path.fast + k * P;
    const scalar_t* before = k == 0 ? now : now - P;
    scalar_t* next = path.fast + (k + 1) * P;
    scalar_t* slope = path.slopes + k * P;
    if (normal) {
      for (int64_t i = 0; i < P; i += kLane) store(moved + i) = load(now + i) - load(start + i);
      dots<scalar_t>(moved, path.matrix, 0, nullptr, slope);
      const scalar_t twice = 2 * task.mean();
      for (int64_t i = 0; i < P; i += kLane)
        store(slope + i) = twice * (load(slope + i) - load(target + i));
    } else {
      scalar_t* push = path.pushes + k * R;
      score_rows(rows, base, now, scores);
      differentiate(task, scores, push, path.curvatures + k * R);
      combine<scalar_t>(push, rows, nullptr, slope);
    }
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    for (int64_t i = 0; i < P; i += kLane) {
      store(slope + i) += pull * (load(now + i) - load(start + i));
      store(next + i) = load(now + i) - rate * load(scale + i) * load(slope + i) +
                        momentum * (load(now + i) - load(before + i));
    }
  }
}

template <typename scalar_t>
void step_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                  const StepPath<scalar_t>& path,
                  const scalar_t* grad_path,  // φ̄_0 … φ̄_K of the outer loss, or
                  bool whole_path,            // only φ̄_K [layout.stride]
                  const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t> layout = task.layout;
  const Rows<scalar_t> rows = task.rows;
  const scalar_t *task_start = task.start, *scale = task.scale;
  const int64_t R = path.entries, K = task.loop.steps, P = layout.stride;
  constexpr int64_t kLane = kLanes<scalar_t>;
  const bool second_order = !task.loop.first_order;
  const scalar_t pull = task.pull();
  // X̄ = Σ_j C[r, j] basis[j] over  φ_0 … φ_{K−1}, η_0 … η_{K−1}  with η_k = A ∘ λ_{k+1}.
  scalar_t* basis = arena.take(2 * K * P);
  scalar_t* directions = basis + K * P;            // η
  scalar_t* coefficients = arena.take(2 * K * R);  // [2K, R]: h_k, then −s_k w ∘ ℓ'/(S + n0)
  scalar_t* adjoint = arena.take(P);               // λ_{k+1}
  scalar_t* later = arena.take_zeros(P);           // λ_{k+2}
  scalar_t* earlier = arena.take(P);               // λ_k
  scalar_t* restart = arena.take_zeros(P);         // Σ_k s_k ρ A ∘ λ_{k+1}
  scalar_t* along = arena.take(K * R);             // X η_k
  const scalar_t* last = whole_path ? grad_path + K * P : grad_path;
  for (int64_t i = 0; i < K * P; i += kLane) store(basis + i) = load(path.fast + i);
  for (int64_t i = 0; i < P; i += kLane) store(adjoint + i) = load(last + i);

  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t* now = path.fast + k * P;
    const scalar_t* before = k == 0 ? now : now - P;
    const scalar_t* slope = path.slopes + k * P;
    scalar_t* direction = directions + k * P;
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    Vector<scalar_t> lr_sum = {};
    for (int64_t i = 0; i < P; i += kLane) {
      store(direction + i) = load(scale + i) * load(adjoint + i);
      lr_sum += load(direction + i) * load(slope + i);
    }
    if (grads.inner_lr) grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
    if (grads.scale != nullptr)
      for (int64_t i = 0; i < P; i += kLane)
        store(grads.scale + i) -= rate * load(adjoint + i) * load(slope + i);
    if (grads.prior_pull) {
      Vector<scalar_t> sum = {};
      for (int64_t i = 0; i < P; i += kLane)
        sum += load(direction + i) * (load(now + i) - load(task_start + i));
      grads.prior_pull.add(task.index, -rate * sum_lanes<scalar_t>(sum));
    }
    if (grads.momentum) {
      Vector<scalar_t> sum = {};
      for (int64_t i = 0; i < P; i += kLane)
        sum += load(adjoint + i) * (load(now + i) - load(before + i));
      grads.momentum.add(k, sum_lanes<scalar_t>(sum));
    }

    if (second_order && path.normal) {
      dots<scalar_t>(direction, path.matrix, 0, nullptr, earlier);
      const scalar_t factor = -2 * task.mean() * rate;
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) *= factor;
    } else if (second_order) {
      scalar_t* h = coefficients + k * R;
      dots<scalar_t>(direction, rows, rows.bias * direction[layout.width], nullptr, along + k * R);
      bend(task, path.curvatures + k * R, rate, along + k * R, h);
      combine<scalar_t>(h, rows, nullptr, earlier);
    } else {
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) = Vector<scalar_t>{};
    }
    const scalar_t momentum_after = k + 1 < K ? task.loop.momentum[k + 1] : scalar_t{0};
    for (int64_t i = 0; i < P; i += kLane) {
      store(earlier + i) += (1 + momentum) * load(adjoint + i) - rate * pull * load(direction + i) -
                            momentum_after * load(later + i);
      store(restart + i) += rate * pull * load(direction + i);
    }
    if (whole_path)
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) += load(grad_path + k * P + i);
    std::swap(later, adjoint);  // later ← λ_{k+1}
    std::swap(adjoint, earlier);
  }
  const scalar_t first_momentum = K > 0 ? task.loop.momentum[0] : scalar_t{0};
  for (int64_t i = 0; i < P; i += kLane)
    store(grads.start + i) =
        load(adjoint + i) - first_momentum * load(later + i) + load(restart + i);

  if (!second_order) {
    if (grads.base != nullptr) std::fill(grads.base, grads.base + task.size, scalar_t{0});
    if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + task.size, scalar_t{0});
    return;
  }
  if (path.normal)
    // The rows were not touched on the way: now Xη_k and p_k, all at once.
    for (int64_t k = 0; k < K; ++k) {
      scalar_t* push = path.pushes + k * R;
      const scalar_t* direction = directions + k * P;
      dots<scalar_t>(direction, rows, rows.bias * direction[layout.width], nullptr, along + k * R);
      score_rows(rows, task.base, path.fast + k * P, push);
      differentiate(task, push, push, path.curvatures + k * R);
      bend(task, path.curvatures + k * R, task.loop.inner_lr[k], along + k * R,
           coefficients + k * R);
    }
  scalar_t* base = arena.take_zeros(R);  // Σ_k h_k
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < R; i += kLane) {
      store(base + i) += load(coefficients + k * R + i);
      store(coefficients + (K + k) * R + i) =
          -task.loop.inner_lr[k] * load(path.pushes + k * R + i);
    }
  if (grads.weights != nullptr) {
    std::fill(grads.weights, grads.weights + task.size, scalar_t{0});
    for (int64_t k = 0; k < K; ++k)
      add_weight_gradient(task, path.pushes + k * R, task.loop.inner_lr[k], along + k * R,
                          grads.weights);
  }
  if (grads.base != nullptr) copy_out(base, task.size, grads.base);
  if (grads.rows != nullptr)
    write_rows<scalar_t>(layout, {coefficients, 1, R}, task.size, Stack<scalar_t>{basis, P}, 2 * K,
                         arena, grads.rows, layout.dim, grads.stream);
}

template void step_forward<float>(const Task<float>& task, Arena<float>& arena, bool normal,
                                  StepPath<float>& path);
template void step_forward<double>(const Task<double>& task, Arena<double>& arena, bool normal,
                                   StepPath<double>& path);
template void step_adjoint<float>(const Task<float>& task, Arena<float>& arena,
                                  const StepPath<float>& path, const float* grad_path,
                                  bool whole_path, const TaskGradients<float>& grads);
template void step_adjoint<double>(const Task<double>& task, Arena<double>& arena,
                                   const StepPath<double>& path, const double* grad_path,
                                   bool whole_path, const TaskGradients<double>& grads);

}  // namespace metarec_fast::cpu
