#include "plain_form.h"

namespace metarec_fast::cpu {

namespace {

// The losses of single scores and of differences, and how a number of them moves a fast vector.
enum class Kind { kSquared, kSigmoid, kSoftmax };

Kind kind_of(Loss loss) {
  if (loss == Loss::kSquared) return Kind::kSquared;
  return loss == Loss::kSoftmax ? Kind::kSoftmax : Kind::kSigmoid;
}

// kWidth is layout.width where it is known when compiling, and 0 elsewhere.
template <int64_t kWidth, Kind kKind, typename scalar_t>
void forward(const Task<scalar_t>& given, Arena<scalar_t>& arena, PlainPath<scalar_t>& result) {
  const Task<scalar_t> task = given;  // where stores cannot change it
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = kWidth > 0 ? kWidth : task.layout.width;
  const int64_t R = padded<scalar_t>(task.size), K = task.loop.steps, P = width + kLane;
  const auto [adjoints, all_pushes, coefficients, all_curvatures, scores, shares] =
      arena.take_each((2 * K + 1) * P, K * R, 2 * K * R, K * R, R, R);
  const PlainPath<scalar_t> path = {R,          adjoints + K * P, adjoints,
                                    all_pushes, coefficients,     all_curvatures};
  result = path;
  const scalar_t mean = task.mean();
  for (int64_t r = 0; r < R; r += kLane) store(shares + r) = mean * load(task.weights + r);
  for (int64_t i = 0; i < P; i += kLane) store(path.fast + i) = load(task.start + i);
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    const scalar_t* now = path.fast + k * P;
    scalar_t *pushes = path.pushes + k * R, *curvatures = path.curvatures + k * R,
             *moves = path.coefficients + k * R;
    const scalar_t rate = task.loop.inner_lr[k];
    if constexpr (kKind == Kind::kSoftmax) {
      score_rows(task.rows, task.base, now, scores);
      differentiate(task, scores, pushes, curvatures);
      for (int64_t r = 0; r < R; r += kLane) store(moves + r) = -rate * load(pushes + r);
    } else {
      const scalar_t bias = task.rows.bias * now[width];
      each_dots<scalar_t, kWidth>(
          now, task.rows, [=](int64_t r, const Vector<scalar_t>& products) ALWAYS_INLINE_LAMBDA {
            // Sums that need not wait for the products; of a squared loss only p − y counts.
            const Vector<scalar_t> rest = bias + load(task.base + r),
                                   target = load(task.targets + r);
            constexpr bool kOnlyDifference = kKind == Kind::kSquared;
            Vector<scalar_t> push;
            differentiate_loss<VectorMath<scalar_t>>(
                kOnlyDifference ? Loss::kSquared : Loss::kLogistic,
                Vector<scalar_t>(load(shares + r)),
                Vector<scalar_t>(kOnlyDifference ? products : products + rest),
                Vector<scalar_t>(kOnlyDifference ? target - rest : target), push,
                store(curvatures + r));
            store(pushes + r) = push;
            store(moves + r) = -rate * push;
          });
    }
    combine<scalar_t, kWidth>(moves, task.rows, now, path.fast + (k + 1) * P);
  }
}

// The way back where λ stays the same: first order, and nothing but the last step is judged.
template <int64_t kWidth, typename scalar_t>
void first_order_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                         const PlainPath<scalar_t>& path, const scalar_t* last,
                         const TaskGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t R = path.entries, K = task.loop.steps, P = task.layout.stride;
  for (int64_t i = 0; i < P; i += kLane) store(grads.start + i) = load(last + i);
  std::fill(grads.base, grads.base + task.size, scalar_t{0});
  if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + task.size, scalar_t{0});
  if (K == 0 || !grads.inner_lr) return;
  scalar_t* along = arena.take(R);  // X λ
  dots<scalar_t, kWidth>(last, task.rows, task.rows.bias * last[task.layout.width], nullptr, along);
  Vector<scalar_t> lr_sum = {};  // −s̄
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t r = 0; r < R; r += kLane)
      lr_sum += load(path.pushes + k * R + r) * load(along + r);
    if (grads.inner_lr.stride == 0 && k < K - 1) continue;
    grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
    lr_sum = Vector<scalar_t>{};
  }
}

template <int64_t kWidth, typename scalar_t>
void adjoint(const Task<scalar_t>& given, Arena<scalar_t>& arena, const PlainPath<scalar_t>& taken,
             const scalar_t* grad_path, bool whole_path, const TaskGradients<scalar_t>& grads) {
  const Task<scalar_t> task = given;  // where stores cannot change it
  const PlainPath<scalar_t> path = taken;
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = kWidth > 0 ? kWidth : task.layout.width;
  const int64_t R = path.entries, K = task.loop.steps, P = width + kLane;
  const bool second_order = !task.loop.first_order, weighted = grads.weights != nullptr,
             softmax = kWidth == 0 && task.loop.loss == Loss::kSoftmax;
  const auto [along, base] = arena.take_each(R, R);  // X λ_{k+1}, Σ_k h_k
  for (int64_t r = 0; r < R; r += kLane) store(base + r) = Vector<scalar_t>{};
  if (weighted) std::fill(grads.weights, grads.weights + task.size, scalar_t{0});

  const scalar_t* last = whole_path ? grad_path + K * P : grad_path;
  scalar_t* end = K == 0 ? grads.start : path.adjoints + (K - 1) * P;
  for (int64_t i = 0; i < P; i += kLane) store(end + i) = load(last + i);
  Vector<scalar_t> lr_sum = {};  // −s̄
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t rate = task.loop.inner_lr[k];
    const scalar_t* push = path.pushes + k * R;
    const scalar_t* later = path.adjoints + k * P;                           // λ_{k+1}
    scalar_t* earlier = k == 0 ? grads.start : path.adjoints + (k - 1) * P;  // λ_k
    scalar_t* h = path.coefficients + (K + k) * R;
    const scalar_t* curvatures = path.curvatures + k * R;
    const scalar_t bias = task.rows.bias * later[width];
    each_dots<scalar_t, kWidth>(
        later, task.rows,
        [=, &lr_sum](int64_t r, const Vector<scalar_t>& products) ALWAYS_INLINE_LAMBDA {
          const Vector<scalar_t> sums = products + bias, bent = -rate * load(curvatures + r) * sums;
          lr_sum += load(push + r) * sums;
          if (softmax || weighted) store(along + r) = sums;
          if (softmax || !second_order) return;
          store(h + r) = bent;
          store(base + r) += bent;
        });
    if (grads.inner_lr && (grads.inner_lr.stride != 0 || k == 0)) {
      grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
      lr_sum = Vector<scalar_t>{};
    }
    if (second_order) {
      if (softmax) {
        bend(task, curvatures, rate, along, h);
        for (int64_t r = 0; r < R; r += kLane) store(base + r) += load(h + r);
      }
      if (weighted) add_weight_gradient(task, push, rate, along, grads.weights);
      combine<scalar_t, kWidth>(h, task.rows, later, earlier);
    } else {
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) = load(later + i);
    }
    if (whole_path)
      for (int64_t i = 0; i < P; i += kLane) store(earlier + i) += load(grad_path + k * P + i);
  }
  if (grads.base != nullptr) copy_out(base, task.size, grads.base);
  if (grads.rows != nullptr && second_order)
    write_rows<scalar_t, kWidth>(task.layout, {path.coefficients, 1, R}, task.size,
                                 Stack<scalar_t>{path.adjoints, P}, 2 * K, arena, grads.rows,
                                 task.layout.dim, grads.stream);
}

}  // namespace

template <typename scalar_t>
void plain_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, PlainPath<scalar_t>& path) {
  const Kind kind = kind_of(task.loop.loss);
  if (kind == Kind::kSoftmax) return forward<0, Kind::kSoftmax>(task, arena, path);
  with_width(task.layout, [&](auto width) {
    if (kind == Kind::kSquared)
      forward<width(), Kind::kSquared>(task, arena, path);
    else
      forward<width(), Kind::kSigmoid>(task, arena, path);
  });
}

template <typename scalar_t>
void plain_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                   const PlainPath<scalar_t>& path, const scalar_t* grad_path, bool whole_path,
                   const TaskGradients<scalar_t>& grads) {
  if (task.loop.first_order && !whole_path)
    return with_width(task.layout, [&](auto width) {
      first_order_adjoint<width()>(task, arena, path, grad_path, grads);
    });
  if (task.loop.loss == Loss::kSoftmax)
    return adjoint<0>(task, arena, path, grad_path, whole_path, grads);
  with_width(task.layout, [&](auto width) {
    adjoint<width()>(task, arena, path, grad_path, whole_path, grads);
  });
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
