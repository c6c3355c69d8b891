// The outer loss of a batch and all its gradients, in one pass: while a task is in L1 it is
// adapted, judged and undone.
//
//   L = Σ_t ω_t L_Q,t / Σ_t ω_t,   L_Q,t = Σ_k κ_k Σ_q v_q ℓ_out(p_q(φ_k), y_q) / Σ_q v_q
#include "gradients.h"
#include "inner_solver.h"

namespace metarec_fast::cpu {
namespace {

// What the query of a task is judged by.
template <typename scalar_t>
struct Judge {
  OuterLoss loss;
  const scalar_t* targets;  // y [n]
  const scalar_t* weights;  // v [n], or nullptr: ones

  // Σ_q v_q of the entries [begin, end).
  scalar_t total(int64_t begin, int64_t end) const {
    if (weights == nullptr) return static_cast<scalar_t>(end - begin);
    scalar_t sum = 0;
    for (int64_t q = begin; q < end; ++q) sum += weights[q];
    return sum;
  }

  // share · Σ_q v_q ℓ(p_q, y_q), and its derivatives in the scores.
  scalar_t judge(const scalar_t* scores, int64_t begin, int64_t size, scalar_t share,
                 scalar_t* grad_scores) const {
    scalar_t sum = 0;
    for (int64_t q = 0; q < size; ++q) {
      const scalar_t weight = weights == nullptr ? share : share * weights[begin + q];
      sum += weight * loss.value(scores[q], targets[begin + q]);
      grad_scores[q] = weight * loss.derivative(scores[q], targets[begin + q]);
    }
    return sum;
  }
};

using MetaStepTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;

MetaStepTuple meta_step_cpu(const Tensor& user_init, const Tensor& user_bias_init,
                            const Tensor& item_table, const Tensor& item_bias, const Tensor& offset,
                            const Tensor& support_items, const Tensor& support_targets,
                            const Tensor& support_offsets, const OptionalTensor& support_weights,
                            const Tensor& query_items, const Tensor& query_targets_in,
                            const Tensor& query_offsets, const OptionalTensor& query_weights_in,
                            const OptionalTensor& task_weights_in, const Tensor& inner_lr,
                            const OptionalTensor& preconditioner, const OptionalTensor& prior_pull,
                            const OptionalTensor& momentum, double extra_count, int64_t inner_steps,
                            const std::string& loss_name, bool first_order, const std::string& form,
                            double outer_squared, double outer_logistic, double outer_absolute,
                            const OptionalTensor& step_weights_in, int64_t wanted_bits) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form);
  const RaggedItems query("query", query_items, query_offsets, item_table);
  const int64_t T = inputs.T();
  check_query(query, inputs);
  const auto contiguous = [&](const char* name, const OptionalTensor& tensor, int64_t size) {
    if (!tensor) return OptionalTensor();
    check_tensor(name, *tensor, item_table.scalar_type(), item_table);
    check_size(name, *tensor, size);
    return OptionalTensor(as_contiguous(*tensor));
  };
  const Tensor query_targets = *contiguous("query_targets", query_targets_in, query.size());
  const OptionalTensor query_weights = contiguous("query_weights", query_weights_in, query.size());
  const OptionalTensor task_weights = contiguous("task_weights", task_weights_in, T);
  const OptionalTensor step_weights = contiguous("step_weights", step_weights_in, inner_steps + 1);
  STD_TORCH_CHECK(!step_weights || inner_steps != kExact,
                  "step_weights: 'exact' has no steps to weigh");
  const Wanted wanted{wanted_bits};

  Tensor loss = torch::stable::new_zeros(item_table, {});
  GradientTuple grads;
  dispatch_floating(item_table.scalar_type(), "meta_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto data = [](const OptionalTensor& tensor) {
      return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const int64_t* items = query.items.const_data_ptr<int64_t>();
    const int64_t* offsets = query.offsets.const_data_ptr<int64_t>();
    const Judge<scalar_t> judge{{outer_squared, outer_logistic, outer_absolute},
                                query_targets.const_data_ptr<scalar_t>(),
                                data(query_weights)};
    const scalar_t* task_weight = data(task_weights);
    const scalar_t* step_weight = data(step_weights);
    const int64_t first_step = step_weight == nullptr ? 0 : -loop.steps;  // relative to the last

    double total_weight = 0;
    for (int64_t t = 0; t < T; ++t)
      if (offsets[t + 1] > offsets[t]) total_weight += task_weight == nullptr ? 1 : task_weight[t];
    const scalar_t normaliser = static_cast<scalar_t>(total_weight > 0 ? 1 / total_weight : 0);

    const TaskBlocks blocks(T, reader.support_offsets, offsets);
    Gradients<scalar_t> gradients(inputs, loop, wanted, query.size(), blocks.size());
    const auto make_solver = [] { return InnerSolver<scalar_t>(); };
    blocks.run(make_solver, [&](int64_t block, int64_t first, int64_t last, auto& solver) {
      Arena<scalar_t>& arena = thread_arena<scalar_t>();
      for (int64_t t = first; t < last; ++t) {
        arena.reset();
        const Task<scalar_t> task = reader.read(t, arena);
        if (t + 1 < last) reader.prefetch(t + 1, items, offsets);
        const bool whole_path = step_weight != nullptr;
        const scalar_t* fast = solver.forward(task, arena, wanted.any(), whole_path);

        const int64_t begin = offsets[t], size = offsets[t + 1] - begin;
        const Query<scalar_t> entries(reader, items + begin, size, arena);
        scalar_t* query_rows = gradients.zeroed_query_rows(begin, size);
        scalar_t* scores = arena.take(size);
        scalar_t* grad_scores = arena.take(size);
        scalar_t* sum_scores = arena.take_zeros(size);
        scalar_t* grad_path = arena.take_zeros((1 - first_step) * layout.stride);
        const scalar_t weight = normaliser * (task_weight == nullptr ? 1 : task_weight[t]);
        const scalar_t share = size == 0 ? 0 : weight / judge.total(begin, begin + size);
        for (int64_t k = first_step; k <= 0 && size > 0; ++k) {
          const scalar_t kappa = whole_path ? step_weight[loop.steps + k] : scalar_t{1};
          if (kappa == 0) continue;
          const scalar_t* now = whole_path ? solver.fast_weights(task, loop.steps + k) : fast;
          score_query(entries, layout, now, scores);
          gradients.add_loss(block, judge.judge(scores, begin, size, kappa * share, grad_scores));
          if (!wanted.any()) continue;
          query_adjoint(entries, layout, now, grad_scores, arena,
                        grad_path + (k - first_step) * layout.stride, query_rows);
          for (int64_t q = 0; q < size; ++q) sum_scores[q] += grad_scores[q];
        }
        if (!wanted.any()) continue;

        const int64_t support_begin = reader.support_offsets[t];
        scalar_t* start = arena.take(layout.stride);
        scalar_t* base = arena.take_zeros(task.size);
        solver.adjoint(task, arena, grad_path, whole_path,
                       gradients.of_task(block, support_begin, start, base));
        gradients.add_task(block, t, start, base, support_begin, task.size, sum_scores, begin,
                           size);
      }
    });
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(gradients.finish());
    grads = gradients.tuple();
  });
  return std::tuple_cat(std::make_tuple(loss), grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) { m.impl("meta_step", TORCH_BOX(&meta_step_cpu)); }

}  // namespace metarec_fast::cpu
