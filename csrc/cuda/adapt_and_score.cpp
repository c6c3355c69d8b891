// φ_K of every task from its support set, the scores of its query items, and the way back.
#include "adapt_call.h"

namespace metarec_fast::cuda {
namespace {

struct Adapted {
  Tensor user;    // [T, D]
  Tensor bias;    // [T]
  Tensor scores;  // [number of query entries]
};

Adapted run_forward(const char* op, const Inputs& inputs, const RaggedItems& query,
                    const LoopArguments& loop, Ask ask) {
  JudgedQuery::check_num_tasks(query, inputs);
  const OnDevice device(inputs.item_bias);

  Adapted result{empty(inputs.item_bias, inputs.dtype(), {inputs.T(), inputs.D()}),
                 empty(inputs.item_bias, inputs.dtype(), {inputs.T()}),
                 empty(inputs.item_bias, inputs.dtype(), {query.size()})};

  dispatch_tables(inputs, op, [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call(op, inputs, loop, query, device.stream);
    QueryData<scalar_t>& asked = call.work.query;
    asked.ask = ask;
    asked.user = result.user.mutable_data_ptr<scalar_t>();
    asked.bias = result.bias.mutable_data_ptr<scalar_t>();
    asked.scores = result.scores.mutable_data_ptr<scalar_t>();
    call.run(nullptr, nullptr);
  });
  return result;
}

std::tuple<Tensor, Tensor> adapt_cuda(
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
  const RaggedItems nothing = inputs.support.without_entries();
  const Adapted adapted = run_forward("adapt", inputs, nothing, loop, Ask::kNothing);
  return {adapted.user, adapted.bias};
}

std::tuple<Tensor, Tensor, Tensor> adapt_and_score_cuda(
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const Tensor& inner_lr, const OptionalTensor& preconditioner,
    const OptionalTensor& prior_pull, const OptionalTensor& momentum, double extra_count,
    int64_t inner_steps, const std::string& loss, bool first_order, const std::string& form,
    const std::string& adapt) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form, adapt);
  const RaggedItems query("query", query_items, query_offsets, item_table);
  const Adapted adapted = run_forward("adapt_and_score", inputs, query, loop, Ask::kScores);
  return {adapted.user, adapted.bias, adapted.scores};
}

GradientTuple adapt_and_score_backward_cuda(
    const Tensor& grad_user, const Tensor& grad_bias, const Tensor& grad_scores,
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const Tensor& inner_lr, const OptionalTensor& preconditioner,
    const OptionalTensor& prior_pull, const OptionalTensor& momentum, double extra_count,
    int64_t inner_steps, const std::string& loss_name, bool first_order, const std::string& form,
    const std::string& adapt, int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  const RaggedItems query("query", query_items, query_offsets, item_table);
  JudgedQuery::check_num_tasks(query, inputs);
  const ArrivingGradients arriving(inputs, grad_user, grad_bias);
  const Tensor arriving_scores = as_contiguous(grad_scores);
  ArrivingGradients::check("grad_scores", arriving_scores, inputs, {query.size()});
  const OnDevice device(item_bias);

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  GradientTensors grads(inputs, loop, Wanted{wanted_bits}, query);

  dispatch_tables(inputs, "adapt_and_score_backward", [&](auto scalar, auto table) {
    using scalar_t = decltype(scalar);
    AdaptCall<scalar_t, decltype(table)> call("adapt_and_score_backward", inputs, loop, query,
                                              device.stream);
    QueryData<scalar_t>& asked = call.work.query;
    asked.ask = Ask::kGiven;
    asked.grad_user = arriving.user.const_data_ptr<scalar_t>();
    asked.grad_bias = arriving.bias.const_data_ptr<scalar_t>();
    asked.grad_scores = arriving_scores.const_data_ptr<scalar_t>();
    call.note_hits(query);
    call.work.grads = grads.view<scalar_t>(inputs);
    call.run(&grads, &loss);
  });
  return grads.dense_tuple(inputs.N());
}

}  // namespace

METAREC_CUDA_OPERATORS(m) {
  m.impl("adapt", TORCH_BOX(&adapt_cuda));
  m.impl("adapt_and_score", TORCH_BOX(&adapt_and_score_cuda));
  m.impl("adapt_and_score_backward", TORCH_BOX(&adapt_and_score_backward_cuda));
}

}  // namespace metarec_fast::cuda
