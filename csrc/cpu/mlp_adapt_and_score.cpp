// An MLP tower adapted to each task, and the scores of its query items; and the way back.
#include "tower_batch.h"

namespace metarec_fast::cpu {
namespace {

Tensor mlp_adapt_and_score_cpu(
    const Tensor& user_part, const Tensor& item_table, const OptionalTensor& item_bias,
    const Tensor& parameters, const std::vector<int64_t>& widths, const Tensor& support_items,
    const Tensor& support_offsets, const OptionalTensor& support_targets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const Tensor& inner_lr, int64_t inner_steps,
    const std::string& activation, const std::string& loss, bool first_order) {
  const TowerInputs inputs(user_part, item_table, item_bias, parameters, widths, support_items,
                           support_offsets, support_targets, support_weights, support_negatives,
                           support_log_q, largest_support,
                           {"query", query_items, query_offsets, item_table}, inner_lr, inner_steps,
                           activation, loss, first_order);

  Tensor result = empty(item_table, inputs.dtype(), {inputs.query.size()});

  dispatch_floating(inputs.dtype(), "mlp_adapt_and_score", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TowerBatch<scalar_t> batch(inputs);
    scalar_t* scores = result.mutable_data_ptr<scalar_t>();
    const auto put = [&](int64_t, int64_t t, TowerTask<scalar_t>& task, Arena<scalar_t>&) {
      task.score(scores + batch.query.begin(t));
    };
    batch.run(batch.blocks(), put, [](int64_t) {});
  });
  return result;
}

TowerTuple mlp_adapt_and_score_backward_cpu(
    const Tensor& grad_scores, const Tensor& user_part, const Tensor& item_table,
    const OptionalTensor& item_bias, const Tensor& parameters, const std::vector<int64_t>& widths,
    const Tensor& support_items, const Tensor& support_offsets,
    const OptionalTensor& support_targets, const OptionalTensor& support_weights,
    const OptionalTensor& support_negatives, const OptionalTensor& support_log_q,
    int64_t largest_support, const Tensor& query_items, const Tensor& query_offsets,
    const Tensor& inner_lr, int64_t inner_steps, const std::string& activation,
    const std::string& loss, bool first_order) {
  const TowerInputs inputs(user_part, item_table, item_bias, parameters, widths, support_items,
                           support_offsets, support_targets, support_weights, support_negatives,
                           support_log_q, largest_support,
                           {"query", query_items, query_offsets, item_table}, inner_lr, inner_steps,
                           activation, loss, first_order);
  const Tensor arriving = *inputs.checked("grad_scores", grad_scores, inputs.query.size());

  TowerTuple result;
  dispatch_floating(inputs.dtype(), "mlp_adapt_and_score_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TowerBatch<scalar_t> batch(inputs);
    const TaskBlocks blocks = batch.blocks();
    const TowerSums<scalar_t> sums(inputs, batch.tower, blocks.size());
    const scalar_t* from_scores = arriving.const_data_ptr<scalar_t>();
    const auto undo = [&](int64_t block, int64_t t, TowerTask<scalar_t>& task,
                          Arena<scalar_t>& arena) {
      task.score(arena.take(batch.query.size(t)));
      task.adjoint(from_scores + batch.query.begin(t),
                   sums.of_task(block, t, batch.support, batch.query));
    };
    batch.run(blocks, undo, [&](int64_t t) { sums.add_nothing(t, batch.support); });
    sums.finish();
    result = sums.tuple();
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("mlp_adapt_and_score", TORCH_BOX(&mlp_adapt_and_score_cpu));
  m.impl("mlp_adapt_and_score_backward", TORCH_BOX(&mlp_adapt_and_score_backward_cpu));
}

}  // namespace metarec_fast::cpu
