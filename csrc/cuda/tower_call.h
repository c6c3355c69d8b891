// From the tensors of an operator of an MLP tower to its launches, and back to tensors.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../mlp_arguments.h"
#include "launch.h"
#include "totals.h"
#include "tower.h"

namespace metarec_fast::cuda {

// The gradients of user_part, parameters, inner_lr; item rows and their ids.
using TowerTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct TowerGradients {
  Tensor user_part, parameters, inner_lr, item_rows, item_ids;
  const ItemRows places;

  explicit TowerGradients(const TowerInputs& inputs)
      : places{inputs.support.size(), inputs.support.num_negatives(), inputs.query.size(),
               inputs.query.num_negatives(), !inputs.first_order} {
    const Tensor& like = inputs.item_table;
    const ScalarType dtype = inputs.dtype();
    user_part = empty(like, dtype, {inputs.T(), inputs.Du()});
    parameters = empty(like, dtype, {inputs.parameters.size(0)});
    const Tensor& rates = inputs.inner_lr;
    inner_lr = rates.dim() == 0   ? empty(like, dtype, {})
               : rates.dim() == 1 ? empty(like, dtype, {rates.size(0)})
                                  : empty(like, dtype, {rates.size(0), rates.size(1)});
    item_rows = empty(like, dtype, {places.size(), inputs.D()});
    item_ids = empty(inputs.query.items, ScalarType::Long, {places.size()});
  }

  TowerTuple tuple() const { return {user_part, parameters, inner_lr, item_rows, item_ids}; }
};

// One call of the kernels of a tower.
template <typename scalar_t>
class TowerCall {
 public:
  TowerWork<scalar_t> work{};
  cudaStream_t stream;

  TowerCall(const char* op, const TowerInputs& inputs, Ask ask, cudaStream_t stream_in)
      : stream(stream_in), op_(op), inputs_(inputs) {
    STD_TORCH_CHECK(inputs.widths.size() <= kMostLayers + 1, op, ": expected at most ", kMostLayers,
                    " layers, got ", inputs.widths.size() - 1);
    STD_TORCH_CHECK(inputs.parameters.size(0) <= std::numeric_limits<int>::max() / 2, op,
                    ": expected fewer parameters than 2^30, got ", inputs.parameters.size(0));
    work.shape = shape_of(inputs.widths);
    work.user_part = inputs.user_part.const_data_ptr<scalar_t>();
    work.item_table = inputs.item_table.const_data_ptr<scalar_t>();
    work.item_bias = data<scalar_t>(inputs.item_bias);
    work.parameters = inputs.parameters.const_data_ptr<scalar_t>();
    work.user_width = static_cast<int>(inputs.Du());
    work.dim = static_cast<int>(inputs.D());
    work.support = entry_data<scalar_t>(inputs.support);
    work.targets = data<scalar_t>(inputs.targets);
    work.weights = data<scalar_t>(inputs.weights);
    work.inner_lr = inputs.rates(inputs.inner_lr.const_data_ptr<scalar_t>());
    work.num_tasks = inputs.T();
    work.most_rows = inputs.largest_support * inputs.support.candidates();
    work.query_rows = static_cast<int>(std::max<int64_t>(kQueryRows, inputs.query.candidates()));
    work.steps = static_cast<int>(inputs.steps);
    work.activation = inputs.activation;
    work.loss = inputs.loss;
    work.first_order = inputs.first_order;
    work.query.ask = ask;
    work.query.entries = entry_data<scalar_t>(inputs.query);
    work.record = {work.shape.size, static_cast<int>(inputs.inner_lr.numel())};
  }

  // 1/Σ ω over the tasks with a query.
  void normalise(const scalar_t* task_weights) {
    normalisers_ = empty(inputs_.item_table, inputs_.dtype(), {2});
    work.query.task_weights = task_weights;
    work.query.normalisers = normalisers_.const_data_ptr<scalar_t>();
    check_launch(op_,
                 sum_task_weights<scalar_t>(
                     task_weights, inputs_.query.offsets.const_data_ptr<int64_t>(), work.num_tasks,
                     /*entered=*/true, normalisers_.mutable_data_ptr<scalar_t>(), stream));
  }

  // The scores of the query.
  void run(Tensor& scores) {
    work.query.scores = scores.mutable_data_ptr<scalar_t>();
    plan();
    launch_all();
  }

  // All gradients, and the loss if it is asked for.
  void run(TowerGradients& grads, Tensor* loss) {
    work.grad_user = grads.user_part.mutable_data_ptr<scalar_t>();
    work.item_rows = grads.item_rows.mutable_data_ptr<scalar_t>();
    work.item_ids = grads.item_ids.mutable_data_ptr<int64_t>();
    work.places = grads.places;
    plan();
    const Tensor records =
        empty(inputs_.item_table, inputs_.dtype(), {num_records_, work.record.size()});
    work.records = records.mutable_data_ptr<scalar_t>();
    launch_all();
    RecordParts<scalar_t> parts;
    parts.add(0, work.record.parameters, false, grads.parameters.mutable_data_ptr<scalar_t>());
    parts.add(work.record.rates_at(), work.record.rates, false,
              grads.inner_lr.mutable_data_ptr<scalar_t>());
    if (loss != nullptr)
      parts.add(work.record.loss_at(), 1, false, loss->mutable_data_ptr<scalar_t>());
    check_launch(op_, sum_long_records<scalar_t>(work.records, num_records_, work.record.size(),
                                                 parts, stream));
  }

 private:
  struct Planned {
    TowerLaunch launch;
    int64_t blocks = 0;
    size_t shared_bytes = 0;
    Tensor workspace = {};
  };

  // Bytes of scratch that a block has in shared memory, so that several run at once; and of scratch
  // and records of all blocks, if one block does not need more.
  static constexpr size_t kMostShared = 40 << 10;
  static constexpr int64_t kMostBytes = int64_t{1} << 29;

  static TowerShape shape_of(const std::vector<int64_t>& widths) {
    TowerShape shape{};
    shape.depth = static_cast<int>(widths.size()) - 1;
    shape.width[0] = static_cast<int>(widths[0]);
    for (int l = 1; l <= shape.depth; ++l) {
      shape.width[l] = static_cast<int>(widths[l]);
      shape.weight_at[l] = shape.size;
      shape.unit_at[l] = shape.units;
      shape.size += shape.width[l] * (shape.width[l - 1] + 1);
      shape.units += shape.width[l];
    }
    return shape;
  }

  // A launch for tasks with up to 2 n_0 support rows, to which the products X Xᵀ stand in for
  // weights of layer 1, and one for larger ones, to which these would be more.
  void plan() {
    const int64_t largest = work.most_rows,
                  bound = std::min<int64_t>(2 * work.shape.width[0], largest);
    make_room({{0, bound, /*own_first=*/false, {}, nullptr, 0}});
    if (largest > bound) make_room({{bound + 1, largest, /*own_first=*/true, {}, nullptr, 0}});
  }

  // Scratch for its blocks: in shared memory, else in a workspace.
  void make_room(Planned planned) {
    TowerLaunch& launch = planned.launch;
    const bool goes_back = work.query.goes_back();
    launch.scratch = lay_out_tower(work.shape, launch.own_first, launch.most_rows, work.query_rows,
                                   work.steps, work.activation == Activation::kGelu, goes_back);
    STD_TORCH_CHECK(launch.scratch.size <= std::numeric_limits<int>::max(), op_,
                    ": a task of up to ", launch.most_rows,
                    " support rows needs more scratch than a block can address");
    const int64_t scratch_bytes = launch.scratch.size * sizeof(scalar_t),
                  record_bytes = goes_back ? work.record.size() * sizeof(scalar_t) : 0;
    const bool fits = static_cast<size_t>(scratch_bytes) <= kMostShared;
    planned.shared_bytes = fits ? scratch_bytes : 0;
    const int64_t bytes = record_bytes + (fits ? 0 : scratch_bytes);
    const int64_t most = bytes == 0 ? work.num_tasks : kMostBytes / bytes;
    work.launch = launch;
    const int64_t resident = resident_tower_blocks(work, planned.shared_bytes);
    planned.blocks = std::max<int64_t>(std::min({work.num_tasks, most, resident}), 1);
    if (!fits) {
      planned.workspace =
          empty(inputs_.item_table, inputs_.dtype(), {planned.blocks, launch.scratch.size});
      launch.workspace = planned.workspace.mutable_data_ptr();
    }
    launch.first_record = num_records_;
    num_records_ += planned.blocks;
    launches_.push_back(planned);
  }

  void launch_all() {
    for (const Planned& planned : launches_) {
      work.launch = planned.launch;
      check_launch(op_, launch_tower(work, planned.blocks, planned.shared_bytes, stream));
    }
  }

  const char* op_;
  const TowerInputs& inputs_;
  int64_t num_records_ = 0;
  std::vector<Planned> launches_;
  Tensor normalisers_;
};

}  // namespace metarec_fast::cuda
