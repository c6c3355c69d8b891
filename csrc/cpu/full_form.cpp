#include "full_form.h"

namespace metarec_fast::cpu {
namespace {

// Sums what belongs to entries by item.
template <typename scalar_t>
ALWAYS_INLINE void sum_by_item(const scalar_t* values, const ItemIndex& index, int64_t stride,
                               scalar_t* sums) {
  for (int64_t i = 0; i < stride; i += kLanes<scalar_t>) store(sums + i) = Vector<scalar_t>{};
  const int64_t count = static_cast<int64_t>(index.place.size());
  for (int64_t e = 0; e < count; ++e) sums[index.place[e]] += values[e];
}

}  // namespace

template <typename scalar_t>
MULTIVERSION void start_full(const Task<scalar_t>& task, const ItemIndex& index,
                             Arena<scalar_t>& arena, FullPath<scalar_t>& path) {
  const Layout<scalar_t>& layout = task.layout;
  const int64_t K = task.loop.steps, width = layout.width;
  path.items = index.size();
  path.stride = padded<scalar_t>(path.items);
  path.entries = padded<scalar_t>(task.size);
  path.rows = arena.take(path.items * width);
  path.biases = arena.take(path.items);
  path.fast = arena.take((K + 1) * layout.stride);
  path.slopes = arena.take(K * path.stride);
  path.pushes = arena.take(K * path.entries);
  path.curvatures = arena.take(K * path.entries);
  for (int64_t e = 0; e < task.size; ++e) {
    const int64_t i = index.place[e];
    path.biases[i] = task.base[e];
    for (int64_t d = 0; d < width; d += kLanes<scalar_t>)
      store(path.rows + i * width + d) = load(task.rows.values + e * width + d);
  }
  for (int64_t d = 0; d < layout.stride; d += kLanes<scalar_t>)
    store(path.fast + d) = load(task.start + d);
}

template <typename scalar_t>
MULTIVERSION void step_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
                            Arena<scalar_t>& arena, FullPath<scalar_t>& path) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = task.layout.width, P = task.layout.stride;
  const Rows<scalar_t> rows = path.item_rows(width);
  task.ahead.some();
  const scalar_t* now = path.fast + k * P;
  scalar_t* next = path.fast + (k + 1) * P;
  scalar_t* slopes = path.slopes + k * path.stride;
  scalar_t* scores = arena.take(path.items);
  scalar_t* entry_scores = arena.take(task.size);
  score_rows(rows, path.biases, now, scores);
  for (int64_t e = 0; e < task.size; ++e) entry_scores[e] = scores[index.place[e]];
  differentiate(task, entry_scores, path.pushes + k * path.entries,
                path.curvatures + k * path.entries);
  sum_by_item(path.pushes + k * path.entries, index, path.stride, slopes);

  const scalar_t rate = task.loop.inner_lr[k];
  combine(slopes, rows, next);
  for (int64_t d = 0; d < P; d += kLane) store(next + d) = load(now + d) - rate * load(next + d);
  for (int64_t i = 0; i < path.items; ++i) {
    const scalar_t move = rate * slopes[i];
    for (int64_t d = 0; d < width; d += kLane)
      store(path.rows + i * width + d) -= move * load(now + d);
    path.biases[i] -= move;
  }
}

template <typename scalar_t>
MULTIVERSION void undo_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
                            Arena<scalar_t>& arena, FullPath<scalar_t>& path,
                            FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>, kRows = 4;
  const int64_t width = task.layout.width, items = path.items;
  const scalar_t* user = path.fast + k * task.layout.stride;
  const scalar_t* slopes = path.slopes + k * path.stride;
  const scalar_t* push = path.pushes + k * path.entries;
  const scalar_t rate = task.loop.inner_lr[k];

  task.ahead.some();
  // r_i = e_i·ū + c̄ + ē_i·u + b̄_i: how much the loss would change with g_i, but for −s.
  scalar_t* along = arena.take(items);
  for (int64_t i = 0; i < items; i += kRows) {
    const int64_t block = std::min(kRows, items - i);
    Vector<scalar_t> sums[kRows] = {};
    for (int64_t r = 0; r < block; ++r) {
      scalar_t* row = path.rows + (i + r) * width;
      const scalar_t move = rate * slopes[i + r];
      for (int64_t d = 0; d < width; d += kLane) {
        const Vector<scalar_t> before = load(row + d) + move * load(user + d);
        store(row + d) = before;
        sums[r] +=
            before * load(grads.fast + d) + load(grads.rows + (i + r) * width + d) * load(user + d);
      }
    }
    put(along + i, sum_lanes<scalar_t>(sums));
  }
  scalar_t lr_sum = 0;
  for (int64_t i = 0; i < items; ++i) {
    path.biases[i] += rate * slopes[i];
    along[i] += grads.fast[width] + grads.biases[i];
    lr_sum += slopes[i] * along[i];
  }
  if (grads.inner_lr) grads.inner_lr.add(k, -lr_sum);
  if (task.loop.first_order) return;

  scalar_t* entry_along = arena.take(task.size);
  scalar_t* h = arena.take(task.size);
  scalar_t* grad_scores = arena.take(items);  // P̄
  for (int64_t e = 0; e < task.size; ++e) entry_along[e] = along[index.place[e]];
  bend(task, path.curvatures + k * path.entries, rate, entry_along, h);
  if (grads.weights != nullptr) add_weight_gradient(task, push, rate, entry_along, grads.weights);
  sum_by_item(h, index, path.stride, grad_scores);

  // ū += Σ_i (P̄_i e_i − s g_i ē_i),  ē_i += P̄_i u − s g_i ū,  all old on the right
  for (int64_t d = 0; d < width; d += kLane) {
    const Vector<scalar_t> now = load(user + d), later = load(grads.fast + d);
    Vector<scalar_t> forth = {}, back = {};
    for (int64_t i = 0; i < items; ++i) {
      const scalar_t curved = grad_scores[i], moved = rate * slopes[i];
      scalar_t* grad = grads.rows + i * width + d;
      const Vector<scalar_t> old = load(grad);
      forth += curved * load(path.rows + i * width + d);
      back += moved * old;
      store(grad) = old + curved * now - moved * later;
    }
    store(grads.fast + d) = later + forth - back;
  }
  for (int64_t i = 0; i < items; ++i) grads.biases[i] += grad_scores[i];
  const scalar_t sum_scores = sum(grad_scores, items);
  grads.fast[width] += sum_scores;
  grads.offset += sum_scores;
}

template <typename scalar_t>
MULTIVERSION void score_full(const Query<scalar_t>& query, const int64_t* place,
                             const FullPath<scalar_t>& path, const scalar_t* fast,
                             scalar_t* scores) {
  const int64_t width = query.rows.width;
  score_rows(query.rows, query.base, fast, scores);
  for (int64_t q = 0; q < query.size(); ++q)
    if (place[q] >= 0)
      scores[q] =
          path.biases[place[q]] + fast[width] + dot(fast, path.rows + place[q] * width, width);
}

template <typename scalar_t>
MULTIVERSION void add_query_full(const Query<scalar_t>& query, const int64_t* place,
                                 const Layout<scalar_t>& layout, const FullPath<scalar_t>& path,
                                 const scalar_t* fast, Arena<scalar_t>& arena,
                                 scalar_t* grad_scores, FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = layout.width;
  grads.offset += sum(grad_scores, query.size());
  for (int64_t q = 0; q < query.size(); ++q) {
    const int64_t i = place[q];
    if (i < 0) continue;
    const scalar_t grad = grad_scores[q];
    for (int64_t d = 0; d < width; d += kLane) {
      store(grads.fast + d) += grad * load(path.rows + i * width + d);
      store(grads.rows + i * width + d) += grad * load(fast + d);
    }
    grads.fast[width] += grad;
    grads.biases[i] += grad;
    grad_scores[q] = 0;
  }
  scalar_t* sum = arena.take(layout.stride);
  combine(grad_scores, query.rows, sum);
  for (int64_t d = 0; d < layout.stride; d += kLane) store(grads.fast + d) += load(sum + d);
}

template void start_full<float>(const Task<float>& task, const ItemIndex& index,
                                Arena<float>& arena, FullPath<float>& path);
template void start_full<double>(const Task<double>& task, const ItemIndex& index,
                                 Arena<double>& arena, FullPath<double>& path);
template void step_full<float>(const Task<float>& task, const ItemIndex& index, int64_t k,
                               Arena<float>& arena, FullPath<float>& path);
template void step_full<double>(const Task<double>& task, const ItemIndex& index, int64_t k,
                                Arena<double>& arena, FullPath<double>& path);
template void undo_full<float>(const Task<float>& task, const ItemIndex& index, int64_t k,
                               Arena<float>& arena, FullPath<float>& path,
                               FullGradients<float>& grads);
template void undo_full<double>(const Task<double>& task, const ItemIndex& index, int64_t k,
                                Arena<double>& arena, FullPath<double>& path,
                                FullGradients<double>& grads);
template void score_full<float>(const Query<float>& query, const int64_t* place,
                                const FullPath<float>& path, const float* fast, float* scores);
template void score_full<double>(const Query<double>& query, const int64_t* place,
                                 const FullPath<double>& path, const double* fast, double* scores);
template void add_query_full<float>(const Query<float>& query, const int64_t* place,
                                    const Layout<float>& layout, const FullPath<float>& path,
                                    const float* fast, Arena<float>& arena, float* grad_scores,
                                    FullGradients<float>& grads);
template void add_query_full<double>(const Query<double>& query, const int64_t* place,
                                     const Layout<double>& layout, const FullPath<double>& path,
                                     const double* fast, Arena<double>& arena, double* grad_scores,
                                     FullGradients<double>& grads);

}  // namespace metarec_fast::cpu
