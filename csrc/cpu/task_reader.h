// From the tensors of an operator to one task at a time.
#pragma once

#include "../arguments.h"
#include "task.h"
#include "task_blocks.h"

namespace metarec_fast::cpu {

// Scratch of one thread. It keeps its size from call to call: the largest task's, not the batch's.
template <typename scalar_t>
Arena<scalar_t>& thread_arena() {
  static thread_local Arena<scalar_t> arena;
  return arena;
}

template <typename scalar_t>
class TaskReader {
 public:
  TaskReader(const Inputs& inputs, const LoopArguments& arguments)
      : layout(inputs.D()),
        loop(arguments.view<scalar_t>()),
        support_items(inputs.support.items.const_data_ptr<int64_t>()),
        support_offsets(inputs.support.offsets.const_data_ptr<int64_t>()),
        user_init_(inputs.user_init.const_data_ptr<scalar_t>()),
        user_bias_init_(inputs.user_bias_init.const_data_ptr<scalar_t>()),
        item_table_(inputs.item_table.const_data_ptr<scalar_t>()),
        item_bias_(inputs.item_bias.const_data_ptr<scalar_t>()),
        offset_(*inputs.offset.const_data_ptr<scalar_t>()),
        targets_(inputs.targets.const_data_ptr<scalar_t>()),
        weights_(inputs.weights ? inputs.weights->const_data_ptr<scalar_t>() : nullptr),
        user_stride_(inputs.per_task_start() ? inputs.D() : 0),
        bias_stride_(inputs.per_task_bias() ? 1 : 0) {
    check_ragged("support", inputs.support, inputs.N());
    if (loop.exact())
      for (int64_t i = 0; i < arguments.prior_pull->numel(); ++i)
        STD_TORCH_CHECK(loop.prior_pull.values[i] > 0,
                        "prior_pull: must be > 0 with inner_steps='exact', got ",
                        loop.prior_pull.values[i], " at position ", i);
    scale_ = scratch_.take(layout.stride);
    if (loop.preconditioner != nullptr)
      pack(loop.preconditioner, loop.preconditioner[layout.dim], layout, scale_);
    else
      std::fill(scale_, scale_ + layout.stride, scalar_t{1});
  }

  // Task t, its rows gathered into the arena.
  Task<scalar_t> read(int64_t t, Arena<scalar_t>& arena) const {
    const int64_t begin = support_offsets[t], size = support_offsets[t + 1] - begin;
    scalar_t* rows = arena.take(size * layout.stride);
    scalar_t* base = arena.take(size);
    scalar_t* start = arena.take(layout.stride);
    read_rows(support_items + begin, size, rows, base);
    pack(user_init_ + t * user_stride_, user_bias_init_[t * bias_stride_], layout, start);
    const scalar_t* weights = weights_ == nullptr ? nullptr : weights_ + begin;
    if (weights == nullptr) {
      scalar_t* ones = arena.take(size);
      std::fill(ones, ones + size, scalar_t{1});
      weights = ones;
    }
    return {layout, loop, t, size, rows, base, targets_ + begin, weights, start, scale_};
  }

  void read_rows(const int64_t* items, int64_t count, scalar_t* rows, scalar_t* base) const {
    gather(items, count, item_table_, item_bias_, offset_, layout, rows, base);
  }

  // Asks for the rows of task `t`, while the one before it is computed: they lie all over the
  // table.
  void prefetch(int64_t t, const int64_t* query_items, const int64_t* query_offsets) const {
    prefetch_rows(support_items, support_offsets[t], support_offsets[t + 1]);
    prefetch_rows(query_items, query_offsets[t], query_offsets[t + 1]);
  }

  const Layout<scalar_t> layout;
  const InnerLoop<scalar_t> loop;
  const int64_t* const support_items;
  const int64_t* const support_offsets;

 private:
  void prefetch_rows(const int64_t* items, int64_t begin, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(scalar_t);  // numbers in a cache line
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* row = item_table_ + items[i] * layout.dim;
      for (int64_t d = 0; d < layout.dim; d += kLine) __builtin_prefetch(row + d);
      __builtin_prefetch(item_bias_ + items[i]);
    }
  }

  const scalar_t *user_init_, *user_bias_init_, *item_table_, *item_bias_;
  scalar_t offset_;
  const scalar_t *targets_, *weights_;
  int64_t user_stride_, bias_stride_;
  Arena<scalar_t> scratch_;
  scalar_t* scale_;
};

// The query entries of one task.
template <typename scalar_t>
struct Query {
  int64_t size;          // Q
  const scalar_t* rows;  // [Q, stride], bias 1
  const scalar_t* base;  // m + b_q [Q]

  Query(const TaskReader<scalar_t>& reader, const int64_t* items, int64_t size_in,
        Arena<scalar_t>& arena)
      : size(size_in) {
    scalar_t* gathered = arena.take(size * reader.layout.stride);
    scalar_t* bases = arena.take(size);
    reader.read_rows(items, size, gathered, bases);
    rows = gathered;
    base = bases;
  }
};

// scores[q] = m + b_q + c + u·e_q
template <typename scalar_t>
MULTIVERSION void score_query(const Query<scalar_t>& query, const Layout<scalar_t>& layout,
                              const scalar_t* fast, scalar_t* scores) {
  dots(fast, query.rows, query.size, layout, scores);
  for (int64_t q = 0; q < query.size; ++q) scores[q] += query.base[q];
}

// From p̄ of the query to φ̄ = Σ_q p̄_q (e_q, 1), added to grad_fast, and ē_q = p̄_q u, added to
// grad_rows [Q, D].
template <typename scalar_t>
MULTIVERSION void query_adjoint(const Query<scalar_t>& query, const Layout<scalar_t>& layout,
                                const scalar_t* fast, const scalar_t* grad_scores,
                                Arena<scalar_t>& arena, scalar_t* grad_fast, scalar_t* grad_rows) {
  scalar_t* sum = arena.take(layout.stride);
  combine(grad_scores, query.rows, query.size, layout, sum);
  for (int64_t d = 0; d < layout.stride; ++d) grad_fast[d] += sum[d];
  if (grad_rows == nullptr) return;
  for (int64_t q = 0; q < query.size; ++q)
    for (int64_t d = 0; d < layout.dim; ++d)
      grad_rows[q * layout.dim + d] += grad_scores[q] * fast[d];
}

}  // namespace metarec_fast::cpu
