// From the tensors of an operator to the launches that adapt its tasks, and back to tensors.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "../arguments.h"
#include "adapt.h"
#include "bfloat16.h"
#include "launch.h"
#include "scratch.h"
#include "sum_rows.h"
#include "totals.h"

namespace metarec_fast::cuda {

// Calls body(scalar_t{}, table_t{}) with the types of arithmetic and of the item table.
template <typename Body>
void dispatch_tables(const Inputs& inputs, const char* op, const Body& body) {
  if (inputs.narrow_table()) return body(float{}, BFloat16{});
  dispatch_floating(inputs.dtype(), op, [&](auto zero) { body(zero, zero); });
}

// The gradients of a batch as tensors; what is not wanted, or not given, is not there.
struct GradientTensors {
  const ItemRows places;
  Tensor item_ids;
  OptionalTensor user_init, user_bias_init, item_rows, item_bias_rows, offset, inner_lr,
      preconditioner, prior_pull, momentum, support_weights;

  GradientTensors(const Inputs& inputs, const LoopArguments& loop, Wanted wanted,
                  const RaggedItems& query)
      : places(item_rows_of(inputs, loop, query)),
        item_ids(empty(query.items, ScalarType::Long, {wanted.items() ? places.size() : 0})) {
    const Tensor& like = inputs.item_bias;
    const ScalarType dtype = inputs.dtype();
    const auto alike = [&](bool is_wanted, const Tensor& shape) -> OptionalTensor {
      if (!is_wanted) return std::nullopt;
      if (shape.dim() == 0) return empty(like, dtype, {});
      return shape.dim() == 1 ? empty(like, dtype, {shape.size(0)})
                              : empty(like, dtype, {shape.size(0), shape.size(1)});
    };
    const auto optional = [&](bool is_wanted, const OptionalTensor& shape) {
      return shape ? alike(is_wanted, *shape) : std::nullopt;
    };
    user_init = alike(wanted.start(), inputs.user_init);
    user_bias_init = alike(wanted.start(), inputs.user_bias_init);
    offset = alike(wanted.start(), inputs.offset);
    inner_lr = alike(wanted.inner_lr(), loop.inner_lr);
    preconditioner = optional(wanted.preconditioner(), loop.preconditioner);
    prior_pull = optional(wanted.prior_pull(), loop.prior_pull);
    momentum = optional(wanted.momentum(), loop.momentum);
    support_weights = optional(wanted.support_weights(), inputs.weights);
    if (!wanted.items()) return;
    item_rows = empty(like, dtype, {places.size(), inputs.D()});
    item_bias_rows = empty(like, dtype, {places.size()});
  }

  template <typename scalar_t>
  GradientData<scalar_t> view(const Inputs& inputs) {
    const auto data = [](OptionalTensor& tensor) {
      return tensor ? tensor->mutable_data_ptr<scalar_t>() : nullptr;
    };
    const auto per_task = [&](OptionalTensor& tensor, int dim) -> scalar_t* {
      return numel(tensor) > 0 && tensor->dim() == dim ? data(tensor) : nullptr;
    };
    scalar_t* rows = data(item_rows);
    return {used(),
            per_task(user_init, 2),
            per_task(user_bias_init, 1),
            per_task(prior_pull, 1),
            per_task(support_weights, 1),
            rows,
            data(item_bias_rows),
            item_ids.mutable_data_ptr<int64_t>(),
            places,
            packs(rows, inputs.D())};
  }

  // What of that there is.
  Wanted used() const {
    int64_t bits = 0;
    if (user_init) bits |= 1;
    if (item_rows) bits |= 2;
    if (numel(inner_lr) > 0) bits |= 4;
    if (numel(preconditioner) > 0) bits |= 8;
    if (numel(prior_pull) > 0) bits |= 16;
    if (numel(momentum) > 0) bits |= 32;
    if (numel(support_weights) > 0) bits |= 64;
    return {bits};
  }

  // Where the sums of the records go.
  template <typename scalar_t>
  RecordParts<scalar_t> parts(const RecordLayout& at, int64_t dim, int64_t width, int64_t steps,
                              Tensor& loss) {
    RecordParts<scalar_t> result;
    const auto add = [&](Tensor& tensor, int place, int64_t count, bool folded) {
      result.add(place, count, folded, tensor.mutable_data_ptr<scalar_t>());
    };
    if (user_init) {
      if (user_init->dim() == 1) add(*user_init, at.start(), dim, false);
      if (user_bias_init->dim() == 0)
        add(*user_bias_init, at.start() + static_cast<int>(width), 1, false);
      add(*offset, at.offset(), 1, false);
    }
    if (inner_lr) add(*inner_lr, at.inner_lr(), steps, inner_lr->dim() == 0);
    if (numel(momentum) > 0) add(*momentum, at.momentum(), steps, momentum->dim() == 0);
    if (prior_pull && prior_pull->dim() == 0) add(*prior_pull, at.pull(), 1, false);
    if (preconditioner) {
      scalar_t* out = preconditioner->mutable_data_ptr<scalar_t>();
      result.add(at.scale(), dim, false, out);
      result.add(at.scale() + static_cast<int>(width), 1, false, out + dim);
    }
    add(loss, at.loss(), 1, false);
    return result;
  }

  GradientTuple tuple() const { return with_items(item_rows, item_bias_rows); }

  // The same with the items' gradients, if wanted, as whole tables: [N, D] and [N].
  GradientTuple dense_tuple(int64_t num_items) const {
    if (!item_rows) return tuple();
    return with_items(sum_rows(item_ids, *item_rows, num_items),
                      sum_rows(item_ids, *item_bias_rows, num_items));
  }

 private:
  GradientTuple with_items(const OptionalTensor& table, const OptionalTensor& bias) const {
    return {user_init, user_bias_init, table,      bias,     offset,
            inner_lr,  preconditioner, prior_pull, momentum, support_weights};
  }
};

// One call of the kernels that adapt tasks.
template <typename scalar_t, typename table_t>
class AdaptCall {
 public:
  AdaptWork<scalar_t, table_t> work{};
  cudaStream_t stream;

  AdaptCall(const char* op, const Inputs& inputs, const LoopArguments& loop,
            const RaggedItems& query, cudaStream_t stream_in)
      : stream(stream_in),
        op_(op),
        items_too_(loop.adapts_items),
        like_(inputs.item_bias),
        dtype_(inputs.dtype()) {
    STD_TORCH_CHECK(inputs.D() <= kLargestDim, "item_table: expected rows of at most ", kLargestDim,
                    " numbers, got ", inputs.D());
    const table_t* table = static_cast<const table_t*>(inputs.item_table.const_data_ptr());
    work.problem = {inputs.user_init.const_data_ptr<scalar_t>(),
                    inputs.user_bias_init.const_data_ptr<scalar_t>(),
                    inputs.per_task_start() ? inputs.D() : 0,
                    inputs.per_task_bias() ? 1 : 0,
                    table,
                    inputs.item_bias.const_data_ptr<scalar_t>(),
                    inputs.offset.const_data_ptr<scalar_t>(),
                    entry_data<scalar_t>(inputs.support),
                    inputs.targets.const_data_ptr<scalar_t>(),
                    data<scalar_t>(inputs.weights),
                    loop.view<scalar_t>(),
                    inputs.T(),
                    0,
                    RowShape(static_cast<int>(inputs.D())),
                    packs(table, inputs.D())};
    work.problem.most_rows =
        inputs.largest_support * work.problem.support.group(work.problem.loop.loss);
    work.query.entries = entry_data<scalar_t>(query);
  }

  // 1/Σ ω over all tasks, or those with `entries`; see QueryData.
  void normalise(const scalar_t* task_weights, const RaggedItems& entries, bool entered) {
    normalisers_ = empty(like_, dtype_, {2});
    work.query.task_weights = task_weights;
    work.query.normalisers = normalisers_.const_data_ptr<scalar_t>();
    check_launch(op_,
                 sum_task_weights<scalar_t>(task_weights, entries.offsets.const_data_ptr<int64_t>(),
                                            work.problem.num_tasks, entered,
                                            normalisers_.mutable_data_ptr<scalar_t>(), stream));
  }

  // Room to note which candidates of the query are support items, where these adapt.
  void note_hits(const RaggedItems& query) {
    if (!items_too_) return;
    const int64_t candidates = query.size() * query.candidates();
    hit_places_ = empty(like_, ScalarType::Int, {candidates});
    hit_grads_ = empty(like_, dtype_, {candidates});
    work.hit_places = hit_places_.mutable_data_ptr<int>();
    work.hit_grads = hit_grads_.mutable_data_ptr<scalar_t>();
  }

  // Runs all tasks; with `grads` the sums over them go there, and the loss to `loss`.
  void run(GradientTensors* grads, Tensor* loss) {
    const int64_t K = std::max<int64_t>(work.problem.loop.steps, 0);
    const int width = work.problem.shape.width();
    const RecordLayout record{width, static_cast<int>(K)};
    plan(K);
    if (grads != nullptr) {
      records_ = empty(like_, dtype_, {num_records_, record.size()});
      work.records = records_.mutable_data_ptr<scalar_t>();
    }
    for (const Planned& planned : launches_) {
      work.launch = planned.launch;
      check_launch(op_, launch_adapt(work, planned.blocks, planned.shared_bytes, stream));
    }
    if (grads != nullptr)
      check_launch(op_, sum_records<scalar_t>(
                            work.records, num_records_, record.size(),
                            grads->parts<scalar_t>(record, work.problem.shape.dim, width, K, *loss),
                            stream));
  }

 private:
  struct Planned {
    Launch launch;
    int64_t blocks = 0;
    size_t shared_bytes = 0;
    Tensor workspace = {};
  };

  // Splits the tasks by size into launches that suit them.
  void plan(int64_t K) {
    const int64_t largest = work.problem.most_rows;
    int64_t bounds[] = {kWarpSize, kLargestGram, (kDirectPasses * K - 1) / kGramPasses, largest};
    std::sort(std::begin(bounds), std::end(bounds));
    int64_t first = 0;
    for (const int64_t bound : bounds) {
      const int64_t last = std::min(bound, largest);
      if (last < first) continue;
      const Way way = way_of(last);
      const int warps = last <= kWarpSize ? 1 : kLargestTeam;
      const bool as_before = !launches_.empty() && launches_.back().launch.way == way &&
                             launches_.back().launch.warps == warps;
      if (as_before)
        launches_.back().launch.most_rows = last;
      else
        launches_.push_back({{way, warps, kLargestTeam / warps, first, last, {}, nullptr, 0}});
      first = last + 1;
    }
    for (Planned& planned : launches_) make_room(planned, K);
  }

  Way way_of(int64_t rows) const {
    return choose_way(work.problem.loop, items_too_, work.query.whole_path(),
                      work.query.entries.num_negatives > 0, std::max<int64_t>(rows, 1));
  }

  // Scratch for its teams: in shared memory, else in a workspace.
  void make_room(Planned& planned, int64_t K) {
    Launch& launch = planned.launch;
    launch.scratch = lay_out_scratch(launch.way, launch.warps, work.problem.shape, launch.most_rows,
                                     K, work.query.entries.candidates());
    STD_TORCH_CHECK(launch.scratch.size <= std::numeric_limits<int>::max(), op_,
                    ": a task of up to ", launch.most_rows,
                    " rows needs more scratch than a team can address");
    const size_t team_bytes = launch.scratch.size * sizeof(scalar_t);
    const size_t limit = static_cast<size_t>(shared_memory_limit()) - kStaticSharedMemory;
    while (launch.teams_per_block > 1 && launch.teams_per_block * team_bytes > limit)
      launch.teams_per_block /= 2;
    const bool fits = launch.teams_per_block * team_bytes <= limit;
    if (!fits) launch.teams_per_block = kLargestTeam / launch.warps;
    planned.shared_bytes = fits ? launch.teams_per_block * team_bytes : 0;
    work.launch = launch;
    const int64_t needed =
        (work.problem.num_tasks + launch.teams_per_block - 1) / launch.teams_per_block;
    planned.blocks =
        std::clamp<int64_t>(needed, 1, resident_adapt_blocks(work, planned.shared_bytes));
    const int64_t teams = planned.blocks * launch.teams_per_block;
    if (!fits) {
      planned.workspace = empty(like_, dtype_, {teams, launch.scratch.size});
      launch.workspace = planned.workspace.mutable_data_ptr();
    }
    launch.first_record = num_records_;
    num_records_ += teams;
  }

  static constexpr size_t kStaticSharedMemory = kMostTeams * sizeof(Facts<scalar_t>) + 1024;

  const char* op_;
  const bool items_too_;
  const Tensor like_;
  const ScalarType dtype_;
  int64_t num_records_ = 0;
  std::vector<Planned> launches_;
  Tensor normalisers_, records_, hit_places_, hit_grads_;
};

}  // namespace metarec_fast::cuda
