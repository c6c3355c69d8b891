#include "factored_form.h"

namespace metarec_fast::cpu {
namespace {

// result += Σ_j coefficients[j] factors[j], j < count, numbers of items.
template <typename scalar_t>
ALWAYS_INLINE void add_factors(const scalar_t* coefficients, int64_t coefficient_stride,
                               const scalar_t* factors, int64_t count, int64_t stride,
                               scalar_t* result) {
  for (int64_t j = 0; j < count; ++j) {
    const scalar_t coefficient = coefficients[j * coefficient_stride];
    for (int64_t i = 0; i < stride; i += kLanes<scalar_t>)
      store(result + i) += coefficient * load(factors + j * stride + i);
  }
}

// result[j] = factors[j] · vector, j < count, over numbers of items.
template <typename scalar_t>
ALWAYS_INLINE void factor_products(const scalar_t* factors, int64_t count, const scalar_t* vector,
                                   int64_t stride, scalar_t* result) {
  for (int64_t j = 0; j < count; ++j) result[j] = dot(factors + j * stride, vector, stride);
}

// products[j] = left · row_j of X and of the first `vectors` vectors after it.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void dot_rows(const scalar_t* left, const FactoredPath<scalar_t>& path,
                            int64_t vectors, scalar_t* products) {
  const Rows<scalar_t> rows{path.rows.at, path.stride + vectors, path.rows.width, 0};
  each_dots<scalar_t, kWidth>(left, rows,
                              [=](int64_t j, const Vector<scalar_t>& sums)
                                  ALWAYS_INLINE_LAMBDA { store(products + j) = sums; });
}

// result = plus + Σ_j coefficients[j] row_j over X and the first `vectors` vectors after it; the
// bias is that of X's rows alone.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void combine_rows(const scalar_t* coefficients, const FactoredPath<scalar_t>& path,
                                int64_t vectors, const scalar_t* plus, scalar_t* result) {
  const Rows<scalar_t> rows{path.rows.at, path.stride + vectors, path.rows.width, 0};
  const scalar_t bias = plus[rows.width] + sum(coefficients, path.stride);
  combine<scalar_t, kWidth>(coefficients, rows, plus, result);
  result[rows.width] = bias;
}

// scores[i] = E_k[i]·u_k + b_k[i] + c_k, and row k of the products.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void score_items(const Task<scalar_t>& task, int64_t k, Arena<scalar_t>& arena,
                               const FactoredPath<scalar_t>& path, scalar_t* scores) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t K = task.loop.steps, stride = path.stride;
  const scalar_t* now = path.vector(k, task.layout, K);
  scalar_t* products = arena.take(stride + path.columns + kLane);
  dot_rows<kWidth>(now, path, k, products);
  std::copy_n(products + stride, k, path.products + k * path.columns);
  const scalar_t bias = now[task.layout.width];
  for (int64_t i = 0; i < stride; i += kLane)
    store(scores + i) = load(products + i) + load(path.biases + i) + bias;
  add_factors(products + stride, 1, path.factors + K * stride, k, stride, scores);
}

template <int64_t kWidth, typename scalar_t>
void forward(const Task<scalar_t>& given, const ItemIndex& index, Arena<scalar_t>& arena,
             FactoredPath<scalar_t>& result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Task<scalar_t> task = given;  // where stores cannot change it
  const int64_t K = task.loop.steps, P = task.layout.stride, width = task.layout.width;
  FactoredPath<scalar_t> path;
  path.items = index.size();
  path.stride = padded<scalar_t>(path.items);
  path.entries = padded<scalar_t>(task.size);
  path.columns = padded<scalar_t>(std::max<int64_t>(K, 1));
  const int64_t I = path.items, stride = path.stride, columns = path.columns;
  path.vectors = arena.take_zeros((2 * K + 1) * P);
  path.factors = arena.take_zeros((2 * K + 1) * stride);
  path.slopes = arena.take(K * stride);
  path.pushes = arena.take(K * path.entries);
  path.curvatures = arena.take(K * path.entries);
  path.products = arena.take((K + 1) * columns);
  path.squares = arena.take(K * columns);
  scalar_t *biases = arena.take(stride), *scores = arena.take(stride),
           *entry_scores = arena.take(task.size);
  path.biases = biases;
  // Beyond the last vector there may be as many rows as are multiplied at once.
  const int64_t count = stride + 2 * K + 1;
  const scalar_t** at = take_addresses<scalar_t>(arena, count + kLane);
  for (int64_t e = 0; e < task.size; ++e) {
    at[index.place[e]] = task.rows[e];
    biases[index.place[e]] = task.base[e];
  }
  for (int64_t i = I; i < stride; ++i) at[i] = at[I - 1];
  for (int64_t j = 0; j <= 2 * K; ++j) at[stride + j] = path.vectors + j * P;
  for (int64_t i = count; i < count + kLane; ++i) at[i] = at[count - 1];
  path.rows = {at, count, width, 0};
  result = path;

  scalar_t* coefficients = arena.take_zeros(stride + columns);  // of rows, then of vectors
  for (int64_t d = 0; d < P; d += kLane)
    store(path.vector(0, task.layout, K) + d) = load(task.start + d);
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    scalar_t *push = path.pushes + k * path.entries, *slopes = path.slopes + k * stride,
             *moves = path.factors + (K + k) * stride, *squares = path.squares + k * columns;
    const scalar_t rate = task.loop.inner_lr[k];
    score_items<kWidth>(task, k, arena, path, scores);
    spread_to_entries(scores, index, task.size, entry_scores);
    differentiate(task, entry_scores, push, path.curvatures + k * path.entries);
    sum_by_item(push, index, task.size, stride, slopes);
    for (int64_t i = 0; i < stride; i += kLane) {
      store(moves + i) = -rate * load(slopes + i);
      store(biases + i) += load(moves + i);
      store(coefficients + i) = load(moves + i);
    }
    factor_products(path.factors + K * stride, k, moves, stride, squares);
    std::copy_n(squares, k, coefficients + stride);
    combine_rows<kWidth>(coefficients, path, k, path.vector(k, task.layout, K),
                         path.vector(k + 1, task.layout, K));
  }
}

template <int64_t kWidth, typename scalar_t>
void adjoint(const Task<scalar_t>& given, const ItemIndex& index, Arena<scalar_t>& arena,
             const FactoredPath<scalar_t>& taken, bool met, FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Task<scalar_t> task = given;  // where stores cannot change it
  const FactoredPath<scalar_t> path = taken;
  const int64_t K = task.loop.steps, P = task.layout.stride, width = task.layout.width,
                stride = path.stride, columns = path.columns, vectors = 2 * K + met;
  scalar_t *h = path.factors, *a = path.factors + K * stride,
           *h_last = path.factors + 2 * K * stride;
  scalar_t* products = arena.take(stride + columns + kLane);
  scalar_t* later_products = arena.take(K * columns);  // row k: λ_{k+1}·u_j
  scalar_t* bends = arena.take(K * columns);           // row k: h_k·a_j for j < k
  scalar_t *along = arena.take(stride), *entry_along = arena.take(task.size),
           *entry_bends = arena.take(task.size);
  scalar_t* coefficients = arena.take_zeros(stride + vectors);  // of rows, then of vectors
  scalar_t* grad_biases = grads.biases;
  scalar_t* last = path.vectors + (2 * K - 1) * P;  // λ_K
  if (K == 0) last = grads.fast;

  // λ_K += E_Kᵀ h_K, whose sum its bias has already
  if (met) {
    for (int64_t i = 0; i < stride; i += kLane) {
      store(coefficients + i) = load(h_last + i);
      store(grad_biases + i) += load(h_last + i);
    }
    factor_products(a, K, h_last, stride, coefficients + stride);
    const scalar_t bias = grads.fast[width];
    combine_rows<kWidth>(coefficients, path, K, grads.fast, grads.fast);
    grads.fast[width] = bias;
  }
  if (K > 0)
    for (int64_t d = 0; d < P; d += kLane) store(last + d) = load(grads.fast + d);

  Vector<scalar_t> lr_sum = {};
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t rate = task.loop.inner_lr[k];
    const scalar_t* later = path.vectors + (K + k) * P;  // λ_{k+1}
    scalar_t* earlier = k == 0 ? grads.fast : path.vectors + (K + k - 1) * P;
    const scalar_t *slopes = path.slopes + k * stride, *push = path.pushes + k * path.entries;

    // (E_k λ + Ē u_k + c̄ + b̄)_i: how the loss changes with the move of item i, but for −s
    dot_rows<kWidth>(later, path, K, products);
    std::copy_n(products + stride, K, later_products + k * columns);
    const scalar_t bias = later[width];
    for (int64_t i = 0; i < stride; i += kLane)
      store(along + i) = load(products + i) + load(grad_biases + i) + bias;
    add_factors(products + stride, 1, a, k, stride, along);
    const int64_t after = k + 1, rest = K - after;
    add_factors(path.products + after * columns + k, columns, h + after * stride, rest, stride,
                along);
    add_factors(later_products + after * columns + k, columns, a + after * stride, rest, stride,
                along);
    if (met) add_factors(path.products + K * columns + k, 1, h_last, 1, stride, along);

    for (int64_t i = 0; i < stride; i += kLane) lr_sum += load(slopes + i) * load(along + i);
    if (grads.inner_lr && (grads.inner_lr.stride != 0 || k == 0)) {
      grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
      lr_sum = Vector<scalar_t>{};
    }
    spread_to_entries(along, index, task.size, entry_along);
    bend(task, path.curvatures + k * path.entries, rate, entry_along, entry_bends);
    if (grads.weights != nullptr) add_weight_gradient(task, push, rate, entry_along, grads.weights);
    sum_by_item(entry_bends, index, task.size, stride, h + k * stride);

    for (int64_t i = 0; i < stride; i += kLane) {
      const Vector<scalar_t> bent = load(h + k * stride + i);
      store(grad_biases + i) += bent;
      store(coefficients + i) = bent;
    }
    scalar_t *of_users = coefficients + stride, *of_adjoints = of_users + K;
    factor_products(a, k, h + k * stride, stride, bends + k * columns);
    for (int64_t j = 0; j < K; ++j) {
      of_users[j] = j < k ? bends[k * columns + j] : j == k ? 0 : bends[j * columns + k];
      of_adjoints[j] = j > k ? path.squares[j * columns + k] : 0;
    }
    if (met) of_users[2 * K] = dot(h_last, a + k * stride, stride);
    combine_rows<kWidth>(coefficients, path, vectors, later, earlier);
  }
  grads.offset += grads.fast[width];
}

}  // namespace

template <typename scalar_t>
void factored_forward(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      FactoredPath<scalar_t>& path) {
  with_width(task.layout, [&](auto width) { forward<width()>(task, index, arena, path); });
}

template <typename scalar_t>
void factored_scores(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                     const FactoredPath<scalar_t>& path, scalar_t* scores) {
  score_items<0>(task, task.loop.steps, arena, path, scores);
}

template <typename scalar_t>
void factored_adjoint(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      const FactoredPath<scalar_t>& path, bool met,
                      FullGradients<scalar_t>& grads) {
  with_width(task.layout,
             [&](auto width) { adjoint<width()>(task, index, arena, path, met, grads); });
}

template void factored_forward<float>(const Task<float>& task, const ItemIndex& index,
                                      Arena<float>& arena, FactoredPath<float>& path);
template void factored_forward<double>(const Task<double>& task, const ItemIndex& index,
                                       Arena<double>& arena, FactoredPath<double>& path);
template void factored_scores<float>(const Task<float>& task, Arena<float>& arena,
                                     const FactoredPath<float>& path, float* scores);
template void factored_scores<double>(const Task<double>& task, Arena<double>& arena,
                                      const FactoredPath<double>& path, double* scores);
template void factored_adjoint<float>(const Task<float>& task, const ItemIndex& index,
                                      Arena<float>& arena, const FactoredPath<float>& path,
                                      bool met, FullGradients<float>& grads);
template void factored_adjoint<double>(const Task<double>& task, const ItemIndex& index,
                                       Arena<double>& arena, const FactoredPath<double>& path,
                                       bool met, FullGradients<double>& grads);

}  // namespace metarec_fast::cpu
