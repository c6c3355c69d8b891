// A task whose items adapt, by the factors of its rows: the scores of its query, and from their
// gradients all others.
#pragma once

#include "factored_form.h"
#include "gradients.h"

namespace metarec_fast::cpu {

// Scores of the query after the last step; what support items are after it counts for them.
template <typename scalar_t>
void score_factored(const Query<scalar_t>& query, const FullItems& items,
                    const FactoredPath<scalar_t>& path, Arena<scalar_t>& arena, scalar_t* scores) {
  if (query.size() == 0) return;
  score_query(query, path.vector(path.steps), scores);
  if (!items.met) return;
  scalar_t* item_scores = arena.take(path.stride);
  factored_scores(path, item_scores);
  for (int64_t q = 0; q < query.size(); ++q)
    if (items.query[q] >= 0) scores[q] = item_scores[items.query[q]];
}

// Books what p̄ [Q · group], padded with zeros, of the query's scores says, and what else arrives at
// (u, c)_K [layout.stride], if anything; grad_scores is overwritten.
template <typename scalar_t>
void undo_factored(const Task<scalar_t>& task, int64_t block, const Query<scalar_t>& query,
                   int64_t query_begin, int64_t support_begin, const FullItems& items,
                   const FactoredPath<scalar_t>& path, scalar_t* grad_scores,
                   const scalar_t* grad_fast, Arena<scalar_t>& arena,
                   Gradients<scalar_t>& gradients) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Layout<scalar_t>& layout = task.layout;
  const int64_t K = path.steps;
  const bool distinct = items.index.all_distinct();
  FullGradients<scalar_t> grads =
      gradients.of_full_task(block, path.items, support_begin, arena, !distinct);
  const scalar_t total = sum(grad_scores, query.size());
  if (items.met) {
    scalar_t* of_items = path.bends(K);
    for (int64_t i = 0; i < path.stride; i += kLane) store(of_items + i) = Vector<scalar_t>{};
    for (int64_t q = 0; q < query.size(); ++q)
      if (items.query[q] >= 0) {
        of_items[items.query[q]] += grad_scores[q];
        grad_scores[q] = 0;
      }
  }
  query_adjoint(query, grad_scores, grads.fast);
  grads.fast[layout.width] = grads.offset = total;
  if (grad_fast != nullptr)
    for (int64_t d = 0; d < layout.stride; d += kLane) store(grads.fast + d) += load(grad_fast + d);
  write_query_rows(query, query_begin, layout, grad_scores, 0, path.vector(K), 1, arena, gradients);
  factored_adjoint(task, items.index, arena, path, items.met, grads);

  const bool second_order = !task.loop.first_order;
  scalar_t* rows = distinct ? gradients.support_row(support_begin) : grads.rows;
  if (rows != nullptr)
    with_width(layout, [&](auto width) {
      write_rows<scalar_t, width()>(
          layout, {second_order ? path.factors : path.bends(K), 1, path.row}, path.items,
          Stack<scalar_t>{second_order ? path.vectors : path.vector(K), layout.stride},
          (second_order ? 2 * K : 0) + items.met, arena, rows, distinct ? layout.dim : layout.width,
          distinct && gradients.stream());
    });
  gradients.add_full_task(block, task, grads, items.index, support_begin, grad_scores, query,
                          query_begin);
}

}  // namespace metarec_fast::cpu
