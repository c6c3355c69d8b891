// Full adaptation: the rows and biases of a task's support items adapt with its user, each task its
// own copies. Over the distinct support items i, with g_i the derivatives of the item's entries,
// summed:
//
//   u ← u − s Σ_i g_i e_i    c ← c − s Σ_i g_i    e_i ← e_i − s g_i u    b_i ← b_i − s g_i
//
// (old values on the right). All steps run on rows in L1. Of the path only u_k and g_k are kept: on
// the way back e_i is what it was before, e_i + s g_i u.
#pragma once

#include <algorithm>

#include "item_index.h"
#include "task_reader.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct FullPath {
  int64_t items;             // I
  int64_t stride;            // I, padded
  int64_t entries;           // R, padded
  scalar_t* rows;            // e of the distinct items, as they are now [I, width]
  Rows<scalar_t> item_rows;  // the same
  scalar_t* biases;          // m + b, likewise [I]
  scalar_t* fast;            // (u, c)_0 … (u, c)_K [K + 1, layout.stride]
  scalar_t* slopes;          // g_0 … g_{K−1} [K, stride]
  scalar_t* pushes;          // w ∘ ℓ'/(S + n0) of the entries [K, entries]
  scalar_t* curvatures;      // w ∘ ℓ''/(S + n0) [K, entries]

  // Room for rows: a whole number of fours, zeros at the end.
  static int64_t padded_rows(int64_t count) { return (count + 3) / 4 * 4; }
};

// What arrives at (u, c), the rows and the biases from what comes later.
template <typename scalar_t>
struct FullGradients {
  scalar_t* fast;     // [layout.stride]
  scalar_t* rows;     // [I, width]
  scalar_t* biases;   // [I]
  scalar_t offset;    // of m
  scalar_t* weights;  // [R], or nullptr; added to
  PerIndexSum<scalar_t> inner_lr;
};

// What a worker needs to know of the items of its present task.
struct FullItems {
  ItemIndex index;             // of the support
  std::vector<int64_t> query;  // which of them each of the query's candidates is, or −1
  bool met = false;            // whether one of them is

  template <typename scalar_t>
  void find(const EntryData<scalar_t>& support, const EntryData<scalar_t>& asked, int64_t task) {
    index.assign(support.items + support.begin(task), support.size(task));
    query.resize(asked.size(task) * asked.candidates());
    int64_t* number = query.data();
    for (int64_t q = asked.begin(task); q < asked.begin(task + 1); ++q)
      for (int64_t j = 0; j < asked.candidates(); ++j) *number++ = index[asked.candidate(q, j)];
    met = std::any_of(query.begin(), query.end(), [](int64_t item) { return item >= 0; });
  }
};

// Between entries and items; where no item comes twice they are the same.
template <typename scalar_t>
ALWAYS_INLINE void spread_to_entries(const scalar_t* values, const ItemIndex& index,
                                     int64_t entries, scalar_t* result) {
  if (index.all_distinct())
    for (int64_t e = 0; e < entries; e += kLanes<scalar_t>) store(result + e) = load(values + e);
  else
    for (int64_t e = 0; e < entries; ++e) result[e] = values[index.place[e]];
}

template <typename scalar_t>
ALWAYS_INLINE void sum_by_item(const scalar_t* values, const ItemIndex& index, int64_t entries,
                               int64_t stride, scalar_t* sums) {
  if (index.all_distinct()) {
    for (int64_t i = 0; i < stride; i += kLanes<scalar_t>) store(sums + i) = load(values + i);
    return;
  }
  for (int64_t i = 0; i < stride; i += kLanes<scalar_t>) store(sums + i) = Vector<scalar_t>{};
  for (int64_t e = 0; e < entries; ++e) sums[index.place[e]] += values[e];
}

// Makes the path's first point: the rows as they stand in the table, the user's start.
template <typename scalar_t>
void start_full(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                FullPath<scalar_t>& path);

// One step, from point k of the path to the next.
template <typename scalar_t>
void step_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
               Arena<scalar_t>& arena, FullPath<scalar_t>& path);

// The adjoint of that step: rows and biases of the path, and all gradients, go back to point k.
template <typename scalar_t>
void undo_full(const Task<scalar_t>& task, const ItemIndex& index, int64_t k,
               Arena<scalar_t>& arena, FullPath<scalar_t>& path, FullGradients<scalar_t>& grads);

// The whole path of a task.
template <typename scalar_t>
FullPath<scalar_t> adapt_full(const Task<scalar_t>& task, const ItemIndex& index,
                              Arena<scalar_t>& arena) {
  FullPath<scalar_t> path;
  start_full(task, index, arena, path);
  for (int64_t k = 0; k < task.loop.steps; ++k) step_full(task, index, k, arena, path);
  return path;
}

// Scores of the query at point k, support items by their rows as they are now. `place` says which
// of them a candidate is, or −1.
template <typename scalar_t>
void score_full(const Query<scalar_t>& query, const int64_t* place, const FullPath<scalar_t>& path,
                const scalar_t* fast, scalar_t* scores);

// Adds what p̄ says at that point. Of candidates that are support items the rows get it, and their p̄
// is set to zero: nothing is left for the query's own.
template <typename scalar_t>
void add_query_full(const Query<scalar_t>& query, const int64_t* place,
                    const Layout<scalar_t>& layout, const FullPath<scalar_t>& path,
                    const scalar_t* fast, scalar_t* grad_scores, FullGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
