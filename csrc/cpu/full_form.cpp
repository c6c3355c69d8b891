#include "full_form.h"

namespace metarec_fast::cpu {
namespace {

// Rows are handled so many at a time; what there is of them is padded to that with zeros.
constexpr int64_t kRows = 4;

}  // namespace

template <typename scalar_t>
void start_full(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                FullPath<scalar_t>& path) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t K = task.loop.steps, width = task.layout.width, P = task.layout.stride;
  path.items = index.size();
  path.stride = padded<scalar_t>(path.items);
  path.entries = padded<scalar_t>(task.size);
  scalar_t* rows = arena.take(FullPath<scalar_t>::padded_rows(path.items) * width);
  scalar_t* biases = arena.take(path.items);
  path.rows = rows;
  path.biases = biases;
  path.fast = arena.take((K + 1) * P);
  path.slopes = arena.take(K * path.stride);
  path.pushes = arena.take(K * path.entries);
  path.curvatures = arena.take(K * path.entries);
  for (int64_t e = 0; e < task.size; ++e) {
    const int64_t i = index.place[e];
    biases[i] = task.base[e];
    for (int64_t d = 0; d < width; d += kLane) store(rows + i * width + d) = load(task.rows[e] + d);
  }
  path.item_rows = rows_of<scalar_t>({rows, width}, path.items, width, 1, arena);
  for (int64_t d = path.items * width; d < FullPath<scalar_t>::padded_rows(path.items) * width;
       d += kLane)
    store(rows + d) = Vector<scalar_t>{};
  for (int64_t d = 0; d < P; d += kLane) store(path.fast + d) = load(task.start + d);
}

template <typename scalar_t>
void step_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
               Arena<scalar_t>& arena, FullPath<scalar_t>& path) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = task.layout.width, P = task.layout.stride, items = path.items;
  const scalar_t rate = task.loop.inner_lr[k];
  const scalar_t* now = path.fast + k * P;
  scalar_t* next = path.fast + (k + 1) * P;
  scalar_t *rows = path.rows, *biases = path.biases;
  scalar_t* slopes = path.slopes + k * path.stride;
  scalar_t* push = path.pushes + k * path.entries;
  scalar_t* scores = arena.take(items);
  scalar_t* entry_scores = arena.take(task.size);
  scalar_t* moves = arena.take(items);  // s g
  task.ahead.some();

  score_rows(path.item_rows, biases, now, scores);
  spread_to_entries(scores, index, task.size, entry_scores);
  differentiate(task, entry_scores, push, path.curvatures + k * path.entries);
  sum_by_item(push, index, task.size, path.stride, slopes);
  for (int64_t i = 0; i < items; i += kLane) {
    store(moves + i) = rate * load(slopes + i);
    store(biases + i) -= load(moves + i);
  }

  // u ← u − Σ_i s g_i e_i,  e_i ← e_i − s g_i u,  all old on the right
  for (int64_t d = 0; d < width; d += kLane) {
    const Vector<scalar_t> user = load(now + d);
    Vector<scalar_t> even = {}, odd = {};
    scalar_t* row = rows + d;
    for (int64_t i = 0; i < items; i += 2, row += 2 * width) {  // padded, the second may be zeros
      const Vector<scalar_t> one = load(row), other = load(row + width);
      even += moves[i] * one;
      odd += moves[i + 1] * other;
      store(row) = one - moves[i] * user;
      store(row + width) = other - moves[i + 1] * user;
    }
    store(next + d) = user - (even + odd);
  }
  store(next + width) = load(now + width);
  next[width] -= sum(moves, items);
}

template <typename scalar_t>
void undo_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
               Arena<scalar_t>& arena, FullPath<scalar_t>& path, FullGradients<scalar_t>& grads) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = task.layout.width, items = path.items;
  const scalar_t rate = task.loop.inner_lr[k];
  const scalar_t* user = path.fast + k * task.layout.stride;
  const scalar_t* slopes = path.slopes + k * path.stride;
  const scalar_t* push = path.pushes + k * path.entries;
  scalar_t *rows = path.rows, *biases = path.biases;
  scalar_t *grad_fast = grads.fast, *grad_rows = grads.rows, *grad_biases = grads.biases;
  scalar_t* along = arena.take(items);
  scalar_t* moves = arena.take(items);  // s g
  for (int64_t i = 0; i < items; i += kLane) store(moves + i) = rate * load(slopes + i);

  // Back to e_i, and r_i = e_i·ū + c̄ + ē_i·u + b̄_i: how the loss changes with g_i, but for −s.
  for (int64_t i = 0; i < items; i += kRows) {
    Vector<scalar_t> sums[kRows] = {};
    for (int64_t d = 0; d < width; d += kLane) {
      const Vector<scalar_t> now = load(user + d), later = load(grad_fast + d);
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = (i + r) * width + d;
        const Vector<scalar_t> before = load(rows + at) + moves[i + r] * now;
        store(rows + at) = before;
        sums[r] += before * later + load(grad_rows + at) * now;
      }
    }
    put(along + i, sum_lanes<scalar_t>(sums));
  }
  Vector<scalar_t> lr_sum = {};
  for (int64_t i = 0; i < items; i += kLane) {
    store(biases + i) += load(moves + i);
    store(along + i) += grad_fast[width] + load(grad_biases + i);
    lr_sum += load(slopes + i) * load(along + i);
  }
  if (grads.inner_lr) grads.inner_lr.add(k, -sum_lanes<scalar_t>(lr_sum));
  if (task.loop.first_order) return;

  scalar_t* entry_along = arena.take(task.size);
  scalar_t* h = arena.take(task.size);
  scalar_t* grad_scores = arena.take(items);  // P̄
  spread_to_entries(along, index, task.size, entry_along);
  bend(task, path.curvatures + k * path.entries, rate, entry_along, h);
  if (grads.weights != nullptr) add_weight_gradient(task, push, rate, entry_along, grads.weights);
  sum_by_item(h, index, task.size, path.stride, grad_scores);

  // ū += Σ_i (P̄_i e_i − s g_i ē_i),  ē_i += P̄_i u − s g_i ū,  all old on the right
  for (int64_t d = 0; d < width; d += kLane) {
    const Vector<scalar_t> now = load(user + d), later = load(grad_fast + d);
    Vector<scalar_t> forth = {}, back = {};
    for (int64_t i = 0; i < items; ++i) {
      const int64_t at = i * width + d;
      const Vector<scalar_t> old = load(grad_rows + at);
      forth += grad_scores[i] * load(rows + at);
      back += moves[i] * old;
      store(grad_rows + at) = old + grad_scores[i] * now - moves[i] * later;
    }
    store(grad_fast + d) = later + forth - back;
  }
  for (int64_t i = 0; i < items; i += kLane) store(grad_biases + i) += load(grad_scores + i);
  const scalar_t sum_scores = sum(grad_scores, items);
  grad_fast[width] += sum_scores;
  grads.offset += sum_scores;
}

template <typename scalar_t>
void score_full(const Query<scalar_t>& query, const int64_t* place, const FullPath<scalar_t>& path,
                const scalar_t* fast, scalar_t* scores) {
  const int64_t width = query.rows.width;
  score_rows(query.rows, query.base, fast, scores);
  for (int64_t q = 0; q < query.size(); ++q)
    if (place[q] >= 0)
      scores[q] =
          path.biases[place[q]] + fast[width] + dot(fast, path.rows + place[q] * width, width);
}

template <typename scalar_t>
void add_query_full(const Query<scalar_t>& query, const int64_t* place,
                    const Layout<scalar_t>& layout, const FullPath<scalar_t>& path,
                    const scalar_t* fast, scalar_t* grad_scores, FullGradients<scalar_t>& grads) {
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
  combine(grad_scores, query.rows, grads.fast, grads.fast);
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
                                    const float* fast, float* grad_scores,
                                    FullGradients<float>& grads);
template void add_query_full<double>(const Query<double>& query, const int64_t* place,
                                     const Layout<double>& layout, const FullPath<double>& path,
                                     const double* fast, double* grad_scores,
                                     FullGradients<double>& grads);

}  // namespace metarec_fast::cpu
