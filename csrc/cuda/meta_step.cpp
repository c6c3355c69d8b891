// The outer loss of a batch and all its gradients, in one pass over the data.
#include "adapt_call.h"

namespace metarec_fast::cuda {
namespace {

MetaStepTuple meta_step_cuda(
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const OptionalTensor& query_targets, const Tensor& query_offsets,
    const OptionalTensor& query_weights, const OptionalTensor& query_negatives,
    const OptionalTensor& query_log_q, const OptionalTensor& task_weights, const Tensor& inner_lr,
    const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss_name, bool first_order, const std::string& form,
    const std::string& adapt, const std::string& outer_loss, const OptionalTensor& step_weights,
    int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  const RaggedItems query("query", query_items, query_offsets, item_table, query_negatives,
                          query_log_q);
  const JudgedQuery judged(inputs, inner_steps, query, query_targets, query_weights, task_weights,
                           step_weights, outer_loss);
  const OnDevice device(item_bias);

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  GradientTensors grads(inputs, loop, Wanted{wanted_bits}, query);

  dispatch_tables(inputs, "meta_step", [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call("meta_step", inputs, loop, query, device.stream);
    QueryData<scalar_t>& asked = call.work.query;
    asked.ask = Ask::kLoss;
    asked.loss = judged.loss;
    asked.targets = data<scalar_t>(judged.targets);
    asked.weights = data<scalar_t>(judged.weights);
    asked.step_weights = data<scalar_t>(judged.step_weights);
    call.normalise(data<scalar_t>(judged.task_weights), query, /*entered=*/true);
    call.note_hits(query);
    call.work.grads = grads.view<scalar_t>(inputs);
    call.run(&grads, &loss);
  });
  return std::tuple_cat(std::make_tuple(loss), grads.tuple(), std::make_tuple(grads.item_ids));
}

}  // namespace

METAREC_CUDA_OPERATORS(m) { m.impl("meta_step", TORCH_BOX(&meta_step_cuda)); }

}  // namespace metarec_fast::cuda
