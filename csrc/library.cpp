// The schema of every operator. Kernels register themselves in cpu/ and cuda/;
// fake kernels and gradients are in metarec_fast/_autograd.py.
#include <atomic>
#include <string>

#include "tensor.h"

namespace {

// What a user starts from, and the ratings to adapt on: at most `largest_support` of a task.
const std::string kInputs =
    "Tensor user_init, Tensor user_bias_init, Tensor item_table, Tensor item_bias, Tensor offset, "
    "Tensor support_items, Tensor support_targets, Tensor support_offsets, "
    "Tensor? support_weights, Tensor? support_negatives, Tensor? support_log_q, int "
    "largest_support, ";

const std::string kLoop =
    "Tensor inner_lr, Tensor? preconditioner, Tensor? prior_pull, Tensor? momentum, "
    "float extra_count, int inner_steps, str loss, bool first_order, str form, "
    "str adapt";

// user_init, user_bias_init, item_table, item_bias, offset, inner_lr, preconditioner, prior_pull,
// momentum, support_weights, as far as they are wanted
const std::string kGradients =
    "Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?";

// An MLP tower, whose parameters are one vector, and the tasks that it adapts to, each of at most
// `largest_support` support entries.
const std::string kTower =
    "Tensor user_part, Tensor item_table, Tensor? item_bias, Tensor parameters, int[] widths, "
    "Tensor support_items, Tensor support_offsets, Tensor? support_targets, "
    "Tensor? support_weights, Tensor? support_negatives, Tensor? support_log_q, "
    "int largest_support, Tensor query_items, Tensor query_offsets, ";

const std::string kTowerLoop =
    "Tensor inner_lr, int inner_steps, str activation, str loss, bool first_order";

// Of user_part, parameters and inner_lr; and rows of items by their ids.
const std::string kTowerGradients = "Tensor, Tensor, Tensor, Tensor rows, Tensor item_ids";

// Whether sums of rows on CUDA may be formed in any order: for the process, since a backward pass
// runs in a thread of its own.
std::atomic<bool> atomics{false};

// What it was before.
bool allow_atomics(bool mode) { return atomics.exchange(mode); }

// Only Python knows whether PyTorch's algorithms have to be deterministic, and is asked only where
// it matters, since it may have to wait for its lock.
bool atomics_allowed() {
  return atomics && !metarec_fast::ask(C10_STRINGIZE(METAREC_NAMESPACE) "::must_be_deterministic");
}

}  // namespace

STABLE_TORCH_LIBRARY(METAREC_NAMESPACE, m) {
  m.def(("adapt(" + kInputs + kLoop + ") -> (Tensor, Tensor)").c_str());
  m.def(("adapt_and_score(" + kInputs + "Tensor query_items, Tensor query_offsets, " + kLoop +
         ") -> (Tensor, Tensor, Tensor)")
            .c_str());
  m.def(("adapt_and_score_backward(Tensor grad_user, Tensor grad_bias, Tensor grad_scores, " +
         kInputs + "Tensor query_items, Tensor query_offsets, " + kLoop + ", int wanted) -> (" +
         kGradients + ")")
            .c_str());
  m.def(("meta_step(" + kInputs +
         "Tensor query_items, Tensor? query_targets, Tensor query_offsets, Tensor? query_weights, "
         "Tensor? query_negatives, Tensor? query_log_q, Tensor? task_weights, " +
         kLoop + ", str outer_loss, Tensor? step_weights, int wanted) -> (Tensor, " + kGradients +
         ", Tensor item_ids)")
            .c_str());
  m.def(("adapt_all(" + kInputs + kLoop + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def(("adapt_all_backward(Tensor grad_user, Tensor grad_bias, Tensor grad_rows, Tensor "
         "grad_biases, " +
         kInputs + kLoop + ", int wanted) -> (" + kGradients + ")")
            .c_str());
  m.def(("reptile_step(" + kInputs + "Tensor? task_weights, " + kLoop +
         ") -> (Tensor, Tensor, Tensor, Tensor?, Tensor?)")
            .c_str());
  m.def(
      "score_top_k(Tensor user, Tensor user_bias, Tensor item_table, Tensor item_bias, int k, "
      "Tensor? exclude_items, Tensor? exclude_offsets, bool tensor_cores=False) -> (Tensor, "
      "Tensor)");
  m.def("coalesce_rows(Tensor ids, Tensor rows) -> (Tensor, Tensor)");
  m.def("coalesce_rows_padded(Tensor ids, Tensor rows) -> (Tensor, Tensor, Tensor)");
  m.def("sum_rows(Tensor ids, Tensor rows, SymInt num_rows) -> Tensor");
  m.def(
      "sparse_adam(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor ids, Tensor[] rows, float lr, float beta1, float beta2, float eps, int step) -> ()");
  m.def(
      "sparse_adagrad(Tensor(a!)[] params, Tensor(b!)[] sums, Tensor ids, Tensor[] rows, float lr, "
      "float eps) -> ()");
  m.def("sparse_sgd(Tensor(a!)[] params, Tensor ids, Tensor[] rows, float lr) -> ()");
  m.def(("mlp_adapt_and_score(" + kTower + kTowerLoop + ") -> Tensor").c_str());
  m.def(("mlp_adapt_and_score_backward(Tensor grad_scores, " + kTower + kTowerLoop + ") -> (" +
         kTowerGradients + ")")
            .c_str());
  m.def(("mlp_meta_step(" + kTower +
         "Tensor? query_targets, Tensor? query_weights, Tensor? query_negatives, "
         "Tensor? query_log_q, Tensor? task_weights, " +
         kTowerLoop + ", str outer_loss) -> (Tensor loss, " + kTowerGradients + ")")
            .c_str());
  m.def("use_huge_pages(Tensor table) -> ()");
  m.def("allow_atomics(bool mode) -> bool");
  m.def("atomics_allowed() -> bool");
  m.def("must_be_deterministic() -> bool");  // answered in metarec_fast/_autograd.py
}

STABLE_TORCH_LIBRARY_IMPL(METAREC_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("allow_atomics", TORCH_BOX(&allow_atomics));
  m.impl("atomics_allowed", TORCH_BOX(&atomics_allowed));
}
