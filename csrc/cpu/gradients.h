// Where the gradients of a batch of tasks are collected: per task and entry straight into the
// result, shared ones in a record per block of tasks, summed over blocks in order.
#pragma once

#include "full_form.h"
#include "result_memory.h"
#include "sum_rows.h"
#include "task_reader.h"

namespace metarec_fast::cpu {

// The item of every gradient row, which tasks copy for themselves.
class RowIds {
 public:
  RowIds(const RaggedItems& support, const RaggedItems& query, const ItemRows& places)
      : ids(empty_result(query.items, ScalarType::Long, {places.size()})) {
    int64_t* to = ids.mutable_data_ptr<int64_t>();
    const auto place = [&to](Part& part, const OptionalTensor& from, int64_t of_each) {
      if (!from) return;
      part = {from->const_data_ptr<int64_t>(), to, of_each};
      to += from->numel();
    };
    if (places.support) {
      place(support_, support.items, 1);
      place(support_negatives_, support.negatives, places.support_negatives);
    }
    place(query_, query.items, 1);
    place(query_negatives_, query.negatives, places.query_negatives);
  }

  // Of the entries from `begin` up to `end`.
  void copy_support(int64_t begin, int64_t end) const {
    support_.copy(begin, end);
    support_negatives_.copy(begin, end);
  }
  void copy_query(int64_t begin, int64_t end) const {
    query_.copy(begin, end);
    query_negatives_.copy(begin, end);
  }

  Tensor ids;

 private:
  struct Part {
    const int64_t* from = nullptr;
    int64_t* to = nullptr;
    int64_t of_each = 0;  // ids of an entry

    void copy(int64_t begin, int64_t end) const {
      std::copy(from + begin * of_each, from + end * of_each, to + begin * of_each);
    }
  };
  Part support_, support_negatives_, query_, query_negatives_;
};

// All of them at once.
inline Tensor row_ids(const RaggedItems& support, const RaggedItems& query,
                      const ItemRows& places) {
  const RowIds rows(support, query, places);
  rows.copy_support(0, support.size());
  rows.copy_query(0, query.size());
  return rows.ids;
}

// Item gradients of so many bytes are written past the caches: nobody would find them there.
constexpr int64_t kStreamFrom = int64_t{6} << 20;

template <typename scalar_t>
class Gradients {
 public:
  Gradients(const Inputs& inputs, const LoopArguments& loop, Wanted wanted,
            const RaggedItems& query, int64_t num_blocks)
      : places(item_rows_of(inputs, loop, query)),
        layout_(inputs.D()),
        loss_(loop.loss),
        num_blocks_(num_blocks) {
    const Tensor& like = inputs.item_bias;
    const auto zeros = [&](bool is_wanted, const Tensor& shape) {
      if (!is_wanted) return OptionalTensor();
      Tensor result = shape.dim() == 0 ? empty(like, inputs.dtype(), {})
                      : shape.dim() == 1
                          ? empty(like, inputs.dtype(), {shape.size(0)})
                          : empty(like, inputs.dtype(), {shape.size(0), shape.size(1)});
      std::memset(result.mutable_data_ptr(), 0, result.numel() * sizeof(scalar_t));
      return OptionalTensor(std::move(result));
    };
    const auto optional_zeros = [&](bool is_wanted, const OptionalTensor& shape) {
      return shape ? zeros(is_wanted, *shape) : OptionalTensor();
    };
    user_init = zeros(wanted.start(), inputs.user_init);
    user_bias_init = zeros(wanted.start(), inputs.user_bias_init);
    offset = zeros(wanted.start(), inputs.offset);
    inner_lr = zeros(wanted.inner_lr(), loop.inner_lr);
    preconditioner = optional_zeros(wanted.preconditioner(), loop.preconditioner);
    prior_pull = optional_zeros(wanted.prior_pull(), loop.prior_pull);
    momentum = optional_zeros(wanted.momentum(), loop.momentum);
    support_weights = optional_zeros(wanted.support_weights(), inputs.weights);
    const int64_t rows = wanted.items() ? places.size() : 0;
    if (wanted.items()) {
      item_rows = empty_result(like, inputs.dtype(), {rows, inputs.D()});
      item_bias_rows = empty_result(like, inputs.dtype(), {rows});
    }

    // A block's record: φ̄_0, Ā, s̄, β̄, ρ̄, m̄, loss; whole registers, so that no two blocks share a
    // cache line.
    int64_t end = 0;
    const auto place = [&](int64_t count) {
      const int64_t begin = end;
      end += padded<scalar_t>(count);
      return begin;
    };
    const auto place_of = [&](const OptionalTensor& tensor, int64_t count) {
      return numel(tensor) > 0 ? Place{place(count), tensor->dim() == 0 ? 0 : 1} : Place{};
    };
    start_at_ = place(layout_.stride);
    scale_at_ = place_of(preconditioner, layout_.stride);
    inner_lr_at_ = place_of(inner_lr, numel(inner_lr));
    momentum_at_ = place_of(momentum, numel(momentum));
    pull_at_ = place_of(prior_pull, 1);
    offset_at_ = place(1);
    loss_at_ = place(1);
    record_size_ = end;
    static thread_local Arena<scalar_t> kept;
    kept.reset();
    records_ = kept.take_zeros(num_blocks * record_size_);
    rows_ = data(item_rows);
    stream_ = rows * inputs.D() * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamFrom &&
              layout_.dim == layout_.width &&
              reinterpret_cast<uintptr_t>(rows_) % kRegisterBytes<scalar_t> == 0;
    biases_ = data(item_bias_rows);
    per_task_user_ = inputs.per_task_start() && wanted.start() ? data(user_init) : nullptr;
    per_task_bias_ = inputs.per_task_bias() && wanted.start() ? data(user_bias_init) : nullptr;
    per_task_pull_ = prior_pull && prior_pull->dim() == 1 ? data(prior_pull) : nullptr;
    weights_ = data(support_weights);
  }

  // Where the adjoint of a task puts its gradients; `add_task` takes them from there.
  TaskGradients<scalar_t> of_task(int64_t block, const Task<scalar_t>& task, int64_t begin,
                                  Arena<scalar_t>& arena) {
    PerIndexSum<scalar_t> pull = sum_in_record(block, pull_at_);
    if (per_task_pull_ != nullptr) pull.values = per_task_pull_;
    scalar_t* rows = nullptr;
    if (rows_ != nullptr && places.support)
      rows = in_place(task) ? rows_ + begin * layout_.dim : arena.take(task.size * layout_.dim);
    scalar_t* weights = nullptr;
    if (weights_ != nullptr) weights = in_place(task) ? weights_ + begin : arena.take(task.size);
    return {arena.take(layout_.stride),
            rows,
            arena.take_zeros(task.size),
            weights,
            sum_in_record(block, scale_at_).values,
            sum_in_record(block, inner_lr_at_),
            sum_in_record(block, momentum_at_),
            pull,
            stream_ && !pairwise()};
  }

  // Books what a task's adjoint has found, and the gradients p̄ [Q · group] of its query scores.
  void add_task(int64_t block, const Task<scalar_t>& task, const TaskGradients<scalar_t>& grads,
                int64_t support_begin, const scalar_t* grad_scores, const Query<scalar_t>& query,
                int64_t query_begin) {
    scalar_t total = sum(grad_scores, query.size());
    if (loss_ != Loss::kBpr) total += sum(grads.base, task.size);  // differences know no offset
    add_start(block, task.index, grads.start, total);
    if (pairwise())
      add_pairs(task, grads, support_begin);
    else if (rows_ != nullptr && places.support)
      copy_out(grads.base, task.size, biases_ + support_begin);
    add_query_biases(grad_scores, query, query_begin);
  }

  // The same for a task whose items adapted: rows [I, width] and biases [I] of the distinct ones.
  // The first entry of an item gets its row, further ones zeros.
  void add_full_task(int64_t block, const Task<scalar_t>& task,
                     const FullGradients<scalar_t>& grads, const ItemIndex& index,
                     int64_t support_begin, const scalar_t* grad_scores,
                     const Query<scalar_t>& query, int64_t query_begin) {
    add_moves(block, task, grads, index, support_begin);
    add_query_biases(grad_scores, query, query_begin);
  }

  // Of that, what belongs to the start and to the support items.
  void add_moves(int64_t block, const Task<scalar_t>& task, const FullGradients<scalar_t>& grads,
                 const ItemIndex& index, int64_t support_begin) {
    add_start(block, task.index, grads.fast, grads.offset);
    if (rows_ == nullptr) return;
    if (grads.rows == nullptr && index.all_distinct())
      return copy_out(grads.biases, task.size, biases_ + support_begin);
    for (int64_t e = 0, next = 0; e < task.size; ++e) {
      const int64_t i = index.place[e];
      const bool first = i == next;  // items are numbered as they come
      if (grads.rows != nullptr)
        copy_scaled(grads.rows + i * layout_.width, scalar_t(first), layout_.dim,
                    support_row(support_begin + e));
      biases_[support_begin + e] = first ? grads.biases[i] : 0;
      next += first;
    }
  }

  // Where a task whose items adapt, and which has none of that yet, puts its gradients. Without
  // `own_rows` whoever fills it sees to those of items himself.
  FullGradients<scalar_t> of_full_task(int64_t block, int64_t items, int64_t begin,
                                       Arena<scalar_t>& arena, bool own_rows = true) {
    scalar_t* weights = weights_ != nullptr ? weights_ + begin : nullptr;
    const int64_t numbers = FullPath<scalar_t>::padded_rows(items) * layout_.width;
    return {arena.take_zeros(layout_.stride),
            own_rows ? arena.take_zeros(numbers) : nullptr,
            arena.take_zeros(items),
            0,
            weights,
            sum_in_record(block, inner_lr_at_)};
  }

  // The row of a support entry's own item, or nullptr where rows are not wanted.
  scalar_t* support_row(int64_t entry) const {
    return rows_ == nullptr ? nullptr : rows_ + entry * layout_.dim;
  }

  scalar_t* query_row(int64_t entry, int64_t j) {
    return rows_ == nullptr ? nullptr : rows_ + places.of_query(entry, j) * layout_.dim;
  }

  // Whether rows are written past the caches.
  bool stream() const { return stream_; }

  void add_loss(int64_t block, scalar_t loss) { records_[block * record_size_ + loss_at_] += loss; }

  // Sums the blocks' records, always in the same order; returns the loss.
  double finish() {
    static thread_local std::vector<double> totals;  // a large block would make malloc tidy up
    totals.assign(record_size_, 0.0);
    for (int64_t block = 0; block < num_blocks_; ++block)
      add_record(records_ + block * record_size_, record_size_, totals.data());
    const double* total = totals.data();
    const auto take_total = [total](int64_t at, int64_t count, scalar_t* result) {
      for (int64_t i = 0; i < count; ++i) result[i] = static_cast<scalar_t>(total[at + i]);
    };
    if (per_task_user_ == nullptr) take_total(start_at_, numel(user_init), data(user_init));
    if (per_task_bias_ == nullptr)
      take_total(start_at_ + layout_.width, numel(user_bias_init), data(user_bias_init));
    take_total(offset_at_, numel(offset), data(offset));
    take_total(inner_lr_at_.at, numel(inner_lr), data(inner_lr));
    take_total(momentum_at_.at, numel(momentum), data(momentum));
    if (per_task_pull_ == nullptr) take_total(pull_at_.at, numel(prior_pull), data(prior_pull));
    if (preconditioner) {
      take_total(scale_at_.at, layout_.dim, data(preconditioner));
      take_total(scale_at_.at + layout_.width, 1, data(preconditioner) + layout_.dim);
    }
    scalar_t loss = 0;
    take_total(loss_at_, 1, &loss);
    return loss;
  }

  GradientTuple tuple() const { return with_items(item_rows, item_bias_rows); }

  // The same with the items' gradients, if wanted, as whole tables: [N, D] and [N].
  GradientTuple dense_tuple(const Inputs& inputs, const RaggedItems& query) const {
    if (!item_rows) return tuple();
    const Tensor ids = row_ids(inputs.support, query, places);
    return with_items(sum_rows(ids, *item_rows, inputs.N()),
                      sum_rows(ids, *item_bias_rows, inputs.N()));
  }

  // What is not wanted, or not given, is not there.
  OptionalTensor user_init, user_bias_init, item_rows, item_bias_rows, offset, inner_lr,
      preconditioner, prior_pull, momentum, support_weights;
  const ItemRows places;

 private:
  GradientTuple with_items(const OptionalTensor& table, const OptionalTensor& bias) const {
    return {user_init, user_bias_init, table,      bias,     offset,
            inner_lr,  preconditioner, prior_pull, momentum, support_weights};
  }

  static scalar_t* data(OptionalTensor& tensor) {
    return numel(tensor) == 0 ? nullptr : tensor->mutable_data_ptr<scalar_t>();
  }

  ALWAYS_INLINE void add_start(int64_t block, int64_t task, const scalar_t* start,
                               scalar_t offset) {
    scalar_t* record = records_ + block * record_size_;
    if (per_task_user_ != nullptr)
      std::copy(start, start + layout_.dim, per_task_user_ + task * layout_.dim);
    if (per_task_bias_ != nullptr) per_task_bias_[task] = start[layout_.width];
    for (int64_t d = 0; d < layout_.stride; d += kLanes<scalar_t>)
      store(record + start_at_ + d) += load(start + d);
    record[offset_at_] += offset;
  }

  ALWAYS_INLINE void add_query_biases(const scalar_t* grad_scores, const Query<scalar_t>& query,
                                      int64_t begin) {
    if (rows_ == nullptr) return;
    if (query.group == 1)
      return copy_out(grad_scores, query.num_entries, biases_ + places.of_query(begin, 0));
    for (int64_t q = 0, i = 0; q < query.num_entries; ++q)
      for (int64_t j = 0; j < query.group; ++j)
        biases_[places.of_query(begin + q, j)] = grad_scores[i++];
  }

  // Where a record has a gradient's numbers, and whether one for each index; nowhere if not wanted.
  struct Place {
    int64_t at = -1, stride = 0;
  };
  PerIndexSum<scalar_t> sum_in_record(int64_t block, const Place& place) const {
    return {place.at < 0 ? nullptr : records_ + block * record_size_ + place.at, place.stride};
  }

  bool pairwise() const { return is_pairwise(loss_); }
  // Whether a task's rows are, in their order, those of the support items.
  bool in_place(const Task<scalar_t>& task) const {
    return loss_ != Loss::kSoftmax && task.group == 1;
  }

  // From the rows of a task, differences or candidates, to those of its items and negatives.
  ALWAYS_INLINE void add_pairs(const Task<scalar_t>& task, const TaskGradients<scalar_t>& grads,
                               int64_t begin) {
    const int64_t group = task.group, dim = layout_.dim;
    const bool differences = loss_ == Loss::kBpr;
    for (int64_t s = 0; s < task.num_entries; ++s) {
      if (grads.weights != nullptr) {
        scalar_t sum = 0;
        for (int64_t j = 0; j < group; ++j) sum += grads.weights[s * group + j];
        weights_[begin + s] = differences ? sum / static_cast<scalar_t>(group) : sum;
      }
      if (grads.rows == nullptr) continue;
      const scalar_t* rows = grads.rows + s * group * dim;
      const scalar_t* base = grads.base + s * group;
      scalar_t* own = rows_ + (begin + s) * dim;
      scalar_t& own_bias = biases_[begin + s];
      if (rows != own) copy_scaled(rows, scalar_t{1}, dim, own);
      own_bias = base[0];
      for (int64_t j = differences ? 0 : 1; j < group; ++j) {
        const int64_t place = places.of_support(begin + s, differences ? j + 1 : j);
        const scalar_t sign = differences ? -1 : 1;
        copy_scaled(rows + j * dim, sign, dim, rows_ + place * dim);
        biases_[place] = sign * base[j];
        if (!differences || j == 0) continue;
        add(rows + j * dim, dim, own);
        own_bias += base[j];
      }
    }
  }

  static void add_record(const scalar_t* record, int64_t count, double* totals) {
    for (int64_t i = 0; i < count; ++i) totals[i] += record[i];
  }

  Layout<scalar_t> layout_;
  Loss loss_;
  int64_t num_blocks_;
  int64_t start_at_, offset_at_, loss_at_, record_size_;
  Place scale_at_, inner_lr_at_, momentum_at_, pull_at_;
  scalar_t* records_;  // [num_blocks, record_size], this thread's
  scalar_t *rows_, *biases_, *weights_, *per_task_user_, *per_task_bias_, *per_task_pull_;
  bool stream_;
};

// Writes the rows  Σ_k C[q, k] φ_k  of the query's candidates;  C's column k holds the p̄ of step k.
template <typename scalar_t>
void write_query_rows(const Query<scalar_t>& query, int64_t begin, const Layout<scalar_t>& layout,
                      const scalar_t* grad_scores, int64_t column_stride, const scalar_t* path,
                      int64_t steps, Arena<scalar_t>& arena, Gradients<scalar_t>& gradients) {
  if (query.num_entries == 0) return;
  for (int64_t j = 0; j < query.group; ++j) {
    scalar_t* first = gradients.query_row(begin, j);
    if (first == nullptr) return;
    const int64_t row_stride = j == 0 ? layout.dim : (query.group - 1) * layout.dim;
    write_rows<scalar_t>(layout, {grad_scores + j, query.group, column_stride}, query.num_entries,
                         Stack<scalar_t>{path, layout.stride}, steps, arena, first, row_stride,
                         gradients.stream());
  }
}

}  // namespace metarec_fast::cpu
