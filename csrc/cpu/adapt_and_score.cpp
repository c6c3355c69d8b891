// φ_K of every task from its support set, the scores of its query items, and the way back.
#include "direct_call.h"
#include "factored_task.h"
#include "inner_solver.h"

namespace metarec_fast::cpu {
namespace {

struct Adapted {
  Tensor user;    // [T, D]
  Tensor bias;    // [T]
  Tensor scores;  // [number of query entries]
};

Adapted run_forward(const Inputs& inputs, const RaggedItems& query, const LoopArguments& loop) {
  check_query(query, inputs);

  Adapted result{empty(inputs.item_bias, inputs.dtype(), {inputs.T(), inputs.D()}),
                 empty(inputs.item_bias, inputs.dtype(), {inputs.T()}),
                 empty(inputs.item_bias, inputs.dtype(), {query.size()})};

  dispatch_floating(inputs.dtype(), "adapt", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const EntryData<scalar_t> queries = entry_data<scalar_t>(query);
    scalar_t* user = result.user.mutable_data_ptr<scalar_t>();
    scalar_t* bias = result.bias.mutable_data_ptr<scalar_t>();
    scalar_t* scores = result.scores.mutable_data_ptr<scalar_t>();
    const Layout<scalar_t>& layout = reader.layout;

    const TaskBlocks blocks(inputs.T(), reader.support.offsets, queries.offsets,
                            reader.entry_cost());
    // fast and scores of task t, computed with a worker's state
    const auto put = [&](int64_t t, const scalar_t* fast, const scalar_t* own) {
      std::copy(fast, fast + layout.dim, user + t * layout.dim);
      bias[t] = fast[layout.width];
      std::copy(own, own + queries.size(t), scores + queries.begin(t));
    };
    const auto adapt_users = [&](int64_t, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, solver] = worker;
      const Task<scalar_t> task = reader.next(t, last, &queries, arena, ahead);
      const scalar_t* fast = solver.forward(task, arena, /*backward=*/false);
      const Query<scalar_t> asked = read_query(reader, queries, t, arena);
      scalar_t* own = arena.take(asked.size());
      score_query(asked, fast, own);
      put(t, fast, own);
    };
    const auto adapt_items_too = [&](int64_t, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, items] = worker;
      const Task<scalar_t> task = reader.next(t, last, &queries, arena, ahead);
      items.find(reader.support, queries, t);
      const int64_t K = reader.loop.steps;
      const Query<scalar_t> asked = read_query(reader, queries, t, arena);
      scalar_t* own = arena.take(asked.size());
      if (worth_factoring(items.index.size(), K)) {
        FactoredPath<scalar_t> path;
        factored_forward(task, items.index, arena, path);
        score_factored(asked, items, path, arena, own);
        return put(t, path.vector(K), own);
      }
      FullPath<scalar_t> path = adapt_full(task, items.index, arena);
      const scalar_t* fast = path.fast + K * layout.stride;
      score_full(asked, items.query.data(), path, fast, own);
      put(t, fast, own);
    };
    if (loop.adapts_items)
      blocks.run<Worker<scalar_t, FullItems>>(adapt_items_too);
    else
      blocks.run<Worker<scalar_t, InnerSolver<scalar_t>>>(adapt_users);
  });
  return result;
}

std::tuple<Tensor, Tensor> adapt_cpu(
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
  const Adapted adapted = run_forward(inputs, nothing, loop);
  return {adapted.user, adapted.bias};
}

std::tuple<Tensor, Tensor, Tensor> adapt_and_score_cpu(
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
  const Adapted adapted =
      run_forward(inputs, RaggedItems("query", query_items, query_offsets, item_table), loop);
  return {adapted.user, adapted.bias, adapted.scores};
}

GradientTuple adapt_and_score_backward_cpu(
    const Tensor& grad_user, const Tensor& grad_bias, const Tensor& grad_scores,
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const Tensor& inner_lr, const OptionalTensor& preconditioner,
    const OptionalTensor& prior_pull, const OptionalTensor& momentum, double extra_count,
    int64_t inner_steps, const std::string& loss, bool first_order, const std::string& form,
    const std::string& adapt, int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss, first_order, form, adapt);
  const RaggedItems query("query", query_items, query_offsets, item_table);
  check_query(query, inputs);
  const ArrivingGradients arriving(inputs, grad_user, grad_bias);
  const Tensor arriving_scores = as_contiguous(grad_scores);
  ArrivingGradients::check("grad_scores", arriving_scores, inputs, {query.size()});
  const Wanted wanted{wanted_bits};

  GradientTuple result;
  dispatch_floating(inputs.dtype(), "adapt_and_score_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const EntryData<scalar_t> queries = entry_data<scalar_t>(query);
    const scalar_t* from_user = arriving.user.const_data_ptr<scalar_t>();
    const scalar_t* from_bias = arriving.bias.const_data_ptr<scalar_t>();
    const scalar_t* from_scores = arriving_scores.const_data_ptr<scalar_t>();
    const TaskBlocks blocks(inputs.T(), reader.support.offsets, queries.offsets,
                            reader.entry_cost());
    Gradients<scalar_t> gradients(inputs, loop, wanted, query, blocks.size());

    // p̄ of task t's query, and φ̄ as far as it comes from fast weights that were asked for.
    const auto arrivals = [&](int64_t t, int64_t size, Arena<scalar_t>& arena) {
      scalar_t* grad_scores = arena.take(size);
      scalar_t* grad_fast = arena.take(layout.stride);
      copy_in(from_scores + queries.begin(t), size, grad_scores);
      pack(from_user + t * layout.dim, from_bias[t], layout, grad_fast);
      return std::pair(grad_scores, grad_fast);
    };
    const auto undo_users = [&](int64_t block, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, solver] = worker;
      const Task<scalar_t> task = reader.next(t, last, &queries, arena, ahead);
      const Query<scalar_t> asked = read_query(reader, queries, t, arena);
      const scalar_t* fast = solver.forward(task, arena, /*backward=*/true);

      const int64_t begin = queries.begin(t), support_begin = reader.support.begin(t);
      const auto [grad_scores, grad_fast] = arrivals(t, asked.size(), arena);
      scalar_t* from_query = arena.take(layout.stride);
      query_adjoint(asked, grad_scores, from_query);
      for (int64_t d = 0; d < layout.stride; ++d) grad_fast[d] += from_query[d];
      write_query_rows(asked, begin, layout, grad_scores, 0, fast, 1, arena, gradients);
      const TaskGradients<scalar_t> grads = gradients.of_task(block, task, support_begin, arena);
      solver.adjoint(task, arena, grad_fast, /*whole_path=*/false, grads);
      gradients.add_task(block, task, grads, support_begin, grad_scores, asked, begin);
    };
    const auto undo_items_too = [&](int64_t block, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, items] = worker;
      const Task<scalar_t> task = reader.next(t, last, &queries, arena, ahead);
      const Query<scalar_t> asked = read_query(reader, queries, t, arena);
      items.find(reader.support, queries, t);
      const int64_t begin = queries.begin(t), support_begin = reader.support.begin(t);
      const auto [grad_scores, grad_fast] = arrivals(t, asked.size(), arena);
      const int64_t K = reader.loop.steps;
      if (worth_factoring(items.index.size(), K)) {
        FactoredPath<scalar_t> path;
        factored_forward(task, items.index, arena, path);
        return undo_factored(task, block, asked, begin, support_begin, items, path, grad_scores,
                             grad_fast, arena, gradients);
      }
      FullPath<scalar_t> path = adapt_full(task, items.index, arena);
      const scalar_t* fast = path.fast + K * layout.stride;
      FullGradients<scalar_t> grads =
          gradients.of_full_task(block, path.items, support_begin, arena);
      for (int64_t d = 0; d < layout.stride; ++d) grads.fast[d] = grad_fast[d];
      add_query_full(asked, items.query.data(), layout, path, fast, grad_scores, grads);
      write_query_rows(asked, begin, layout, grad_scores, 0, fast, 1, arena, gradients);
      for (int64_t k = K - 1; k >= 0; --k) undo_full(task, items.index, k, arena, path, grads);
      gradients.add_full_task(block, task, grads, items.index, support_begin, grad_scores, asked,
                              begin);
    };
    if (loop.adapts_items)
      blocks.run<Worker<scalar_t, FullItems>>(undo_items_too);
    else
      blocks.run<Worker<scalar_t, InnerSolver<scalar_t>>>(undo_users);
    gradients.finish();
    result = gradients.dense_tuple(inputs, query);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("adapt", TORCH_BOX(&adapt_cpu));
  m.impl("adapt_and_score", TORCH_BOX(&adapt_and_score_cpu));
  m.impl("adapt_and_score_backward", TORCH_BOX(&adapt_and_score_backward_cpu));
}

METAREC_DIRECT_CALL(adapt, adapt_cpu)
METAREC_DIRECT_CALL(adapt_and_score, adapt_and_score_cpu)

}  // namespace metarec_fast::cpu
