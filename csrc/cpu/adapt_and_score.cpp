// φ_K of every task from its support set, the scores of its query items, and the way back.
#include "gradients.h"
#include "inner_solver.h"
#include "sum_rows.h"

namespace metarec_fast::cpu {
namespace {

struct Adapted {
  Tensor user;    // [T, D]
  Tensor bias;    // [T]
  Tensor scores;  // [number of query entries]
};

Adapted run_forward(const Inputs& inputs, const RaggedItems& query, const LoopArguments& loop) {
  check_query(query, inputs);

  Adapted result{torch::stable::new_empty(inputs.item_table, {inputs.T(), inputs.D()}),
                 torch::stable::new_empty(inputs.item_table, {inputs.T()}),
                 torch::stable::new_empty(inputs.item_table, {query.size()})};

  dispatch_floating(inputs.item_table.scalar_type(), "adapt", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const int64_t* query_items = query.items.const_data_ptr<int64_t>();
    const int64_t* query_offsets = query.offsets.const_data_ptr<int64_t>();
    scalar_t* user = result.user.mutable_data_ptr<scalar_t>();
    scalar_t* bias = result.bias.mutable_data_ptr<scalar_t>();
    scalar_t* scores = result.scores.mutable_data_ptr<scalar_t>();
    const Layout<scalar_t>& layout = reader.layout;

    const TaskBlocks blocks(inputs.T(), reader.support_offsets, query_offsets);
    const auto make_solver = [] { return InnerSolver<scalar_t>(); };
    blocks.run(make_solver, [&](int64_t, int64_t first, int64_t last, auto& solver) {
      Arena<scalar_t>& arena = thread_arena<scalar_t>();
      for (int64_t t = first; t < last; ++t) {
        arena.reset();
        const Task<scalar_t> task = reader.read(t, arena);
        if (t + 1 < last) reader.prefetch(t + 1, query_items, query_offsets);
        const scalar_t* fast = solver.forward(task, arena, /*backward=*/false);
        std::copy(fast, fast + layout.dim, user + t * layout.dim);
        bias[t] = fast[layout.width];
        const int64_t begin = query_offsets[t], size = query_offsets[t + 1] - begin;
        if (size == 0) continue;
        const Query<scalar_t> entries(reader, query_items + begin, size, arena);
        score_query(entries, layout, fast, scores + begin);
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> adapt_cpu(const Tensor& user_init, const Tensor& user_bias_init,
                                     const Tensor& item_table, const Tensor& item_bias,
                                     const Tensor& offset, const Tensor& support_items,
                                     const Tensor& support_targets, const Tensor& support_offsets,
                                     const OptionalTensor& support_weights, const Tensor& inner_lr,
                                     const OptionalTensor& preconditioner,
                                     const OptionalTensor& prior_pull,
                                     const OptionalTensor& momentum, double extra_count,
                                     int64_t inner_steps, const std::string& loss, bool first_order,
                                     const std::string& form) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form);
  const RaggedItems nothing("query", torch::stable::new_empty(support_items, {0}),
                            torch::stable::new_zeros(support_offsets, {inputs.T() + 1}),
                            item_table);
  const Adapted adapted = run_forward(inputs, nothing, loop);
  return {adapted.user, adapted.bias};
}

std::tuple<Tensor, Tensor, Tensor> adapt_and_score_cpu(
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const Tensor& query_items, const Tensor& query_offsets,
    const Tensor& inner_lr, const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss, bool first_order, const std::string& form) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form);
  const Adapted adapted =
      run_forward(inputs, RaggedItems("query", query_items, query_offsets, item_table), loop);
  return {adapted.user, adapted.bias, adapted.scores};
}

Tensor concatenated(const Tensor& first, const Tensor& second) {
  Tensor result = torch::stable::new_empty(first, {first.size(0) + second.size(0)});
  int64_t* ids = result.mutable_data_ptr<int64_t>();
  std::copy_n(first.const_data_ptr<int64_t>(), first.size(0), ids);
  std::copy_n(second.const_data_ptr<int64_t>(), second.size(0), ids + first.size(0));
  return result;
}

GradientTuple adapt_and_score_backward_cpu(
    const Tensor& grad_user_in, const Tensor& grad_bias_in, const Tensor& grad_scores_in,
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const Tensor& query_items, const Tensor& query_offsets,
    const Tensor& inner_lr, const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
    const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
    const std::string& loss, bool first_order, const std::string& form, int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form);
  const RaggedItems query("query", query_items, query_offsets, item_table);
  const Tensor grad_user = as_contiguous(grad_user_in), grad_bias = as_contiguous(grad_bias_in),
               grad_scores = as_contiguous(grad_scores_in);
  check_query(query, inputs);
  const ScalarType dtype = item_table.scalar_type();
  check_tensor("grad_user", grad_user, dtype, item_table);
  check_tensor("grad_bias", grad_bias, dtype, item_table);
  check_tensor("grad_scores", grad_scores, dtype, item_table);
  check_size("grad_bias", grad_bias, inputs.T());
  check_size("grad_scores", grad_scores, query.size());
  STD_TORCH_CHECK(grad_user.dim() == 2 && grad_user.numel() == inputs.T() * inputs.D(),
                  "grad_user: expected shape [T, D]");
  const Wanted wanted{wanted_bits};

  GradientTuple result;
  dispatch_floating(dtype, "adapt_and_score_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const int64_t* items = query.items.const_data_ptr<int64_t>();
    const int64_t* offsets = query.offsets.const_data_ptr<int64_t>();
    const scalar_t* from_user = grad_user.const_data_ptr<scalar_t>();
    const scalar_t* from_bias = grad_bias.const_data_ptr<scalar_t>();
    const scalar_t* from_scores = grad_scores.const_data_ptr<scalar_t>();
    const TaskBlocks blocks(inputs.T(), reader.support_offsets, offsets);
    Gradients<scalar_t> gradients(inputs, loop, wanted, query.size(), blocks.size());

    const auto make_solver = [] { return InnerSolver<scalar_t>(); };
    blocks.run(make_solver, [&](int64_t block, int64_t first, int64_t last, auto& solver) {
      Arena<scalar_t>& arena = thread_arena<scalar_t>();
      for (int64_t t = first; t < last; ++t) {
        arena.reset();
        const Task<scalar_t> task = reader.read(t, arena);
        if (t + 1 < last) reader.prefetch(t + 1, items, offsets);
        const scalar_t* fast = solver.forward(task, arena, /*backward=*/true);
        scalar_t* grad_fast = arena.take(layout.stride);
        pack(from_user + t * layout.dim, from_bias[t], layout, grad_fast);

        const int64_t begin = offsets[t], size = offsets[t + 1] - begin;
        const Query<scalar_t> entries(reader, items + begin, size, arena);
        scalar_t* query_rows = gradients.zeroed_query_rows(begin, size);
        query_adjoint(entries, layout, fast, from_scores + begin, arena, grad_fast, query_rows);

        const int64_t support_begin = reader.support_offsets[t];
        scalar_t* start = arena.take(layout.stride);
        scalar_t* base = arena.take_zeros(task.size);
        solver.adjoint(task, arena, grad_fast, /*whole_path=*/false,
                       gradients.of_task(block, support_begin, start, base));
        gradients.add_task(block, t, start, base, support_begin, task.size, from_scores + begin,
                           begin, size);
      }
    });
    gradients.finish();
    result = gradients.tuple();
    if (wanted.items()) {
      const Tensor ids = concatenated(inputs.support.items, query.items);
      result = gradients.with_items(sum_rows(ids, gradients.item_rows, inputs.N()),
                                    sum_rows(ids, gradients.item_bias_rows, inputs.N()));
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("adapt", TORCH_BOX(&adapt_cpu));
  m.impl("adapt_and_score", TORCH_BOX(&adapt_and_score_cpu));
  m.impl("adapt_and_score_backward", TORCH_BOX(&adapt_and_score_backward_cpu));
}

}  // namespace metarec_fast::cpu
