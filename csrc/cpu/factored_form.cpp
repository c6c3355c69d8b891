#include "factored_form.h"

namespace metarec_fast::cpu {
namespace {

// Σ_j coefficients[j] factors[j] of a register of items, j < count.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> combine_factors(const scalar_t* coefficients,
                                               int64_t coefficient_stride, const scalar_t* factors,
                                               int64_t row, int64_t count) {
  Vector<scalar_t> sum = {};
  for (int64_t j = 0; j < count; ++j)
    sum += coefficients[j * coefficient_stride] * load(factors + j * row);
  return sum;
}

// result[j] = factors[j] · vector, j < count, over numbers of items; garbage up to a multiple of
// four.
template <typename scalar_t>
ALWAYS_INLINE void factor_products(const scalar_t* factors, int64_t row, int64_t count,
                                   const scalar_t* vector, int64_t stride, scalar_t* result) {
  for (int64_t j = 0; j < count; j += kRowsAtOnce, factors += kRowsAtOnce * row) {
    Vector<scalar_t> sums[kRowsAtOnce] = {};
    for (int64_t i = 0; i < stride; i += kLanes<scalar_t>)
      for (int64_t r = 0; r < kRowsAtOnce; ++r)
        sums[r] += load(vector + i) * load(factors + r * row + i);
    put(result + j, sum_lanes<scalar_t>(sums));
  }
}

// products[j] = left · u_j, j < count.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void user_products(const scalar_t* left, const FactoredPath<scalar_t>& path,
                                 int64_t count, scalar_t* products) {
  const Rows<scalar_t> users{path.at + path.stride, count, path.width, 0};
  each_dots<scalar_t, kWidth>(left, users,
                              [=](int64_t j, const Vector<scalar_t>& sums)
                                  ALWAYS_INLINE_LAMBDA { store(products + j) = sums; });
}

// Calls sink(i, left · X_i) for every register of items.
template <int64_t kWidth, typename scalar_t, typename Sink>
ALWAYS_INLINE void each_item_product(const scalar_t* left, const FactoredPath<scalar_t>& path,
                                     const Sink& sink) {
  each_dots<scalar_t, kWidth>(left, Rows<scalar_t>{path.at, path.stride, path.width, 0}, sink);
}

// result = plus + Σ_j coefficients[j] row_j over X and the first `count` vectors after it.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void combine_rows(const scalar_t* coefficients, const FactoredPath<scalar_t>& path,
                                int64_t count, const scalar_t* plus, scalar_t* result) {
  const Rows<scalar_t> rows{path.at, path.stride + count, path.width, 0};
  combine_vectors<scalar_t, kWidth>(coefficients, rows, plus, result);
}

// Calls sink(i, scores) for every register of scores[i] = E_k[i]·u_k + b_k[i] + c_k, of which row k
// of the products is a part.
template <int64_t kWidth, typename scalar_t, typename Sink>
ALWAYS_INLINE void each_score(const FactoredPath<scalar_t>& path, int64_t k, const Sink& sink) {
  const scalar_t* now = path.vector(k);
  const scalar_t* moves = path.moves(0);
  scalar_t* products = path.products + k * path.columns;
  const scalar_t *biases = path.biases, bias = now[path.width];
  const int64_t row = path.row;
  user_products<kWidth>(now, path, k, products);
  each_item_product<kWidth>(
      now, path, [=](int64_t i, const Vector<scalar_t>& sums) ALWAYS_INLINE_LAMBDA {
        sink(i, sums + (load(biases + i) + bias + combine_factors(products, 1, moves + i, row, k)));
      });
}

template <int64_t kWidth, typename scalar_t>
void forward(const Task<scalar_t>& given, const ItemIndex& index, Arena<scalar_t>& arena,
             FactoredPath<scalar_t>& result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Task<scalar_t> task = given;  // where stores cannot change it
  const int64_t width = kWidth > 0 ? kWidth : task.layout.width;
  const int64_t K = task.loop.steps, P = width + kLane;
  FactoredPath<scalar_t> path;
  path.steps = K;
  path.items = index.size();
  path.stride = padded<scalar_t>(path.items);
  path.entries = padded<scalar_t>(task.size);
  path.columns = padded<scalar_t>(std::max<int64_t>(K, 1));
  path.width = width;
  path.row = path.stride + padded<scalar_t>(2 * K);
  const int64_t I = path.items, stride = path.stride, entries = path.entries;
  const bool distinct = index.all_distinct();
  const auto [vectors, factors, pushes, slopes_of_items, curvatures, products, biases, scores,
              entry_scores, shares] =
      arena.take_each((2 * K + 1) * P, (2 * K + 1 + kRowsAtOnce) * path.row, K * entries,
                      distinct ? 0 : K * stride, K * entries, (K + 1) * path.columns, stride,
                      stride, entries, entries);
  path.vectors = vectors;
  path.factors = factors;
  path.pushes = pushes;
  path.slopes = distinct ? pushes : slopes_of_items;
  path.curvatures = curvatures;
  path.products = products;
  path.biases = biases;
  const int64_t count = stride + 2 * K + 1;
  const scalar_t** at = take_addresses<scalar_t>(arena, count);
  for (int64_t e = 0; e < task.size; ++e) {
    at[index.place[e]] = task.rows[e];
    biases[index.place[e]] = task.base[e];
  }
  for (int64_t i = I; i < stride; ++i) at[i] = at[I - 1];
  for (int64_t k = 0; k < K; ++k) {
    at[stride + k] = path.vector(k);
    at[stride + 2 * K - 1 - k] = path.adjoint(k + 1);
  }
  for (int64_t i = 2 * K; i <= 2 * K + kRowsAtOnce; ++i) at[stride + i] = path.vector(K);
  path.at = at;
  result = path;

  const scalar_t mean = task.mean();
  for (int64_t e = 0; e < entries; e += kLane) store(shares + e) = mean * load(task.weights + e);
  for (int64_t d = 0; d < P; d += kLane) store(path.vector(0) + d) = load(task.start + d);
  for (int64_t k = 0; k < K; ++k) {
    task.ahead.some();
    const scalar_t *now = path.vector(k), rate = task.loop.inner_lr[k];
    scalar_t *push = path.pushes + k * entries, *curvature = path.curvatures + k * entries,
             *slopes = path.slopes + k * stride, *moves = path.moves(k), *next = path.vector(k + 1);
    const Loss loss = task.loop.loss;
    const auto differentiate = [=](int64_t e, const Vector<scalar_t>& scores) ALWAYS_INLINE_LAMBDA {
      Vector<scalar_t> first, second;
      differentiate_loss<VectorMath<scalar_t>>(loss, Vector<scalar_t>(load(shares + e)), scores,
                                               Vector<scalar_t>(load(task.targets + e)), first,
                                               second);
      store(push + e) = first;
      store(curvature + e) = second;
      return first;
    };
    const auto move = [=](int64_t i, const Vector<scalar_t>& slope) ALWAYS_INLINE_LAMBDA {
      store(moves + i) = -rate * slope;
      store(biases + i) -= rate * slope;
    };
    if (distinct) {
      each_score<kWidth>(path, k,
                         [=](int64_t i, const Vector<scalar_t>& sums)
                             ALWAYS_INLINE_LAMBDA { move(i, differentiate(i, sums)); });
    } else {
      each_score<kWidth>(path, k,
                         [=](int64_t i, const Vector<scalar_t>& sums)
                             ALWAYS_INLINE_LAMBDA { store(scores + i) = sums; });
      spread_to_entries(scores, index, task.size, entry_scores);
      for (int64_t e = 0; e < entries; e += kLane) differentiate(e, load(entry_scores + e));
      sum_by_item(push, index, task.size, stride, slopes);
      for (int64_t i = 0; i < stride; i += kLane) move(i, load(slopes + i));
    }
    factor_products(path.moves(0), path.row, k, moves, stride, moves + stride);
    combine_rows<kWidth>(moves, path, k, now, next);
    store(next + width) = first_lane(now[width] + sum(moves, stride));
  }
}

// What the query says of support items:  λ_K += E_Kᵀ h_K, whose sum its bias has already.
template <int64_t kWidth, typename scalar_t>
ALWAYS_INLINE void add_support_scores(const FactoredPath<scalar_t>& path,
                                      FullGradients<scalar_t>& grads) {
  const int64_t K = path.steps, stride = path.stride;
  scalar_t* h = path.bends(K);
  user_products<kWidth>(path.vector(K), path, K, path.products + K * path.columns);
  for (int64_t i = 0; i < stride; i += kLanes<scalar_t>) store(grads.biases + i) += load(h + i);
  factor_products(path.moves(0), path.row, K, h, stride, h + stride);
  combine_rows<kWidth>(h, path, K, grads.fast, grads.fast);
}

// The way back where λ and Ē stay the same: first order. Only the rates have yet to be looked at.
template <int64_t kWidth, typename scalar_t>
void first_order_adjoint(const FactoredPath<scalar_t>& path, Arena<scalar_t>& arena, bool met,
                         FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t K = path.steps, stride = path.stride;
  if (met) add_support_scores<kWidth>(path, grads);
  if (K == 0 || !grads.inner_lr) return;
  scalar_t *products = arena.take(path.columns), *along = arena.take(stride);
  const scalar_t *last = grads.fast, *biases = grads.biases, bias = last[path.width];
  user_products<kWidth>(last, path, K, products);
  each_item_product<kWidth>(last, path,
                            [=](int64_t i, const Vector<scalar_t>& sums) ALWAYS_INLINE_LAMBDA {
                              store(along + i) = sums + (load(biases + i) + bias);
                            });
  Vector<scalar_t> lr_sum = {};
  for (int64_t k = 0; k < K; ++k) {
    const scalar_t again = met ? path.products[K * path.columns + k] : scalar_t{0};  // u_K·u_k
    for (int64_t i = 0; i < stride; i += kLane) {
      Vector<scalar_t> all = load(along + i);  // (E_k λ + Ē u_k + c̄ + b̄)_i
      if (met) all += again * load(path.bends(K) + i);
      lr_sum += load(path.slopes + k * stride + i) * all;
      store(along + i) += products[k] * load(path.moves(k) + i);
    }
    if (grads.inner_lr.stride == 0 && k < K - 1) continue;
    grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
    lr_sum = Vector<scalar_t>{};
  }
}

template <int64_t kWidth, typename scalar_t>
void adjoint(const Task<scalar_t>& given, const ItemIndex& index, Arena<scalar_t>& arena,
             const FactoredPath<scalar_t>& taken, bool met, FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Task<scalar_t> task = given;  // where stores cannot change it
  const FactoredPath<scalar_t> path = taken;
  const int64_t width = kWidth > 0 ? kWidth : path.width, P = width + kLane;
  const int64_t K = path.steps, stride = path.stride, row = path.row, columns = path.columns;
  const bool distinct = index.all_distinct();
  // Of the first, row k is λ_{k+1}·u_j for j < k.
  const auto [later_products, along, entry_along, entry_bends] =
      arena.take_each(K * columns, stride, task.size, task.size);
  scalar_t *grad_biases = grads.biases, *h_last = path.bends(K);

  if (met) add_support_scores<kWidth>(path, grads);
  if (K > 0)
    for (int64_t d = 0; d < P; d += kLane) store(path.adjoint(K) + d) = load(grads.fast + d);

  Vector<scalar_t> lr_sum = {};
  for (int64_t k = K - 1; k >= 0; --k) {
    const scalar_t *later = path.adjoint(k + 1), *slopes = path.slopes + k * stride,
                   *push = path.pushes + k * path.entries,
                   *curvature = path.curvatures + k * path.entries, *moves = path.moves(0);
    const scalar_t rate = task.loop.inner_lr[k], bias = later[width];
    scalar_t *earlier = k == 0 ? grads.fast : path.adjoint(k), *h = path.bends(k),
             *products = later_products + k * columns;
    const int64_t after = k + 1, rest = K - after;

    // (E_k λ + Ē u_k + c̄ + b̄)_i: how the loss changes with the move of item i, but for −s. What
    // later steps say of it comes first.
    for (int64_t i = 0; i < stride; i += kLane) {
      Vector<scalar_t> sum = load(grad_biases + i) + bias;
      sum += combine_factors(path.products + after * columns + k, columns, path.bends(after) + i,
                             row, rest);
      sum += combine_factors(later_products + after * columns + k, columns, path.moves(after) + i,
                             row, rest);
      if (met) sum += path.products[K * columns + k] * load(h_last + i);
      store(along + i) = sum;
    }
    user_products<kWidth>(later, path, k, products);
    each_item_product<kWidth>(
        later, path, [=](int64_t i, const Vector<scalar_t>& sums) ALWAYS_INLINE_LAMBDA {
          const Vector<scalar_t> all =
              sums + (load(along + i) + combine_factors(products, 1, moves + i, row, k));
          store(along + i) = all;
          if (distinct) store(h + i) = -rate * load(curvature + i) * all;
        });
    const scalar_t* of_entries = along;
    if (!distinct) {
      spread_to_entries(along, index, task.size, entry_along);
      bend(task, curvature, rate, entry_along, entry_bends);
      sum_by_item(entry_bends, index, task.size, stride, h);
      of_entries = entry_along;
    }
    if (grads.weights != nullptr) add_weight_gradient(task, push, rate, of_entries, grads.weights);
    for (int64_t i = 0; i < stride; i += kLane) {
      lr_sum += load(slopes + i) * load(along + i);
      store(grad_biases + i) += load(h + i);
    }
    if (grads.inner_lr && (grads.inner_lr.stride != 0 || k == 0)) {
      grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
      lr_sum = Vector<scalar_t>{};
    }

    scalar_t* of_vectors = h + stride;  // u_0 … u_{K−1}, λ_K … λ_{k+2}
    factor_products(moves, row, k, h, stride, of_vectors);
    of_vectors[k] = 0;
    for (int64_t j = after; j < K; ++j) {
      of_vectors[j] = path.bends(j)[stride + k];
      of_vectors[2 * K - 1 - j] = path.moves(j)[stride + k];
    }
    combine_rows<kWidth>(h, path, K + rest, later, earlier);
    const scalar_t total = sum(h, stride);
    store(earlier + width) = first_lane(bias + total);
    grads.offset += total;
    if (met) {
      const scalar_t of_last = dot(h_last, path.moves(k), stride);
      for (int64_t d = 0; d < width; d += kLane)
        store(earlier + d) += of_last * load(path.vector(K) + d);
    }
  }
}

}  // namespace

template <typename scalar_t>
void factored_forward(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      FactoredPath<scalar_t>& path) {
  with_width(task.layout, [&](auto width) { forward<width()>(task, index, arena, path); });
}

template <typename scalar_t>
void factored_scores(const FactoredPath<scalar_t>& path, scalar_t* scores) {
  each_score<0>(path, path.steps,
                [=](int64_t i, const Vector<scalar_t>& sums)
                    ALWAYS_INLINE_LAMBDA { store(scores + i) = sums; });
}

template <typename scalar_t>
void factored_adjoint(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      const FactoredPath<scalar_t>& path, bool met,
                      FullGradients<scalar_t>& grads) {
  with_width(task.layout, [&](auto width) {
    if (task.loop.first_order)
      first_order_adjoint<width()>(path, arena, met, grads);
    else
      adjoint<width()>(task, index, arena, path, met, grads);
  });
}

template void factored_forward<float>(const Task<float>& task, const ItemIndex& index,
                                      Arena<float>& arena, FactoredPath<float>& path);
template void factored_forward<double>(const Task<double>& task, const ItemIndex& index,
                                       Arena<double>& arena, FactoredPath<double>& path);
template void factored_scores<float>(const FactoredPath<float>& path, float* scores);
template void factored_scores<double>(const FactoredPath<double>& path, double* scores);
template void factored_adjoint<float>(const Task<float>& task, const ItemIndex& index,
                                      Arena<float>& arena, const FactoredPath<float>& path,
                                      bool met, FullGradients<float>& grads);
template void factored_adjoint<double>(const Task<double>& task, const ItemIndex& index,
                                       Arena<double>& arena, const FactoredPath<double>& path,
                                       bool met, FullGradients<double>& grads);

}  // namespace metarec_fast::cpu
