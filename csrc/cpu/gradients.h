// Where the gradients of a batch of tasks are collected: per task and entry straight into the
// result, shared ones in a record per block of tasks, summed over blocks in order.
#pragma once

#include <tuple>

#include "task_reader.h"

namespace metarec_fast::cpu {

using GradientTuple =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename scalar_t>
class Gradients {
 public:
  // Item gradients have a row per support entry, then one per query entry.
  Gradients(const Inputs& inputs, const LoopArguments& loop, Wanted wanted, int64_t num_query,
            int64_t num_blocks)
      : layout_(inputs.D()), num_support_(inputs.support.size()), num_blocks_(num_blocks) {
    const Tensor& table = inputs.item_table;
    const auto zeros = [&](bool is_wanted, const Tensor& like) {
      return is_wanted ? torch::stable::new_zeros(table, like.sizes())
                       : torch::stable::new_empty(table, {0});
    };
    const auto optional_zeros = [&](bool is_wanted, const OptionalTensor& like) {
      return zeros(is_wanted && like, like ? *like : table);
    };
    user_init = zeros(wanted.start(), inputs.user_init);
    user_bias_init = zeros(wanted.start(), inputs.user_bias_init);
    offset = zeros(wanted.start(), inputs.offset);
    inner_lr = zeros(wanted.inner_lr(), loop.inner_lr);
    preconditioner = optional_zeros(wanted.preconditioner(), loop.preconditioner);
    prior_pull = optional_zeros(wanted.prior_pull(), loop.prior_pull);
    momentum = optional_zeros(wanted.momentum(), loop.momentum);
    support_weights = optional_zeros(wanted.support_weights(), inputs.weights);
    const int64_t entries = wanted.items() ? num_support_ + num_query : 0;
    item_rows = wanted.items() ? torch::stable::new_empty(table, {entries, inputs.D()})
                               : torch::stable::new_empty(table, {0});
    item_bias_rows = torch::stable::new_empty(table, {entries});

    // A block's record: φ̄_0, Ā, s̄, β̄, ρ̄, m̄, loss; whole registers, so that no two blocks share a
    // cache line.
    int64_t end = 0;
    const auto place = [&](int64_t count) {
      const int64_t begin = end;
      end += padded<scalar_t>(count);
      return begin;
    };
    start_at_ = place(layout_.stride);
    scale_at_ = place(layout_.stride);
    inner_lr_at_ = place(inner_lr.numel());
    momentum_at_ = place(momentum.numel());
    pull_at_ = place(1);
    offset_at_ = place(1);
    loss_at_ = place(1);
    record_size_ = end;
    records_ = arena_.take_zeros(num_blocks * record_size_);
    rows_ = data(item_rows);
    biases_ = data(item_bias_rows);
    per_task_user_ = inputs.per_task_start() && wanted.start() ? data(user_init) : nullptr;
    per_task_bias_ = inputs.per_task_bias() && wanted.start() ? data(user_bias_init) : nullptr;
    shared_pull_ = prior_pull.dim() == 0;
  }

  // Where the gradients of a task go whose support entries begin at `begin`; `start` is scratch for
  // φ̄_0.
  TaskGradients<scalar_t> of_task(int64_t block, int64_t begin, scalar_t* start, scalar_t* base) {
    scalar_t* record = records_ + block * record_size_;
    const auto sum = [&](const Tensor& tensor, int64_t at) {
      const bool is_wanted = tensor.numel() > 0;
      return PerIndexSum<scalar_t>{is_wanted ? record + at : nullptr, tensor.dim() == 0 ? 0 : 1};
    };
    PerIndexSum<scalar_t> pull = sum(prior_pull, pull_at_);
    if (pull && !shared_pull_) pull.values = data(prior_pull);
    return {start,
            rows_ == nullptr ? nullptr : rows_ + begin * layout_.dim,
            base,
            support_weights.numel() > 0 ? data(support_weights) + begin : nullptr,
            preconditioner.numel() > 0 ? record + scale_at_ : nullptr,
            sum(inner_lr, inner_lr_at_),
            sum(momentum, momentum_at_),
            pull};
  }

  // Rows for the gradients of `size` query entries from `begin`, zero so far; nullptr if not
  // wanted.
  scalar_t* zeroed_query_rows(int64_t begin, int64_t size) {
    if (rows_ == nullptr) return nullptr;
    scalar_t* result = rows_ + (num_support_ + begin) * layout_.dim;
    std::fill(result, result + size * layout_.dim, scalar_t{0});
    return result;
  }

  // Books what a task's adjoint has found: φ̄_0, and the gradient of m + b for its support and query
  // entries.
  void add_task(int64_t block, int64_t task, const scalar_t* start, const scalar_t* base,
                int64_t support_begin, int64_t support_size, const scalar_t* grad_scores,
                int64_t query_begin, int64_t query_size) {
    scalar_t* record = records_ + block * record_size_;
    if (per_task_user_ != nullptr)
      std::copy(start, start + layout_.dim, per_task_user_ + task * layout_.dim);
    if (per_task_bias_ != nullptr) per_task_bias_[task] = start[layout_.width];
    for (int64_t d = 0; d < layout_.stride; ++d) record[start_at_ + d] += start[d];
    scalar_t sum = 0;
    for (int64_t s = 0; s < support_size; ++s) sum += base[s];
    for (int64_t q = 0; q < query_size; ++q) sum += grad_scores[q];
    record[offset_at_] += sum;
    if (rows_ == nullptr) return;
    std::copy(base, base + support_size, biases_ + support_begin);
    std::copy(grad_scores, grad_scores + query_size, biases_ + num_support_ + query_begin);
  }

  void add_loss(int64_t block, scalar_t loss) { records_[block * record_size_ + loss_at_] += loss; }

  // Sums the blocks' records; returns the loss.
  double finish() {
    if (user_init.numel() > 0 && per_task_user_ == nullptr)
      sum_blocks(start_at_, layout_.dim, data(user_init));
    if (user_bias_init.numel() > 0 && per_task_bias_ == nullptr)
      sum_blocks(start_at_ + layout_.width, 1, data(user_bias_init));
    if (offset.numel() > 0) sum_blocks(offset_at_, 1, data(offset));
    if (inner_lr.numel() > 0) sum_blocks(inner_lr_at_, inner_lr.numel(), data(inner_lr));
    if (momentum.numel() > 0) sum_blocks(momentum_at_, momentum.numel(), data(momentum));
    if (prior_pull.numel() > 0 && shared_pull_) sum_blocks(pull_at_, 1, data(prior_pull));
    if (preconditioner.numel() > 0) {
      sum_blocks(scale_at_, layout_.dim, data(preconditioner));
      sum_blocks(scale_at_ + layout_.width, 1, data(preconditioner) + layout_.dim);
    }
    scalar_t loss = 0;
    sum_blocks(loss_at_, 1, &loss);
    return loss;
  }

  GradientTuple tuple() const { return with_items(item_rows, item_bias_rows); }

  GradientTuple with_items(const Tensor& table, const Tensor& bias) const {
    return {user_init, user_bias_init, table,      bias,     offset,
            inner_lr,  preconditioner, prior_pull, momentum, support_weights};
  }

  Tensor user_init, user_bias_init, item_rows, item_bias_rows, offset, inner_lr, preconditioner,
      prior_pull, momentum, support_weights;

 private:
  static scalar_t* data(Tensor& tensor) {
    return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr<scalar_t>();
  }

  void sum_blocks(int64_t at, int64_t count, scalar_t* result) const {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < num_blocks_; ++block)
        sum += records_[block * record_size_ + at + i];
      result[i] = static_cast<scalar_t>(sum);
    }
  }

  Layout<scalar_t> layout_;
  int64_t num_support_, num_blocks_;
  int64_t start_at_, scale_at_, inner_lr_at_, momentum_at_, pull_at_, offset_at_, loss_at_;
  int64_t record_size_;
  Arena<scalar_t> arena_;
  scalar_t* records_;
  scalar_t *rows_, *biases_, *per_task_user_, *per_task_bias_;
  bool shared_pull_;
};

}  // namespace metarec_fast::cpu
