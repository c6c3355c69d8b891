// The outer loss of a batch and all its gradients, in one pass: while a task is in L1 it is
// adapted, judged and undone.
//
//   L = Σ_t ω_t L_Q,t / Σ_t ω_t,   L_Q,t = Σ_k κ_k Σ_q v_q ℓ_out(p_q(φ_k), y_q) / Σ_q v_q
#include "direct_call.h"
#include "factored_task.h"
#include "inner_solver.h"
#include "query_loss.h"

namespace metarec_fast::cpu {
namespace {

// What the tasks of a batch are adapted on and judged by.
template <typename scalar_t>
struct Batch {
  const TaskReader<scalar_t>& reader;
  const EntryData<scalar_t> queries;
  QueryLoss<scalar_t> outer;
  const scalar_t* task_weight;  // ω [T], or nullptr: ones
  const scalar_t* step_weight;  // κ [K + 1], or nullptr: only the last step counts
  scalar_t normaliser = 0;      // 1 / Σ ω over tasks with a query
  std::optional<RowIds> ids;    // of gradient rows, where they are wanted

  Batch(const TaskReader<scalar_t>& reader_in, const RaggedItems& query,
        const QueryLoss<scalar_t>& outer_in, const scalar_t* task_weight_in,
        const scalar_t* step_weight_in)
      : reader(reader_in),
        queries(entry_data<scalar_t>(query)),
        outer(outer_in),
        task_weight(task_weight_in),
        step_weight(step_weight_in) {
    outer.log_q = queries.log_q;
    double total = 0;
    for (int64_t t = 0; t < query.num_tasks; ++t)
      if (queries.size(t) > 0) total += task_weight == nullptr ? 1 : task_weight[t];
    if (total > 0) normaliser = static_cast<scalar_t>(1 / total);
  }

  void copy_ids(int64_t t) const {
    if (!ids) return;
    ids->copy_support(reader.support.begin(t), reader.support.begin(t + 1));
    ids->copy_query(queries.begin(t), queries.begin(t + 1));
  }

  bool whole_path() const { return step_weight != nullptr; }
  int64_t num_judged() const { return whole_path() ? reader.loop.steps + 1 : 1; }

  // How much the loss of point k of the path counts for each unit of query weight.
  scalar_t share(int64_t t, int64_t k) const {
    if (queries.size(t) == 0) return 0;
    const scalar_t weight = normaliser * (task_weight == nullptr ? 1 : task_weight[t]);
    const scalar_t kappa = whole_path() ? step_weight[k] : scalar_t{1};
    return kappa * weight / outer.total(queries.begin(t), queries.begin(t + 1));
  }

  scalar_t judge(const Query<scalar_t>& asked, int64_t t, int64_t k, const scalar_t* scores,
                 Arena<scalar_t>& arena, scalar_t* grad_scores) const {
    return judge_query(outer, scores, queries.begin(t), asked.num_entries, asked.group, share(t, k),
                       arena, grad_scores);
  }
};

template <typename scalar_t>
void adapt_users(const Batch<scalar_t>& batch, const TaskBlocks& blocks, Wanted wanted,
                 Gradients<scalar_t>& gradients) {
  const TaskReader<scalar_t>& reader = batch.reader;
  const Layout<scalar_t>& layout = reader.layout;
  const bool whole_path = batch.whole_path();
  const int64_t judged = batch.num_judged();
  blocks.run<Worker<scalar_t, InnerSolver<scalar_t>>>([&](int64_t block, int64_t t, int64_t last,
                                                          auto& worker) {
    auto& [arena, ahead, solver] = worker;
    const Task<scalar_t> task = reader.next(t, last, &batch.queries, arena, ahead);
    const Query<scalar_t> asked = read_query(reader, batch.queries, t, arena);
    batch.copy_ids(t);
    const scalar_t* fast = solver.forward(task, arena, wanted.any(), whole_path);
    if (whole_path) fast = solver.path();

    const int64_t begin = batch.queries.begin(t), room = padded<scalar_t>(asked.size());
    const auto [scores, grad_scores, grad_path] =
        arena.take_each(room, judged * room, judged * layout.stride);
    if (asked.size() == 0) fill(grad_path, judged * layout.stride, scalar_t{0});
    for (int64_t k = 0; k < judged && asked.size() > 0; ++k) {
      score_query(asked, fast + k * layout.stride, scores);
      gradients.add_loss(block, batch.judge(asked, t, k, scores, arena, grad_scores + k * room));
      if (wanted.any()) query_adjoint(asked, grad_scores + k * room, grad_path + k * layout.stride);
    }
    if (!wanted.any()) return;
    write_query_rows(asked, begin, layout, grad_scores, room, fast, judged, arena, gradients);
    for (int64_t k = 1; k < judged; ++k)
      for (int64_t q = 0; q < asked.size(); ++q) grad_scores[q] += grad_scores[k * room + q];

    const int64_t support_begin = reader.support.begin(t);
    const TaskGradients<scalar_t> grads = gradients.of_task(block, task, support_begin, arena);
    solver.adjoint(task, arena, grad_path, whole_path, grads);
    gradients.add_task(block, task, grads, support_begin, grad_scores, asked, begin);
  });
}

template <typename scalar_t>
void adapt_items_too(const Batch<scalar_t>& batch, const TaskBlocks& blocks, Wanted wanted,
                     Gradients<scalar_t>& gradients) {
  const TaskReader<scalar_t>& reader = batch.reader;
  const Layout<scalar_t>& layout = reader.layout;
  const int64_t K = reader.loop.steps, judged = batch.num_judged(), first_judged = K + 1 - judged;
  const bool whole_path = batch.whole_path();
  blocks.run<Worker<scalar_t, FullItems>>([&](int64_t block, int64_t t, int64_t last,
                                              auto& worker) {
    auto& [arena, ahead, items] = worker;
    const Task<scalar_t> task = reader.next(t, last, &batch.queries, arena, ahead);
    const Query<scalar_t> asked = read_query(reader, batch.queries, t, arena);
    batch.copy_ids(t);
    items.find(reader.support, batch.queries, t);
    const int64_t* place = items.query.data();
    const int64_t begin = batch.queries.begin(t), support_begin = reader.support.begin(t),
                  room = padded<scalar_t>(asked.size());
    scalar_t* scores = arena.take(asked.size());
    scalar_t* grad_scores = arena.take_zeros(judged * room);
    if (!whole_path && worth_factoring(items.index.size(), K)) {
      FactoredPath<scalar_t> path;
      factored_forward(task, items.index, arena, path);
      score_factored(asked, items, path, arena, scores);
      if (asked.size() > 0)
        gradients.add_loss(block, batch.judge(asked, t, 0, scores, arena, grad_scores));
      if (wanted.any())
        undo_factored<scalar_t>(task, block, asked, begin, support_begin, items, path, grad_scores,
                                nullptr, arena, gradients);
      return;
    }

    FullPath<scalar_t> path;
    start_full(task, items.index, arena, path);
    for (int64_t k = 0; k <= K; ++k) {
      if (k >= first_judged && asked.size() > 0) {
        const int64_t j = k - first_judged;
        score_full(asked, place, path, path.fast + k * layout.stride, scores);
        gradients.add_loss(block, batch.judge(asked, t, j, scores, arena, grad_scores + j * room));
      }
      if (k < K) step_full(task, items.index, k, arena, path);
    }
    if (!wanted.any()) return;

    FullGradients<scalar_t> grads = gradients.of_full_task(block, path.items, support_begin, arena);
    for (int64_t k = K; k >= 0; --k) {
      if (k < K) undo_full(task, items.index, k, arena, path, grads);
      if (k >= first_judged && asked.size() > 0)
        add_query_full(asked, place, layout, path, path.fast + k * layout.stride,
                       grad_scores + (k - first_judged) * room, grads);
    }
    write_query_rows(asked, begin, layout, grad_scores, room,
                     path.fast + first_judged * layout.stride, judged, arena, gradients);
    for (int64_t k = 1; k < judged; ++k)
      for (int64_t q = 0; q < asked.size(); ++q) grad_scores[q] += grad_scores[k * room + q];
    gradients.add_full_task(block, task, grads, items.index, support_begin, grad_scores, asked,
                            begin);
  });
}

MetaStepTuple meta_step_cpu(const Tensor& user_init, const Tensor& user_bias_init,
                            const Tensor& item_table, const Tensor& item_bias, const Tensor& offset,
                            const Tensor& support_items, const Tensor& support_targets,
                            const Tensor& support_offsets, const OptionalTensor& support_weights,
                            const OptionalTensor& support_negatives,
                            const OptionalTensor& support_log_q, int64_t largest_support,
                            const Tensor& query_items, const OptionalTensor& query_targets,
                            const Tensor& query_offsets, const OptionalTensor& query_weights,
                            const OptionalTensor& query_negatives,
                            const OptionalTensor& query_log_q, const OptionalTensor& task_weights,
                            const Tensor& inner_lr, const OptionalTensor& preconditioner,
                            const OptionalTensor& prior_pull, const OptionalTensor& momentum,
                            double extra_count, int64_t inner_steps, const std::string& loss_name,
                            bool first_order, const std::string& form, const std::string& adapt,
                            const std::string& outer_loss, const OptionalTensor& step_weights,
                            int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  const RaggedItems query("query", query_items, query_offsets, item_table, query_negatives,
                          query_log_q);
  check_query(query, inputs);
  const JudgedQuery judged(inputs, inner_steps, query, query_targets, query_weights, task_weights,
                           step_weights, outer_loss);
  const Wanted wanted{wanted_bits};

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  OptionalTensor item_ids;
  GradientTuple grads;
  dispatch_floating(inputs.dtype(), "meta_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto data = [](const OptionalTensor& tensor) {
      return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    const TaskReader<scalar_t> reader(inputs, loop);
    Batch<scalar_t> batch(reader, query,
                          {judged.loss, data(judged.targets), data(judged.weights), nullptr},
                          data(judged.task_weights), data(judged.step_weights));
    const TaskBlocks blocks(inputs.T(), reader.support.offsets, batch.queries.offsets,
                            reader.entry_cost());
    Gradients<scalar_t> gradients(inputs, loop, wanted, query, blocks.size());
    if (wanted.items()) item_ids = batch.ids.emplace(inputs.support, query, gradients.places).ids;
    if (loop.adapts_items)
      adapt_items_too(batch, blocks, wanted, gradients);
    else
      adapt_users(batch, blocks, wanted, gradients);
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(gradients.finish());
    grads = gradients.tuple();
  });
  if (!item_ids) item_ids = empty(query.items, ScalarType::Long, {0});
  return std::tuple_cat(std::make_tuple(loss), std::move(grads), std::make_tuple(*item_ids));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) { m.impl("meta_step", TORCH_BOX(&meta_step_cpu)); }

METAREC_DIRECT_CALL(meta_step, meta_step_cpu)

}  // namespace metarec_fast::cpu
