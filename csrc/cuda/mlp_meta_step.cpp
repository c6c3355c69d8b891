// The outer loss of a batch under an MLP tower and all its gradients, in one pass over the data.
#include "tower_call.h"

namespace metarec_fast::cuda {
namespace {

using MlpMetaStepTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

MlpMetaStepTuple mlp_meta_step_cuda(
    const Tensor& user_part, const Tensor& item_table, const OptionalTensor& item_bias,
    const Tensor& parameters, const std::vector<int64_t>& widths, const Tensor& support_items,
    const Tensor& support_offsets, const OptionalTensor& support_targets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const OptionalTensor& query_targets,
    const OptionalTensor& query_weights, const OptionalTensor& query_negatives,
    const OptionalTensor& query_log_q, const OptionalTensor& task_weights, const Tensor& inner_lr,
    int64_t inner_steps, const std::string& activation, const std::string& loss_name,
    bool first_order, const std::string& outer_loss) {
  const TowerInputs inputs(
      user_part, item_table, item_bias, parameters, widths, support_items, support_offsets,
      support_targets, support_weights, support_negatives, support_log_q, largest_support,
      {"query", query_items, query_offsets, item_table, query_negatives, query_log_q}, inner_lr,
      inner_steps, activation, loss_name, first_order);
  const OuterLoss outer = parse_outer_loss(outer_loss);
  STD_TORCH_CHECK(query_targets || !outer.pointwise(),
                  "query_targets: needed by the outer losses squared, logistic and absolute");
  STD_TORCH_CHECK(inputs.query.negatives || !outer.pairwise(),
                  "query_negatives: needed by the outer losses bpr and softmax");
  const int64_t count = inputs.query.size();
  const OptionalTensor targets = inputs.checked("query_targets", query_targets, count),
                       weights = inputs.checked("query_weights", query_weights, count),
                       omegas = inputs.checked("task_weights", task_weights, inputs.T());
  const OnDevice device(item_table);

  Tensor loss = empty(item_table, inputs.dtype(), {});
  TowerGradients grads(inputs);

  dispatch_floating(inputs.dtype(), "mlp_meta_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    TowerCall<scalar_t> call("mlp_meta_step", inputs, Ask::kLoss, device.stream);
    call.work.query.loss = outer;
    call.work.query.targets = data<scalar_t>(targets);
    call.work.query.weights = data<scalar_t>(weights);
    call.normalise(data<scalar_t>(omegas));
    call.run(grads, &loss);
  });
  return std::tuple_cat(std::make_tuple(loss), grads.tuple());
}

}  // namespace

METAREC_CUDA_OPERATORS(m) { m.impl("mlp_meta_step", TORCH_BOX(&mlp_meta_step_cuda)); }

}  // namespace metarec_fast::cuda
