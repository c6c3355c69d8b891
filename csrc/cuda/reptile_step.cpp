// Reptile's step for a batch: how far tasks end up from where they started, averaged, as a
// gradient.
#include "adapt_call.h"
#include "item_shares.h"

namespace metarec_fast::cuda {
namespace {

ReptileTuple reptile_step_cuda(const Tensor& user_init, const Tensor& user_bias_init,
                               const Tensor& item_table, const Tensor& item_bias,
                               const Tensor& offset, const Tensor& support_items,
                               const Tensor& support_targets, const Tensor& support_offsets,
                               const OptionalTensor& support_weights,
                               const OptionalTensor& support_negatives,
                               const OptionalTensor& support_log_q, int64_t largest_support,
                               const OptionalTensor& task_weights_in, const Tensor& inner_lr,
                               const OptionalTensor& preconditioner,
                               const OptionalTensor& prior_pull, const OptionalTensor& momentum,
                               double extra_count, int64_t inner_steps,
                               const std::string& loss_name, bool first_order,
                               const std::string& form, const std::string& adapt) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  const ReptileArguments reptile(inputs, loop, loss_name, task_weights_in);
  const RaggedItems nothing = inputs.support.without_entries();
  const OnDevice device(item_bias);

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  GradientTensors grads(inputs, loop, Wanted{loop.adapts_items ? 3 : 1}, nothing);

  dispatch_tables(inputs, "reptile_step", [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call("reptile_step", inputs, loop, nothing, device.stream);
    call.work.query.ask = Ask::kMove;
    call.work.query.loss = reptile.loss;
    call.normalise(data<scalar_t>(reptile.task_weights), inputs.support, /*entered=*/false);
    Tensor shares;
    if (loop.adapts_items) {
      shares = item_shares(inputs.support, reptile.task_weights, inputs.dtype(), device.stream);
      call.work.item_shares = shares.const_data_ptr<scalar_t>();
    }
    call.work.grads = grads.view<scalar_t>(inputs);
    call.run(&grads, &loss);
  });
  return {loss, *grads.user_init, *grads.user_bias_init, grads.item_rows, grads.item_bias_rows};
}

}  // namespace

METAREC_CUDA_OPERATORS(m) { m.impl("reptile_step", TORCH_BOX(&reptile_step_cuda)); }

}  // namespace metarec_fast::cuda
