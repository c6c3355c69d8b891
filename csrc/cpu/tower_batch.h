// The tasks of a batch under an MLP tower, and where their gradients are collected: per task and
// entry straight into the result, those of the parameters in a record per block of tasks, summed
// over blocks in order.
#pragma once

#include <tuple>

#include "gradients.h"
#include "tower_task.h"

namespace metarec_fast::cpu {

// The gradients of user_part, parameters, inner_lr; item rows and their ids.
using TowerTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename scalar_t>
class TowerBatch {
 public:
  explicit TowerBatch(const TowerInputs& inputs)
      : tower(inputs, largest(inputs.support)),
        settings{inputs.steps, inputs.rates(inputs.inner_lr.const_data_ptr<scalar_t>()),
                 inputs.activation, inputs.first_order},
        support(entry_data<scalar_t>(inputs.support)),
        query(entry_data<scalar_t>(inputs.query)),
        inputs_(inputs),
        table_(inputs.item_table, inputs.D()),
        item_bias_(inputs.item_bias ? inputs.item_bias->const_data_ptr<scalar_t>() : nullptr),
        targets_(inputs.targets ? inputs.targets->const_data_ptr<scalar_t>() : nullptr),
        weights_(inputs.weights ? inputs.weights->const_data_ptr<scalar_t>() : nullptr) {
    check_ragged("support", inputs.support, inputs.N());
    check_ragged("query", inputs.query, inputs.N());
  }

  // Records of all blocks together stay below kMostNumbers, if eight do.
  TaskBlocks blocks() const {
    const int64_t most = std::clamp<int64_t>(kMostNumbers / tower.record_size, 8, kMostTowerBlocks);
    const int64_t cost = tower.record_size * (2 + 3 * inputs_.steps) * support.candidates();
    return TaskBlocks(inputs_.T(), support.offsets, query.offsets, cost, most);
  }

  // body(block, t, adapted, arena) for every task with a query, and nothing(t) for the others.
  template <typename Body, typename Nothing>
  void run(const TaskBlocks& blocks, const Body& body, const Nothing& nothing) const {
    blocks.template run<Worker>([&](int64_t block, int64_t t, int64_t last, Worker& worker) {
      if (query.size(t) == 0) return nothing(t);
      Arena<scalar_t>& arena = worker.arena;
      arena.reset();
      if (t + 1 < last) ask_for_rows(t + 1);
      const int64_t stride = tower.item.in_stride;
      const TowerEntries<scalar_t> known(table_, item_bias_, support, t, stride, arena);
      const TowerEntries<scalar_t> asked(table_, item_bias_, query, t, stride, arena);
      const TowerLoss<scalar_t> loss(inputs_.loss, support, support.begin(t), support.size(t),
                                     targets_, weights_, arena);
      const scalar_t* user =
          inputs_.user_part.template const_data_ptr<scalar_t>() + t * inputs_.Du();
      TowerTask<scalar_t> task(tower, settings, loss, user, known, asked, arena, worker.path);
      task.adapt();
      body(block, t, task, arena);
    });
  }

  const Tower<scalar_t> tower;
  const TowerSettings<scalar_t> settings;
  const EntryData<scalar_t> support, query;

 private:
  static constexpr int64_t kMostTowerBlocks = 64, kMostNumbers = int64_t{1} << 22;

  struct Worker {
    Arena<scalar_t>& arena = thread_arena<scalar_t>();
    std::vector<LayerStep<scalar_t>> path;
  };

  // Candidates of the largest task.
  static int64_t largest(const RaggedItems& entries) {
    const int64_t* offsets = entries.offsets.const_data_ptr<int64_t>();
    int64_t result = 0;
    for (int64_t t = 0; t < entries.num_tasks; ++t)
      result = std::max(result, offsets[t + 1] - offsets[t]);
    return result * entries.candidates();
  }

  void ask_for_rows(int64_t t) const {
    for (const EntryData<scalar_t>* entries : {&support, &query})
      for (int64_t i = entries->begin(t); i < entries->begin(t + 1); ++i)
        for (int64_t j = 0; j < entries->candidates(); ++j)
          prefetch_row<false, 2>(table_.data + entries->candidate(i, j) * table_.row_bytes,
                                 table_.row_bytes);
  }

  const TowerInputs& inputs_;
  const ItemTable<scalar_t> table_;
  const scalar_t* item_bias_;
  const scalar_t* targets_;
  const scalar_t* weights_;
};

template <typename scalar_t>
class TowerSums {
 public:
  TowerSums(const TowerInputs& inputs, const Tower<scalar_t>& tower, int64_t num_blocks)
      : inputs_(inputs),
        tower_(tower),
        places_{inputs.support.size(), inputs.support.num_negatives(), inputs.query.size(),
                inputs.query.num_negatives(), !inputs.first_order},
        num_blocks_(num_blocks) {
    const Tensor& like = inputs.item_table;
    user_part_ = empty(like, inputs.dtype(), {inputs.T(), inputs.Du()});
    parameters_ = empty(like, inputs.dtype(), {inputs.parameters.size(0)});
    const Tensor& rates = inputs.inner_lr;
    inner_lr_ = rates.dim() == 0   ? empty(like, inputs.dtype(), {})
                : rates.dim() == 1 ? empty(like, inputs.dtype(), {rates.size(0)})
                                   : empty(like, inputs.dtype(), {rates.size(0), rates.size(1)});
    rows_ = empty_result(like, inputs.dtype(), {places_.size(), inputs.D()});
    ids_ = row_ids(inputs.support, inputs.query, places_);
    loss_at_ = tower.record_size + padded<scalar_t>(inner_lr_.numel());
    record_size_ = loss_at_ + kLanes<scalar_t>;
    static thread_local Arena<scalar_t> kept;
    kept.reset();
    records_ = kept.take_zeros(num_blocks * record_size_);
  }

  // Where the gradients of task t go.
  TowerGradients<scalar_t> of_task(int64_t block, int64_t t, const EntryData<scalar_t>& support,
                                   const EntryData<scalar_t>& query) const {
    scalar_t* record = records_ + block * record_size_;
    return {record,
            inputs_.rates(record + tower_.record_size),
            data(user_part_) + t * inputs_.Du(),
            data(rows_),
            places_,
            inputs_.D(),
            support.begin(t),
            query.begin(t)};
  }

  // A task without a query, whose gradients are zero.
  void add_nothing(int64_t t, const EntryData<scalar_t>& support) const {
    std::fill_n(data(user_part_) + t * inputs_.Du(), inputs_.Du(), scalar_t{0});
    for (int64_t entry = support.begin(t); places_.support && entry < support.begin(t + 1); ++entry)
      for (int64_t j = 0; j < support.candidates(); ++j)
        std::fill_n(data(rows_) + places_.of_support(entry, j) * inputs_.D(), inputs_.D(),
                    scalar_t{0});
  }

  void add_loss(int64_t block, scalar_t loss) const {
    records_[block * record_size_ + loss_at_] += loss;
  }

  // Sums over blocks; returns the loss.
  scalar_t finish() const {
    for (int64_t block = 1; block < num_blocks_; ++block) {
      const scalar_t* record = records_ + block * record_size_;
      for (int64_t i = 0; i < record_size_; i += kLanes<scalar_t>)
        store(records_ + i) += load(record + i);
    }
    tower_.unpack(records_, data(parameters_));
    std::copy_n(records_ + tower_.record_size, inner_lr_.numel(), data(inner_lr_));
    return records_[loss_at_];
  }

  TowerTuple tuple() const { return {user_part_, parameters_, inner_lr_, rows_, ids_}; }

 private:
  static scalar_t* data(const Tensor& tensor) { return tensor.mutable_data_ptr<scalar_t>(); }

  const TowerInputs& inputs_;
  const Tower<scalar_t>& tower_;
  const ItemRows places_;
  int64_t num_blocks_, loss_at_, record_size_;
  Tensor user_part_, parameters_, inner_lr_, rows_, ids_;
  scalar_t* records_;
};

}  // namespace metarec_fast::cpu
