#include "gram_form.h"

#include "matrix.h"

namespace metarec_fast::cpu {
namespace {

// Calls sink(i, …) with each register of G x, G symmetric; four rows apart, four chains of
// additions.
template <typename scalar_t, typename Sink>
ALWAYS_INLINE void each_of_gram(const GramPath<scalar_t>& path, int64_t size, const scalar_t* x,
                                const Sink& sink) {
  constexpr int64_t kChains = 4;
  const int64_t stride = path.stride;
  const scalar_t* gram = path.gram;
  for (int64_t i = 0; i < stride; i += kLanes<scalar_t>) {
    Vector<scalar_t> sums[kChains] = {};
    int64_t j = 0;
    for (; j + kChains <= size; j += kChains)
      for (int64_t c = 0; c < kChains; ++c) sums[c] += x[j + c] * load(gram + (j + c) * stride + i);
    for (; j < size; ++j) sums[0] += x[j] * load(gram + j * stride + i);
    sink(i, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// result [size, result_stride] = Σ_k h_k a_kᵀ + a_k h_kᵀ, symmetric: all 2K products, or where
// these are many, half of them and their transpose.
template <typename scalar_t>
void symmetric_sum(const Stack<scalar_t>& h, const Stack<scalar_t>& a, int64_t count, int64_t size,
                   Arena<scalar_t>& arena, scalar_t* result, int64_t result_stride) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t stride = h.stride, numbers = count * stride;
  if (count <= size) {
    // (h_0 … h_{K−1}, a_0 … a_{K−1}) times (a_0 … a_{K−1}, h_0 … h_{K−1})
    scalar_t *left = arena.take(2 * numbers), *right = arena.take(2 * numbers);
    for (int64_t i = 0; i < numbers; i += kLane) {
      store(left + i) = store(right + numbers + i) = load(h.values + i);
      store(left + numbers + i) = store(right + i) = load(a.values + i);
    }
    multiply<scalar_t>({left, 1, stride}, size, Stack<scalar_t>{right, stride}, 2 * count, stride,
                       result, result_stride);
    return;
  }
  scalar_t* transposed = arena.take(stride * stride);
  multiply<scalar_t>({h.values, 1, stride}, size, a, count, stride, result, result_stride);
  transpose(result, result_stride, size, size, transposed, stride);
  for (int64_t r = 0; r < size; ++r)
    for (int64_t j = 0; j < stride; j += kLane)
      store(result + r * result_stride + j) += load(transposed + r * stride + j);
}

}  // namespace

template <typename scalar_t>
void gram_forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, GramPath<scalar_t>& path,
                  scalar_t* fast) {
  const int64_t R = task.size, K = task.loop.steps, stride = padded<scalar_t>(R);
  const int64_t width = task.layout.width;
  constexpr int64_t kLane = kLanes<scalar_t>;
  path.stride = stride;
  path.scaled = task.rows;
  scalar_t bias_square = task.rows.bias * task.rows.bias;
  if (task.loop.preconditioner != nullptr) {
    scalar_t* scaled = arena.take(R * width);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = 0; i < width; i += kLane)
        store(scaled + r * width + i) = load(task.scale + i) * load(task.rows[r] + i);
    path.scaled =
        rows_of<scalar_t>({scaled, width}, R, width, task.rows.bias * task.scale[width], arena);
    bias_square *= task.scale[width];
  }
  path.gram = arena.take((R + 3) / 4 * 4 * stride);
  path.coefficients = arena.take((K + 1) * stride);
  path.pushes = arena.take(K * stride);
  path.curvatures = arena.take(K * stride);
  scalar_t* first_scores = arena.take(stride);
  scalar_t* scores = arena.take(stride);

  score_rows(task.rows, task.base, task.start, first_scores);
  symmetric_products(path.scaled, task.rows, bias_square, path.gram, stride);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t j = R; j < stride; ++j) path.gram[r * stride + j] = 0;

  for (int64_t i = 0; i < stride; i += kLane) store(path.coefficients + i) = Vector<scalar_t>{};
  const bool plain = task.loop.plain();
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    const scalar_t* now = path.coefficients + k * stride;
    const scalar_t* before = k == 0 ? now : now - stride;
    scalar_t* next = path.coefficients + (k + 1) * stride;
    scalar_t* push = path.pushes + k * stride;
    scalar_t* curvatures = path.curvatures + k * stride;
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    const scalar_t keep = 1 - rate * task.pull() + momentum;
    const auto advance = [=](int64_t i, const Vector<scalar_t>& slope) ALWAYS_INLINE_LAMBDA {
      if (plain)
        store(next + i) = load(now + i) - rate * slope;
      else
        store(next + i) = keep * load(now + i) - rate * slope - momentum * load(before + i);
    };
    if (task.loop.loss == Loss::kSoftmax) {
      each_of_gram(path, R, now, [=](int64_t i, const Vector<scalar_t>& products) {
        store(scores + i) = products + load(first_scores + i);
      });
      differentiate(task, scores, push, curvatures);
      for (int64_t i = 0; i < stride; i += kLane) advance(i, load(push + i));
    } else {
      each_of_gram(path, R, now, [&](int64_t i, const Vector<scalar_t>& products) {
        Vector<scalar_t> slope;
        differentiate_points<scalar_t>(task, i, products + load(first_scores + i), slope,
                                       store(curvatures + i));
        store(push + i) = slope;
        advance(i, slope);
      });
    }
  }

  combine(path.coefficients + K * stride, path.scaled, task.start, fast);
}

template <typename scalar_t>
void gram_adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                  const GramPath<scalar_t>& path,
                  const scalar_t* grad_fast,  // φ̄ [layout.stride]
                  const TaskGradients<scalar_t>& grads) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t R = task.size, K = task.loop.steps, stride = path.stride, width = layout.width;
  constexpr int64_t kLane = kLanes<scalar_t>;
  const bool second_order = !task.loop.first_order;
  scalar_t* adjoint = arena.take(stride);        // ā_{k+1}
  scalar_t* later = arena.take_zeros(stride);    // ā_{k+2}
  scalar_t* earlier = arena.take_zeros(stride);  // ā_k
  scalar_t* bends = arena.take(K * stride);      // h_k
  scalar_t* grad_base = arena.take_zeros(stride);
  if (grads.weights != nullptr) std::fill(grads.weights, grads.weights + R, scalar_t{0});

  dots<scalar_t>(grad_fast, path.scaled, path.scaled.bias * grad_fast[width], nullptr, adjoint);
  const bool plain = task.loop.plain();
  Vector<scalar_t> lr_sum = {};  // −s̄
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t* now = path.coefficients + k * stride;
    const scalar_t* before = k == 0 ? now : now - stride;
    const scalar_t* push = path.pushes + k * stride;
    const scalar_t rate = task.loop.inner_lr[k], momentum = task.loop.momentum[k];
    const scalar_t pull = task.pull();
    if (grads.inner_lr) {
      for (int64_t i = 0; i < stride; i += kLane)
        lr_sum += load(adjoint + i) * (load(push + i) + pull * load(now + i));
      if (grads.inner_lr.stride != 0 || k == 0) {
        grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
        lr_sum = Vector<scalar_t>{};
      }
    }
    if (grads.prior_pull) {
      Vector<scalar_t> sum = {};
      for (int64_t i = 0; i < stride; i += kLane) sum += load(adjoint + i) * load(now + i);
      grads.prior_pull.add(task.index, -rate * sum_lanes<scalar_t>(sum));
    }
    if (grads.momentum) {
      Vector<scalar_t> sum = {};
      for (int64_t i = 0; i < stride; i += kLane)
        sum += load(adjoint + i) * (load(now + i) - load(before + i));
      grads.momentum.add(k, sum_lanes<scalar_t>(sum));
    }

    const scalar_t keep = 1 - rate * pull + momentum;
    const scalar_t momentum_after = k + 1 < K ? task.loop.momentum[k + 1] : scalar_t{0};
    const auto go_back = [=](int64_t i, const Vector<scalar_t>& bent) ALWAYS_INLINE_LAMBDA {
      if (plain)
        store(earlier + i) = bent + load(adjoint + i);
      else
        store(earlier + i) = bent + keep * load(adjoint + i) - momentum_after * load(later + i);
    };
    if (second_order) {
      scalar_t* h = bends + k * stride;
      bend(task, path.curvatures + k * stride, rate, adjoint, h);
      for (int64_t i = 0; i < stride; i += kLane) store(grad_base + i) += load(h + i);
      if (grads.weights != nullptr) add_weight_gradient(task, push, rate, adjoint, grads.weights);
      each_of_gram(path, R, h, go_back);
    } else {
      for (int64_t i = 0; i < stride; i += kLane) go_back(i, Vector<scalar_t>{});
    }
    std::swap(later, adjoint);  // later ← ā_{k+1}
    std::swap(adjoint, earlier);
  }

  combine(grad_base, task.rows, grad_fast, grads.start);
  if (grads.base != nullptr) copy_out(grad_base, R, grads.base);
  const scalar_t* last = path.coefficients + K * stride;

  // X̄ = C X diag(A) + p̄ φ_0ᵀ + a_K (A ∘ φ̄)ᵀ,  C = Ḡ + Ḡᵀ = Σ_k h_k a_kᵀ + a_k h_kᵀ
  const bool wants_rows = grads.rows != nullptr && second_order;
  if (grads.scale != nullptr) {  // Ā = φ̄ ∘ Xᵀ a_K + diag(Xᵀ Ḡ X)
    scalar_t* row = arena.take(layout.stride);
    scalar_t* grad_gram = arena.take_zeros(R * stride);  // Ḡ
    if (second_order)
      multiply<scalar_t>({bends, 1, stride}, R, Stack<scalar_t>{path.coefficients, stride}, K,
                         stride, grad_gram, stride);
    combine<scalar_t>(last, task.rows, nullptr, row);
    for (int64_t i = 0; i < layout.stride; i += kLane)
      store(grads.scale + i) += load(grad_fast + i) * load(row + i);
    for (int64_t r = 0; r < R; ++r) {
      combine<scalar_t>(grad_gram + r * stride, task.rows, nullptr, row);
      for (int64_t i = 0; i < width; i += kLane)
        store(grads.scale + i) += load(task.rows[r] + i) * load(row + i);
      grads.scale[width] += task.rows.bias * row[width];
    }
  }
  if (!wants_rows) return;
  scalar_t* direction = arena.take(width);  // A ∘ φ̄
  for (int64_t i = 0; i < width; i += kLane)
    store(direction + i) = load(task.scale + i) * load(grad_fast + i);
  const scalar_t** basis = take_addresses<scalar_t>(arena, R + 2);
  std::copy_n(path.scaled.at, R, basis);
  basis[R] = task.start;
  basis[R + 1] = direction;
  const int64_t columns = stride + kLane;
  scalar_t* coefficients = arena.take(R * columns);
  symmetric_sum<scalar_t>({bends, stride}, {path.coefficients, stride}, K, R, arena, coefficients,
                          columns);
  for (int64_t r = 0; r < R; ++r) {
    coefficients[r * columns + R] = grad_base[r];
    coefficients[r * columns + R + 1] = last[r];
  }
  write_rows<scalar_t>(layout, {coefficients, columns, 1}, R, basis, R + 2, arena, grads.rows,
                       layout.dim, grads.stream);
}

template void gram_forward<float>(const Task<float>& task, Arena<float>& arena,
                                  GramPath<float>& path, float* fast);
template void gram_forward<double>(const Task<double>& task, Arena<double>& arena,
                                   GramPath<double>& path, double* fast);
template void gram_adjoint<float>(const Task<float>& task, Arena<float>& arena,
                                  const GramPath<float>& path, const float* grad_fast,
                                  const TaskGradients<float>& grads);
template void gram_adjoint<double>(const Task<double>& task, Arena<double>& arena,
                                   const GramPath<double>& path, const double* grad_fast,
                                   const TaskGradients<double>& grads);

}  // namespace metarec_fast::cpu
