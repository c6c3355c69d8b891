// Checks what the operators are given and keeps contiguous views of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "entries.h"
#include "inner_loop.h"
#include "tensor.h"

namespace metarec_fast {

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  ": expected to be on the same device as item_table");
}

inline void check_size(const char* name, const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape [", size,
                  "], got ", tensor.dim(), " dimensions and ", tensor.numel(), " numbers");
}

inline Loss parse_loss(const std::string& name) {
  if (name == "squared") return Loss::kSquared;
  if (name == "logistic") return Loss::kLogistic;
  if (name == "bpr") return Loss::kBpr;
  if (name == "softmax") return Loss::kSoftmax;
  STD_TORCH_CHECK(false, "loss: expected squared, logistic, bpr or softmax, got '", name, "'");
}

// The weight of a loss among those that queries are judged by.
inline double& weight_of(OuterLoss& loss, const std::string& name) {
  if (name == "squared") return loss.squared;
  if (name == "logistic") return loss.logistic;
  if (name == "absolute") return loss.absolute;
  if (name == "bpr") return loss.bpr;
  if (name == "softmax") return loss.softmax;
  STD_TORCH_CHECK(false, "outer_loss: expected squared, logistic, absolute, bpr or softmax, got '",
                  name, "'");
}

// "squared", or several with their weights: "squared=0.5,absolute=0.5".
inline OuterLoss parse_outer_loss(const std::string& text) {
  OuterLoss result{};
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size()),
                 name_end = std::min(text.find('=', begin), end);
    double& weight = weight_of(result, text.substr(begin, name_end - begin));
    weight = 1;
    if (name_end < end) {
      std::istringstream number(text.substr(name_end + 1, end - name_end - 1));
      number.imbue(std::locale::classic());
      STD_TORCH_CHECK(number >> weight && number.eof() && weight >= 0 && std::isfinite(weight),
                      "outer_loss: expected a weight ≥ 0, got '", number.str(), "' in '", text,
                      "'");
    }
    begin = end + 1;
  }
  return result;
}

// Entries of T tasks, one after the other: task t owns [offsets[t], offsets[t + 1]).
struct RaggedItems {
  Tensor items;              // int64 [n]
  Tensor offsets;            // int64 [T + 1]
  OptionalTensor negatives;  // int64 [n, M]
  OptionalTensor log_q;      // [n, 1 + M]
  int64_t num_tasks = 0;

  RaggedItems(const std::string& name, const Tensor& items_in, const Tensor& offsets_in,
              const Tensor& like, const OptionalTensor& negatives_in = std::nullopt,
              const OptionalTensor& log_q_in = std::nullopt)
      : items(as_contiguous(items_in)), offsets(as_contiguous(offsets_in)) {
    check_tensor((name + "_items").c_str(), items, ScalarType::Long, like);
    check_tensor((name + "_offsets").c_str(), offsets, ScalarType::Long, like);
    STD_TORCH_CHECK(items.dim() == 1, name, "_items: expected shape [n]");
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, name,
                    "_offsets: expected shape [T + 1]");
    num_tasks = offsets.size(0) - 1;
    if (negatives_in) {
      negatives = as_contiguous(*negatives_in);
      check_tensor((name + "_negatives").c_str(), *negatives, ScalarType::Long, like);
      STD_TORCH_CHECK(
          negatives->dim() == 2 && negatives->size(0) == size() && negatives->size(1) > 0, name,
          "_negatives: expected shape [n, M] with n = ", size(), " and M ≥ 1");
    }
    if (log_q_in) {
      log_q = as_contiguous(*log_q_in);
      STD_TORCH_CHECK(log_q->device() == like.device() && log_q->dim() == 2 &&
                          log_q->size(0) == size() && log_q->size(1) == candidates(),
                      name, "_log_q: expected shape [n, 1 + M] with n = ", size(),
                      ", 1 + M = ", candidates());
    }
  }

  // As many tasks, none with an entry.
  RaggedItems without_entries() const {
    return RaggedItems("query", empty(items, ScalarType::Long, {0}),
                       torch::stable::new_zeros(offsets, {num_tasks + 1}), items);
  }

  int64_t size() const { return items.size(0); }
  int64_t num_negatives() const { return negatives ? negatives->size(1) : 0; }
  int64_t candidates() const { return 1 + num_negatives(); }  // of an entry
};

template <typename scalar_t>
EntryData<scalar_t> entry_data(const RaggedItems& entries) {
  return {entries.items.const_data_ptr<int64_t>(), entries.offsets.const_data_ptr<int64_t>(),
          entries.negatives ? entries.negatives->const_data_ptr<int64_t>() : nullptr,
          entries.num_negatives(),
          entries.log_q ? entries.log_q->const_data_ptr<scalar_t>() : nullptr};
}

// The meta-parameters and the support set: what every operator begins with. A float32 problem may
// have a bfloat16 table: rows are widened as they are read.
struct Inputs {
  Tensor user_init;       // [D] or [T, D]
  Tensor user_bias_init;  // scalar or [T]
  Tensor item_table;      // [N, D]
  Tensor item_bias;       // [N]
  Tensor offset;          // scalar
  RaggedItems support;
  Tensor targets;           // [n]
  OptionalTensor weights;   // [n]
  int64_t largest_support;  // no task has more entries

  Inputs(const Tensor& user_init_in, const Tensor& user_bias_init_in, const Tensor& item_table_in,
         const Tensor& item_bias_in, const Tensor& offset_in, const Tensor& support_items,
         const Tensor& support_targets, const Tensor& support_offsets,
         const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
         const OptionalTensor& support_log_q, int64_t largest_support_in)
      : user_init(as_contiguous(user_init_in)),
        user_bias_init(as_contiguous(user_bias_init_in)),
        item_table(as_contiguous(item_table_in)),
        item_bias(as_contiguous(item_bias_in)),
        offset(as_contiguous(offset_in)),
        support("support", support_items, support_offsets, item_table_in, support_negatives,
                support_log_q),
        targets(as_contiguous(support_targets)),
        largest_support(largest_support_in) {
    if (support_weights) weights = as_contiguous(*support_weights);
    STD_TORCH_CHECK(item_table.dim() == 2, "item_table: expected shape [N, D]");
    const ScalarType dtype = this->dtype();
    STD_TORCH_CHECK(item_table.scalar_type() == dtype || narrow_table(),
                    "item_table: expected dtype ", torch::headeronly::toString(dtype),
                    " (or bfloat16 beside float32), like item_bias, got ",
                    torch::headeronly::toString(item_table.scalar_type()));
    check_tensor("user_init", user_init, dtype, item_table);
    check_tensor("user_bias_init", user_bias_init, dtype, item_table);
    check_tensor("item_bias", item_bias, dtype, item_table);
    check_tensor("offset", offset, dtype, item_table);
    check_tensor("support_targets", targets, dtype, item_table);
    check_size("item_bias", item_bias, item_table.size(0));
    check_size("support_targets", targets, support.size());
    STD_TORCH_CHECK(offset.dim() == 0, "offset: expected a scalar");
    STD_TORCH_CHECK(
        (user_init.dim() == 1 && user_init.size(0) == D()) ||
            (user_init.dim() == 2 && user_init.size(0) == T() && user_init.size(1) == D()),
        "user_init: expected shape [D] or [T, D] with T = ", T(), ", D = ", D());
    STD_TORCH_CHECK(
        user_bias_init.dim() == 0 || (user_bias_init.dim() == 1 && user_bias_init.size(0) == T()),
        "user_bias_init: expected a scalar or shape [T] with T = ", T());
    if (weights) {
      check_tensor("support_weights", *weights, dtype, item_table);
      check_size("support_weights", *weights, support.size());
    }
    if (support.log_q) check_tensor("support_log_q", *support.log_q, dtype, item_table);
  }

  ScalarType dtype() const { return item_bias.scalar_type(); }  // of arithmetic
  bool narrow_table() const {
    return item_table.scalar_type() == ScalarType::BFloat16 && dtype() == ScalarType::Float;
  }
  int64_t T() const { return support.num_tasks; }
  int64_t N() const { return item_table.size(0); }
  int64_t D() const { return item_table.size(1); }
  bool per_task_start() const { return user_init.dim() == 2; }
  bool per_task_bias() const { return user_bias_init.dim() == 1; }
};

// The inner loop's settings, still as tensors; `view` gives what kernels take.
struct LoopArguments {
  Tensor inner_lr;                // scalar or [K]
  OptionalTensor preconditioner;  // [D + 1]
  OptionalTensor prior_pull;      // scalar or [T]
  OptionalTensor momentum;        // scalar or [K]
  double extra_count;
  int64_t steps;
  Loss loss;
  bool first_order;
  Form form;
  bool adapts_items;  // adapt="all"

  LoopArguments(const Inputs& inputs, const Tensor& inner_lr_in,
                const OptionalTensor& preconditioner_in, const OptionalTensor& prior_pull_in,
                const OptionalTensor& momentum_in, double extra_count_in, int64_t inner_steps,
                const std::string& loss_name, bool first_order_in, const std::string& form_in,
                const std::string& adapt)
      : inner_lr(as_contiguous(inner_lr_in)),
        extra_count(extra_count_in),
        steps(inner_steps),
        loss(parse_loss(loss_name)),
        first_order(first_order_in),
        form(parse_form(form_in)),
        adapts_items(adapt == "all") {
    if (preconditioner_in) preconditioner = as_contiguous(*preconditioner_in);
    if (prior_pull_in) prior_pull = as_contiguous(*prior_pull_in);
    if (momentum_in) momentum = as_contiguous(*momentum_in);
    const bool squared = loss == Loss::kSquared, pairwise = is_pairwise(loss);
    STD_TORCH_CHECK(pairwise == inputs.support.negatives.has_value(),
                    "support_negatives: needed by the losses bpr and softmax, and by no other");
    STD_TORCH_CHECK(loss == Loss::kSoftmax || !inputs.support.log_q,
                    "support_log_q: only the softmax loss has a use for it");
    STD_TORCH_CHECK(steps >= 0 || steps == kExact, "inner_steps: must be ≥ 0, got ", steps);
    STD_TORCH_CHECK(extra_count >= 0, "extra_count: must be ≥ 0, got ", extra_count);
    STD_TORCH_CHECK(!(form == Form::kNormal && !squared),
                    "form 'normal' exists for the squared loss only");
    STD_TORCH_CHECK(!(form == Form::kGram && preconditioner && prior_pull),
                    "form 'gram' is not exact with a preconditioner and a prior_pull at once");
    STD_TORCH_CHECK(steps != kExact || (squared && !first_order && !momentum && prior_pull),
                    "inner_steps='exact' needs the squared loss and a prior_pull, "
                    "and knows neither momentum nor first_order");
    STD_TORCH_CHECK(adapt == "user" || adapt == "all", "adapt: expected user or all, got '", adapt,
                    "'");
    STD_TORCH_CHECK(!adapts_items || (steps != kExact && !pairwise && !preconditioner &&
                                      !prior_pull && !momentum && form == Form::kAuto),
                    "adapt='all' knows neither inner_steps='exact', preconditioner, prior_pull, "
                    "momentum, forms nor the losses bpr and softmax");
    check_per_index("inner_lr", inner_lr, inputs.item_bias, steps);
    if (momentum) check_per_index("momentum", *momentum, inputs.item_bias, steps);
    if (prior_pull) check_per_index("prior_pull", *prior_pull, inputs.item_bias, inputs.T());
    if (preconditioner) {
      check_tensor("preconditioner", *preconditioner, inputs.dtype(), inputs.item_bias);
      check_size("preconditioner", *preconditioner, inputs.D() + 1);
    }
  }

  template <typename scalar_t>
  InnerLoop<scalar_t> view() const {
    return {steps,
            per_index<scalar_t>(inner_lr),
            per_index<scalar_t>(momentum),
            per_index<scalar_t>(prior_pull),
            preconditioner ? preconditioner->const_data_ptr<scalar_t>() : nullptr,
            static_cast<scalar_t>(extra_count),
            loss,
            first_order,
            form};
  }

 private:
  static Form parse_form(const std::string& name) {
    if (name == "auto") return Form::kAuto;
    if (name == "gram") return Form::kGram;
    if (name == "direct") return Form::kDirect;
    if (name == "normal") return Form::kNormal;
    STD_TORCH_CHECK(false, "form: expected auto, gram, direct or normal, got '", name, "'");
  }

  static void check_per_index(const char* name, const Tensor& tensor, const Tensor& like,
                              int64_t size) {
    check_tensor(name, tensor, like.scalar_type(), like);
    STD_TORCH_CHECK(tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == size), name,
                    ": expected a scalar or shape [", size, "], got ", tensor.numel(), " numbers");
  }

  template <typename scalar_t>
  static PerIndex<scalar_t> per_index(const OptionalTensor& tensor) {
    if (!tensor) return {nullptr, 0};
    return {tensor->const_data_ptr<scalar_t>(), tensor->dim() == 0 ? 0 : 1};
  }
};

// What operators return that differentiate: the gradients of user_init, user_bias_init, item_table,
// item_bias, offset, inner_lr, preconditioner, prior_pull, momentum and support_weights, as far as
// they are wanted.
using GradientTuple =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
               OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// Those of meta_step: the loss before them, the items of the rows behind.
using MetaStepTuple =
    decltype(std::tuple_cat(std::tuple<Tensor>(), GradientTuple(), std::tuple<Tensor>()));

// Those of reptile_step: loss, user_init, user_bias_init and, where items adapt, rows and biases.
using ReptileTuple = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor>;

inline ItemRows item_rows_of(const Inputs& inputs, const LoopArguments& loop,
                             const RaggedItems& query) {
  return {inputs.support.size(), inputs.support.num_negatives(), query.size(),
          query.num_negatives(), !loop.first_order || loop.adapts_items};
}

// What a batch is judged by: the query, its outer loss, and how much tasks and steps count.
struct JudgedQuery {
  RaggedItems query;
  OptionalTensor targets;       // [n]
  OptionalTensor weights;       // [n]
  OptionalTensor task_weights;  // [T]
  OptionalTensor step_weights;  // [K + 1]
  OuterLoss loss;

  JudgedQuery(const Inputs& inputs, int64_t steps, const RaggedItems& query_in,
              const OptionalTensor& targets_in, const OptionalTensor& weights_in,
              const OptionalTensor& task_weights_in, const OptionalTensor& step_weights_in,
              const std::string& outer_loss)
      : query(query_in), loss(parse_outer_loss(outer_loss)) {
    check_num_tasks(query, inputs);
    const auto contiguous = [&](const char* name, const OptionalTensor& tensor, int64_t size) {
      if (!tensor) return OptionalTensor();
      check_tensor(name, *tensor, inputs.dtype(), inputs.item_bias);
      check_size(name, *tensor, size);
      return OptionalTensor(as_contiguous(*tensor));
    };
    targets = contiguous("query_targets", targets_in, query.size());
    weights = contiguous("query_weights", weights_in, query.size());
    task_weights = contiguous("task_weights", task_weights_in, inputs.T());
    step_weights = contiguous("step_weights", step_weights_in, steps + 1);
    STD_TORCH_CHECK(!step_weights || steps != kExact,
                    "step_weights: 'exact' has no steps to weigh");
    STD_TORCH_CHECK(targets || !loss.pointwise(),
                    "query_targets: needed by the outer losses squared, logistic and absolute");
    STD_TORCH_CHECK(query.negatives || !loss.pairwise(),
                    "query_negatives: needed by the outer losses bpr and softmax");
    if (query.log_q) check_tensor("query_log_q", *query.log_q, inputs.dtype(), inputs.item_bias);
  }

  static void check_num_tasks(const RaggedItems& query, const Inputs& inputs) {
    STD_TORCH_CHECK(query.num_tasks == inputs.T(), "query_offsets: expected ", inputs.T(),
                    " tasks, like support_offsets, got ", query.num_tasks);
  }
};

// What arrives at the results of an operator, contiguous.
struct ArrivingGradients {
  Tensor user;  // [T, D]
  Tensor bias;  // [T]

  ArrivingGradients(const Inputs& inputs, const Tensor& user_in, const Tensor& bias_in)
      : user(as_contiguous(user_in)), bias(as_contiguous(bias_in)) {
    check("grad_user", user, inputs, {inputs.T(), inputs.D()});
    check("grad_bias", bias, inputs, {inputs.T()});
  }

  static void check(const char* name, const Tensor& tensor, const Inputs& inputs,
                    std::initializer_list<int64_t> shape) {
    check_tensor(name, tensor, inputs.dtype(), inputs.item_table);
    if (shape.size() == 1) return check_size(name, tensor, *shape.begin());
    const int64_t rows = shape.begin()[0], columns = shape.begin()[1];
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                    ": expected shape [", rows, ", ", columns, "], got ", tensor.dim(),
                    " dimensions and ", tensor.numel(), " numbers");
  }
};

// What Reptile wants besides.
struct ReptileArguments {
  OptionalTensor task_weights;  // [T]
  OuterLoss loss;               // of the support, after adaptation

  ReptileArguments(const Inputs& inputs, const LoopArguments& loop, const std::string& loss_name,
                   const OptionalTensor& task_weights_in)
      : loss{loop.loss == Loss::kSquared ? 1.0 : 0.0, loop.loss == Loss::kLogistic ? 1.0 : 0.0, 0,
             0, 0} {
    STD_TORCH_CHECK(loop.loss == Loss::kSquared || loop.loss == Loss::kLogistic,
                    "loss: Reptile adapts on a loss of single scores, got '", loss_name, "'");
    if (!task_weights_in) return;
    task_weights = as_contiguous(*task_weights_in);
    check_tensor("task_weights", *task_weights, inputs.dtype(), inputs.item_bias);
    check_size("task_weights", *task_weights, inputs.T());
  }
};

}  // namespace metarec_fast
