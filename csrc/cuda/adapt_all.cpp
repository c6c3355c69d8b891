// What every task becomes where its items adapt too: user vectors and biases, and the row and bias
// of each support entry's item.
#include "adapt_call.h"

namespace metarec_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> adapt_all_cuda(
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& inner_lr,
    const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss, bool first_order, const std::string& form, const std::string& adapt) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form, adapt);
  STD_TORCH_CHECK(loop.adapts_items, "adapt: expected all, got '", adapt, "'");
  const RaggedItems nothing = inputs.support.without_entries();
  const int64_t entries = inputs.support.size();
  const OnDevice device(item_bias);

  Tensor user = empty(item_bias, inputs.dtype(), {inputs.T(), inputs.D()}),
         bias = empty(item_bias, inputs.dtype(), {inputs.T()}),
         rows = empty(item_bias, inputs.dtype(), {entries, inputs.D()}),
         biases = empty(item_bias, inputs.dtype(), {entries});

  dispatch_tables(inputs, "adapt_all", [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call("adapt_all", inputs, loop, nothing, device.stream);
    call.work.query.ask = Ask::kNothing;
    call.work.query.user = user.mutable_data_ptr<scalar_t>();
    call.work.query.bias = bias.mutable_data_ptr<scalar_t>();
    call.work.rows_out = rows.mutable_data_ptr<scalar_t>();
    call.work.biases_out = biases.mutable_data_ptr<scalar_t>();
    call.run(nullptr, nullptr);
  });
  return {user, bias, rows, biases};
}

GradientTuple adapt_all_backward_cuda(
    const Tensor& grad_user, const Tensor& grad_bias, const Tensor& grad_rows,
    const Tensor& grad_biases, const Tensor& user_init, const Tensor& user_bias_init,
    const Tensor& item_table, const Tensor& item_bias, const Tensor& offset,
    const Tensor& support_items, const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& inner_lr,
    const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss_name, bool first_order, const std::string& form,
    const std::string& adapt, int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  STD_TORCH_CHECK(loop.adapts_items, "adapt: expected all, got '", adapt, "'");
  const int64_t entries = inputs.support.size();
  const ArrivingGradients arriving(inputs, grad_user, grad_bias);
  const Tensor arriving_rows = as_contiguous(grad_rows),
               arriving_biases = as_contiguous(grad_biases);
  ArrivingGradients::check("grad_rows", arriving_rows, inputs, {entries, inputs.D()});
  ArrivingGradients::check("grad_biases", arriving_biases, inputs, {entries});
  const RaggedItems nothing = inputs.support.without_entries();
  const OnDevice device(item_bias);

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  GradientTensors grads(inputs, loop, Wanted{wanted_bits}, nothing);

  dispatch_tables(inputs, "adapt_all_backward", [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call("adapt_all_backward", inputs, loop, nothing,
                                              device.stream);
    QueryData<scalar_t>& asked = call.work.query;
    asked.ask = Ask::kGiven;
    asked.grad_user = arriving.user.const_data_ptr<scalar_t>();
    asked.grad_bias = arriving.bias.const_data_ptr<scalar_t>();
    call.work.grad_rows = arriving_rows.const_data_ptr<scalar_t>();
    call.work.grad_biases = arriving_biases.const_data_ptr<scalar_t>();
    call.note_hits(nothing);
    call.work.grads = grads.view<scalar_t>(inputs);
    call.run(&grads, &loss);
  });
  return grads.dense_tuple(inputs.N());
}

}  // namespace

METAREC_CUDA_OPERATORS(m) {
  m.impl("adapt_all", TORCH_BOX(&adapt_all_cuda));
  m.impl("adapt_all_backward", TORCH_BOX(&adapt_all_backward_cuda));
}

}  // namespace metarec_fast::cuda
