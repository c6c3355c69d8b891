#include "plain_form.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
void plain_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, PlainPath<scalar_t>& path) {
  const Rows<scalar_t> rows = task.rows;
  const int64_t R = padded<scalar_t>(task.size), K = task.loop.steps, P = task.layout.stride;
  constexpr int64_t kLane = kLanes<scalar_t>;
  path.entries = R;
  path.adjoints = arena.take((2 * K + 1) * P);
  path.fast = path.adjoints + K * P;
  path.pushes = arena.take(K * R);
  path.coefficients = arena.take(2 * K * R);
  path.curvatures = arena.take(K * R);
  scalar_t* scores = arena.take(R);
  const scalar_t* base = task.base;
  const int64_t width = task.layout.width;
  const bool softmax = task.loop.loss == Loss::kSoftmax;
  for (int64_t i = 0; i < P; i += kLane) store(path.fast + i) = load(task.start + i);
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    const scalar_t* now = path.fast + k * P;
    scalar_t *pushes = path.pushes + k * R, *curvatures = path.curvatures + k * R,
             *moves = path.coefficients + k * R;
    const scalar_t rate = task.loop.inner_lr[k];
    if (softmax) {
      score_rows(rows, task.base, now, scores);
      differentiate(task, scores, pushes, curvatures);
      for (int64_t r = 0; r < R; r += kLane) store(moves + r) = -rate * load(pushes + r);
    } else {
      const scalar_t bias = rows.bias * now[width];
      each_dots(now, rows, [&](int64_t r, const Vector<scalar_t>& products) ALWAYS_INLINE_LAMBDA {
        Vector<scalar_t> push;
        differentiate_points<scalar_t>(task, r, products + bias + load(base + r), push,
                                       store(curvatures + r));
        store(pushes + r) = push;
        store(moves + r) = -rate * push;
      });
    }
    combine(moves, rows, now, path.fast + (k + 1) * P);
  }
}

template <typename scalar_t>
void plain_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                   const PlainPath<scalar_t>& path, const scalar_t* grad_path, bool whole_path,
                   const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t> layout = task.layout;
  const Rows<scalar_t> rows = task.rows;
  const int64_t R = path.entries, K = task.loop.steps, P = layout.stride, width = layout.width;
  constexpr int64_t kLane = kLanes<scalar_t>;
  const bool second_order = !task.loop.first_order, softmax = task.loop.loss == Loss::kSoftmax;
  scalar_t* along = arena.take(R);       // X λ_{k+1}
  scalar_t* base = arena.take_zeros(R);  // Σ_k h_k
  if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + task.size, scalar_t{0});

  const scalar_t* last = whole_path ? grad_path + K * P : grad_path;
  for (int64_t i = 0; i < P; i += kLane)
    store(K == 0 ? grads.start + i : path.adjoints + (K - 1) * P + i) = load(last + i);
  Vector<scalar_t> lr_sum = {};  // −s̄
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t rate = task.loop.inner_lr[k];
    const scalar_t* push = path.pushes + k * R;
    const scalar_t* adjoint = path.adjoints + k * P;
    scalar_t* earlier = k == 0 ? grads.start : path.adjoints + (k - 1) * P;  // λ_k
    scalar_t* h = path.coefficients + (K + k) * R;
    const scalar_t* curvatures = path.curvatures + k * R;
    if (second_order || whole_path || k == K - 1) {
      const scalar_t bias = rows.bias * adjoint[width];
      each_dots(adjoint, rows,
                [&](int64_t r, const Vector<scalar_t>& products) ALWAYS_INLINE_LAMBDA {
                  const Vector<scalar_t> sums = products + bias;
                  store(along + r) = sums;
                  store(h + r) = -rate * load(curvatures + r) * sums;
                });
    }
    for (int64_t r = 0; r < R; r += kLane) lr_sum += load(push + r) * load(along + r);
    if (grads.inner_lr && (grads.inner_lr.stride != 0 || k == 0)) {
      grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
      lr_sum = Vector<scalar_t>{};
    }
    if (second_order) {
      if (softmax) bend(task, curvatures, rate, along, h);
      if (grads.weights != nullptr) add_weight_gradient(task, push, rate, along, grads.weights);
      for (int64_t r = 0; r < R; r += kLane) store(base + r) += load(h + r);
      combine(h, rows, adjoint, earlier);
    } else {
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) = load(adjoint + i);
    }
    if (whole_path)
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) += load(grad_path + k * P + i);
  }
  if (grads.base != nullptr) copy_out(base, task.size, grads.base);
  if (grads.rows != nullptr && second_order)
    write_rows<scalar_t>(layout, {path.coefficients, 1, R}, task.size,
                         Stack<scalar_t>{path.adjoints, P}, 2 * K, arena, grads.rows, layout.dim,
                         grads.stream);
}

template void plain_forward<float>(const Task<float>& task, Arena<float>& arena,
                                   PlainPath<float>& path);
template void plain_forward<double>(const Task<double>& task, Arena<double>& arena,
                                    PlainPath<double>& path);
template void plain_adjoint<float>(const Task<float>& task, Arena<float>& arena,
                                   const PlainPath<float>& path, const float* grad_path,
                                   bool whole_path, const TaskGradients<float>& grads);
template void plain_adjoint<double>(const Task<double>& task, Arena<double>& arena,
                                    const PlainPath<double>& path, const double* grad_path,
                                    bool whole_path, const TaskGradients<double>& grads);

}  // namespace metarec_fast::cpu
