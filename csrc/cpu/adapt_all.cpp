// What every task becomes where its items adapt too: user vectors and biases, and the row and bias
// of each support entry's item.
#include "direct_call.h"
#include "gradients.h"

namespace metarec_fast::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> adapt_all_cpu(
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
  const int64_t T = inputs.T(), D = inputs.D(), entries = inputs.support.size();

  Tensor user = empty(item_bias, inputs.dtype(), {T, D}),
         bias = empty(item_bias, inputs.dtype(), {T}),
         rows = empty(item_bias, inputs.dtype(), {entries, D}),
         biases = empty(item_bias, inputs.dtype(), {entries});

  dispatch_floating(inputs.dtype(), "adapt_all", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const scalar_t m = *inputs.offset.const_data_ptr<scalar_t>();
    scalar_t* user_out = user.mutable_data_ptr<scalar_t>();
    scalar_t* bias_out = bias.mutable_data_ptr<scalar_t>();
    scalar_t* rows_out = rows.mutable_data_ptr<scalar_t>();
    scalar_t* biases_out = biases.mutable_data_ptr<scalar_t>();

    const TaskBlocks blocks(T, reader.support.offsets, nullptr, reader.entry_cost());
    blocks.run<Worker<scalar_t, ItemIndex>>([&](int64_t, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, index] = worker;
      const Task<scalar_t> task = reader.next(t, last, nullptr, arena, ahead);
      const int64_t begin = reader.support.begin(t);
      index.assign(reader.support.items + begin, task.size);
      FullPath<scalar_t> path = adapt_full(task, index, arena);

      const scalar_t* fast = path.fast + reader.loop.steps * layout.stride;
      std::copy(fast, fast + D, user_out + t * D);
      bias_out[t] = fast[layout.width];
      for (int64_t s = 0; s < task.size; ++s) {
        const scalar_t* row = path.rows + index.place[s] * layout.width;
        std::copy(row, row + D, rows_out + (begin + s) * D);
        biases_out[begin + s] = path.biases[index.place[s]] - m;
      }
    });
  });
  return {user, bias, rows, biases};
}

GradientTuple adapt_all_backward_cpu(
    const Tensor& grad_user, const Tensor& grad_bias, const Tensor& grad_rows,
    const Tensor& grad_biases, const Tensor& user_init, const Tensor& user_bias_init,
    const Tensor& item_table, const Tensor& item_bias, const Tensor& offset,
    const Tensor& support_items, const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& inner_lr,
    const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss, bool first_order, const std::string& form, const std::string& adapt,
    int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form, adapt);
  STD_TORCH_CHECK(loop.adapts_items, "adapt: expected all, got '", adapt, "'");
  const int64_t T = inputs.T(), D = inputs.D(), entries = inputs.support.size();
  const ArrivingGradients arriving(inputs, grad_user, grad_bias);
  const Tensor arriving_rows = as_contiguous(grad_rows),
               arriving_biases = as_contiguous(grad_biases);
  ArrivingGradients::check("grad_rows", arriving_rows, inputs, {entries, D});
  ArrivingGradients::check("grad_biases", arriving_biases, inputs, {entries});
  const RaggedItems nothing = inputs.support.without_entries();
  const Wanted wanted{wanted_bits};

  GradientTuple result;
  dispatch_floating(inputs.dtype(), "adapt_all_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const scalar_t* from_user = arriving.user.const_data_ptr<scalar_t>();
    const scalar_t* from_bias = arriving.bias.const_data_ptr<scalar_t>();
    const scalar_t* from_rows = arriving_rows.const_data_ptr<scalar_t>();
    const scalar_t* from_biases = arriving_biases.const_data_ptr<scalar_t>();
    const TaskBlocks blocks(T, reader.support.offsets, nullptr, reader.entry_cost());
    Gradients<scalar_t> gradients(inputs, loop, wanted, nothing, blocks.size());
    blocks.run<Worker<scalar_t, ItemIndex>>(
        [&](int64_t block, int64_t t, int64_t last, auto& worker) {
          auto& [arena, ahead, index] = worker;
          const Task<scalar_t> task = reader.next(t, last, nullptr, arena, ahead);
          const int64_t begin = reader.support.begin(t);
          index.assign(reader.support.items + begin, task.size);
          FullPath<scalar_t> path = adapt_full(task, index, arena);

          FullGradients<scalar_t> grads = gradients.of_full_task(block, path.items, begin, arena);
          pack(from_user + t * D, from_bias[t], layout, grads.fast);
          for (int64_t e = 0; e < task.size; ++e) {  // every entry has what its item has become
            const int64_t i = index.place[e];
            add(from_rows + (begin + e) * D, D, grads.rows + i * layout.width);
            grads.biases[i] += from_biases[begin + e];
          }
          for (int64_t k = reader.loop.steps - 1; k >= 0; --k)
            undo_full(task, index, k, arena, path, grads);
          gradients.add_moves(block, task, grads, index, begin);
        });
    gradients.finish();
    result = gradients.dense_tuple(inputs, nothing);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("adapt_all", TORCH_BOX(&adapt_all_cpu));
  m.impl("adapt_all_backward", TORCH_BOX(&adapt_all_backward_cpu));
}

METAREC_DIRECT_CALL(adapt_all, adapt_all_cpu)

}  // namespace metarec_fast::cpu
