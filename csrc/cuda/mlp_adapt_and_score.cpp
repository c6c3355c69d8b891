// An MLP tower adapted to each task, and the scores of its query items; and the way back.
#include "tower_call.h"

namespace metarec_fast::cuda {
namespace {

Tensor mlp_adapt_and_score_cuda(
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
  const OnDevice device(item_table);

  Tensor scores = empty(item_table, inputs.dtype(), {inputs.query.size()});

  dispatch_floating(inputs.dtype(), "mlp_adapt_and_score", [&](auto zero) {
    TowerCall<decltype(zero)>("mlp_adapt_and_score", inputs, Ask::kScores, device.stream)
        .run(scores);
  });
  return scores;
}

TowerTuple mlp_adapt_and_score_backward_cuda(
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
  const OnDevice device(item_table);

  TowerGradients grads(inputs);

  dispatch_floating(inputs.dtype(), "mlp_adapt_and_score_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    TowerCall<scalar_t> call("mlp_adapt_and_score_backward", inputs, Ask::kGiven, device.stream);
    call.work.query.grad_scores = arriving.const_data_ptr<scalar_t>();
    call.run(grads, nullptr);
  });
  return grads.tuple();
}

}  // namespace

METAREC_CUDA_OPERATORS(m) {
  m.impl("mlp_adapt_and_score", TORCH_BOX(&mlp_adapt_and_score_cuda));
  m.impl("mlp_adapt_and_score_backward", TORCH_BOX(&mlp_adapt_and_score_backward_cuda));
}

}  // namespace metarec_fast::cuda
