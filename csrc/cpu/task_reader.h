// From the tensors of an operator to one task at a time.
#pragma once

#include "../arguments.h"
#include "item_table.h"
#include "task.h"
#include "task_blocks.h"

namespace metarec_fast::cpu {

// Scratch of one thread. It keeps its size from call to call: the largest task's, not the batch's.
template <typename scalar_t>
Arena<scalar_t>& thread_arena() {
  static thread_local Arena<scalar_t> arena;
  return arena;
}

// What a thread works with: its scratch, the rows that it has asked for, and what a form keeps.
template <typename scalar_t, typename State>
struct Worker {
  Arena<scalar_t>& arena = thread_arena<scalar_t>();
  RowsAhead ahead;
  State state;
};

template <typename scalar_t>
class TaskReader {
 public:
  TaskReader(const Inputs& inputs, const LoopArguments& arguments)
      : layout(inputs.D()),
        loop(arguments.view<scalar_t>()),
        support(entry_data<scalar_t>(inputs.support)),
        user_init_(inputs.user_init.const_data_ptr<scalar_t>()),
        user_bias_init_(inputs.user_bias_init.const_data_ptr<scalar_t>()),
        item_table_(inputs.item_table, inputs.D()),
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

  // Multiply-adds that an entry takes, about: each step goes over its rows twice, there and back.
  int64_t entry_cost() const {
    return group() * layout.width * 4 * (4 + std::max<int64_t>(loop.steps, 1));
  }

  // Rows of an entry.
  int64_t group() const { return support.group(loop.loss); }

  // Task t of a worker whose last is `last` − 1, in an arena that held the one before it; rows of
  // the next, of `query` too, are going to be asked for meanwhile.
  Task<scalar_t> next(int64_t t, int64_t last, const EntryData<scalar_t>* query,
                      Arena<scalar_t>& arena, RowsAhead& ahead) const {
    arena.reset();
    if (t + 1 < last)
      aim(ahead, t + 1, query);
    else
      ahead.stop();
    return read(t, arena, ahead);
  }

  // The first `group` candidates of every entry, and their scores at a fast vector 0. Rows stay in
  // the table if they can.
  ALWAYS_INLINE Rows<scalar_t> read_rows(const EntryData<scalar_t>& entries, int64_t begin,
                                         int64_t size, int64_t group, Arena<scalar_t>& arena,
                                         scalar_t* base) const {
    const ItemTable<scalar_t> table = item_table_;  // where stores cannot change it
    const scalar_t* item_bias = item_bias_;
    const scalar_t offset = offset_;
    const int64_t width = layout.width, count = size * group;
    const scalar_t** at = take_addresses<scalar_t>(arena, count);
    if (group == 1 && table.in_place()) {
      const int64_t* items = entries.items + begin;
      for (int64_t s = 0; s < size; ++s) {
        at[s] = table.row(items[s]);
        base[s] = offset + item_bias[items[s]];
      }
    } else {
      scalar_t* copies = table.in_place() ? nullptr : arena.take(count * width);
      for (int64_t s = 0, r = 0; s < size; ++s)
        for (int64_t j = 0; j < group; ++j, ++r) {
          const int64_t item = entries.candidate(begin + s, j);
          at[r] = copies == nullptr ? table.row(item) : copies + r * width;
          if (copies != nullptr) table.read(item, copies + r * width);
          base[r] = offset + item_bias[item];
        }
    }
    fill_up(at, count);
    return {at, count, width, 1};
  }

  const Layout<scalar_t> layout;
  const InnerLoop<scalar_t> loop;
  const EntryData<scalar_t> support;

 private:
  // Task t, its rows gathered into the arena.
  Task<scalar_t> read(int64_t t, Arena<scalar_t>& arena, RowsAhead& ahead) const {
    const int64_t begin = support.begin(t), size = support.size(t), group = this->group(),
                  count = size * group;
    Rows<scalar_t> rows;
    const auto [base, targets, weights, start] =
        arena.take_each(count, count, count, layout.stride);
    pack(user_init_ + t * user_stride_, user_bias_init_[t * bias_stride_], layout, start);
    if (loop.loss == Loss::kBpr) {
      rows = read_differences(begin, size, arena, base);
      fill(targets, count, scalar_t{1});
    } else {
      rows = read_rows(support, begin, size, group, arena, base);
      if (support.log_q != nullptr)
        for (int64_t r = 0; r < count; ++r) base[r] -= support.log_q[begin * group + r];
      if (loop.loss == Loss::kSoftmax)
        for (int64_t r = 0; r < count; ++r) targets[r] = r % group == 0 ? 1 : 0;
      else
        copy_in(targets_ + begin, size, targets);
    }
    if (weights_ == nullptr)
      fill(weights, count, entry_share());
    else if (group == 1)
      copy_in(weights_ + begin, size, weights);
    else
      for (int64_t r = 0; r < count; ++r) weights[r] = weights_[begin + r / group] * entry_share();
    return {layout, loop,    t,       size,  group,  count, rows,
            base,   targets, weights, start, scale_, ahead};
  }

  // How much of an entry's weight falls on each of its rows: bpr is the mean over the negatives.
  scalar_t entry_share() const {
    return loop.loss == Loss::kBpr ? scalar_t{1} / static_cast<scalar_t>(support.num_negatives)
                                   : scalar_t{1};
  }

  // Lets `ahead` ask for the rows of task `t`, bit by bit while the one before it is adapted.
  void aim(RowsAhead& ahead, int64_t t, const EntryData<scalar_t>* query) const {
    ahead.start(item_table_, item_bias_);
    for (const EntryData<scalar_t>* entries : {&support, query}) {
      if (entries == nullptr) continue;
      const int64_t begin = entries->begin(t), end = entries->begin(t + 1),
                    M = entries->num_negatives;
      ahead.add(entries->items + begin, end - begin);
      if (M > 0) ahead.add(entries->negatives + begin * M, (end - begin) * M);
    }
    ahead.share_out(loop.steps);
  }

  // A row for each pair of an entry's item and a negative: their difference.
  ALWAYS_INLINE Rows<scalar_t> read_differences(int64_t begin, int64_t size, Arena<scalar_t>& arena,
                                                scalar_t* base) const {
    const int64_t M = support.num_negatives, width = layout.width, count = size * M;
    const ItemTable<scalar_t> table = item_table_;  // where stores cannot change it
    scalar_t *copies = arena.take(2 * width), *rows = arena.take(count * width), *row = rows;
    const auto row_of = [&](int64_t item, scalar_t* copy) ALWAYS_INLINE_LAMBDA {
      if (table.in_place()) return table.row(item);
      table.read(item, copy);
      return static_cast<const scalar_t*>(copy);
    };
    for (int64_t s = begin; s < begin + size; ++s)
      for (int64_t m = 0; m < M; ++m, row += width) {
        const int64_t chosen = support.items[s], other = support.negatives[s * M + m];
        const scalar_t *more = row_of(chosen, copies), *less = row_of(other, copies + width);
        for (int64_t i = 0; i < width; i += kLanes<scalar_t>)
          store(row + i) = load(more + i) - load(less + i);
        *base++ = item_bias_[chosen] - item_bias_[other];
      }
    return rows_of<scalar_t>({rows, width}, count, width, 0, arena);
  }

  const scalar_t *user_init_, *user_bias_init_;
  const ItemTable<scalar_t> item_table_;
  const scalar_t* item_bias_;
  scalar_t offset_;
  const scalar_t *targets_, *weights_;
  int64_t user_stride_, bias_stride_;
  Arena<scalar_t> scratch_;
  scalar_t* scale_;
};

// The query entries of one task; with negatives, all candidates of each, entry by entry.
template <typename scalar_t>
struct Query {
  int64_t num_entries;   // Q
  int64_t group;         // candidates of an entry
  Rows<scalar_t> rows;   // [Q · group, width]
  const scalar_t* base;  // m + b [Q · group]

  int64_t size() const { return rows.count; }
};

template <typename scalar_t>
Query<scalar_t> read_query(const TaskReader<scalar_t>& reader, const EntryData<scalar_t>& entries,
                           int64_t t, Arena<scalar_t>& arena) {
  const int64_t size = entries.size(t), group = 1 + entries.num_negatives;
  scalar_t* base = arena.take(size * group);
  const Rows<scalar_t> rows = reader.read_rows(entries, entries.begin(t), size, group, arena, base);
  return {size, group, rows, base};
}

// scores[q] = m + b_q + c + u·e_q, padded
template <typename scalar_t>
void score_query(const Query<scalar_t>& query, const scalar_t* fast, scalar_t* scores) {
  score_rows(query.rows, query.base, fast, scores);
}

// φ̄ = Σ_q p̄_q (e_q, 1), from p̄ padded with zeros
template <typename scalar_t>
void query_adjoint(const Query<scalar_t>& query, const scalar_t* grad_scores, scalar_t* grad_fast) {
  combine<scalar_t>(grad_scores, query.rows, nullptr, grad_fast);
}

}  // namespace metarec_fast::cpu
