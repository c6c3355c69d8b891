// The outer loss of a batch under an MLP tower and all its gradients, in one pass: while a task is
// in L2 it is adapted, judged and undone.
//
//   L = Σ_t ω_t L_Q,t / Σ_t ω_t,   L_Q,t = Σ_q v_q ℓ_out(p_q, y_q) / Σ_q v_q  at φ_K
#include "query_loss.h"
#include "tower_batch.h"

namespace metarec_fast::cpu {
namespace {

using MlpMetaStepTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

MlpMetaStepTuple mlp_meta_step_cpu(
    const Tensor& user_part, const Tensor& item_table, const OptionalTensor& item_bias,
    const Tensor& parameters, const std::vector<int64_t>& widths, const Tensor& support_items,
    const Tensor& support_offsets, const OptionalTensor& support_targets,
    const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
    const OptionalTensor& support_log_q, int64_t largest_support, const Tensor& query_items,
    const Tensor& query_offsets, const OptionalTensor& query_targets,
    const OptionalTensor& query_weights, const OptionalTensor& query_negatives,
    const OptionalTensor& query_log_q, const OptionalTensor& task_weights, const Tensor& inner_lr,
    int64_t inner_steps, const std::string& activation, const std::string& loss_name,
    bool first_order, const std::string& outer_name) {
  const TowerInputs inputs(
      user_part, item_table, item_bias, parameters, widths, support_items, support_offsets,
      support_targets, support_weights, support_negatives, support_log_q, largest_support,
      {"query", query_items, query_offsets, item_table, query_negatives, query_log_q}, inner_lr,
      inner_steps, activation, loss_name, first_order);
  const OuterLoss outer_loss = parse_outer_loss(outer_name);
  STD_TORCH_CHECK(query_targets || !outer_loss.pointwise(),
                  "query_targets: needed by the outer losses squared, logistic and absolute");
  STD_TORCH_CHECK(inputs.query.negatives || !outer_loss.pairwise(),
                  "query_negatives: needed by the outer losses bpr and softmax");
  const OptionalTensor asked = inputs.checked("query_targets", query_targets, inputs.query.size());
  const OptionalTensor entry_weights =
      inputs.checked("query_weights", query_weights, inputs.query.size());
  const OptionalTensor omegas = inputs.checked("task_weights", task_weights, inputs.T());

  Tensor loss = empty(item_table, inputs.dtype(), {});
  TowerTuple grads;
  dispatch_floating(inputs.dtype(), "mlp_meta_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto data = [](const OptionalTensor& tensor) {
      return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    const TowerBatch<scalar_t> batch(inputs);
    const QueryLoss<scalar_t> outer{outer_loss, data(asked), data(entry_weights),
                                    batch.query.log_q};
    const scalar_t* omega = data(omegas);
    double total = 0;
    for (int64_t t = 0; t < inputs.T(); ++t)
      if (batch.query.size(t) > 0) total += omega == nullptr ? 1 : omega[t];
    const scalar_t normaliser = total > 0 ? static_cast<scalar_t>(1 / total) : 0;

    const TaskBlocks blocks = batch.blocks();
    const TowerSums<scalar_t> sums(inputs, batch.tower, blocks.size());
    const auto judge = [&](int64_t block, int64_t t, TowerTask<scalar_t>& task,
                           Arena<scalar_t>& arena) {
      const int64_t begin = batch.query.begin(t), count = batch.query.size(t),
                    group = batch.query.candidates();
      scalar_t *scores = arena.take(count * group), *grad_scores = arena.take(count * group);
      task.score(scores);
      const scalar_t share = normaliser * (omega == nullptr ? scalar_t{1} : omega[t]) /
                             outer.total(begin, begin + count);
      sums.add_loss(block,
                    judge_query(outer, scores, begin, count, group, share, arena, grad_scores));
      task.adjoint(grad_scores, sums.of_task(block, t, batch.support, batch.query));
    };
    batch.run(blocks, judge, [&](int64_t t) { sums.add_nothing(t, batch.support); });
    *loss.mutable_data_ptr<scalar_t>() = sums.finish();
    grads = sums.tuple();
  });
  return std::tuple_cat(std::make_tuple(loss), grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("mlp_meta_step", TORCH_BOX(&mlp_meta_step_cpu));
}

}  // namespace metarec_fast::cpu
