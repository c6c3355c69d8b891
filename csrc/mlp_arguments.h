// Checks what the operators of an MLP tower are given and keeps contiguous views of it.
#pragma once

#include <string>
#include <vector>

#include "activations.h"
#include "arguments.h"
#include "tower_rates.h"

namespace metarec_fast {

struct TowerInputs {
  Tensor user_part;             // [T, Du]
  Tensor item_table;            // [N, D]
  OptionalTensor item_bias;     // [N], added to scores
  Tensor parameters;            // W_1, b_1, …, W_L, b_L, row by row
  std::vector<int64_t> widths;  // n_0 = Du + D, n_1, …, n_L = 1
  RaggedItems support, query;
  OptionalTensor targets;   // of the support, [n]
  OptionalTensor weights;   // of the support, [n]
  int64_t largest_support;  // no task has more entries
  Tensor inner_lr;          // scalar, [K], [1, P] or [K, P], P = 2L
  int64_t steps;            // K
  Activation activation;
  Loss loss;
  bool first_order;

  TowerInputs(const Tensor& user_part_in, const Tensor& item_table_in,
              const OptionalTensor& item_bias_in, const Tensor& parameters_in,
              const std::vector<int64_t>& widths_in, const Tensor& support_items,
              const Tensor& support_offsets, const OptionalTensor& support_targets,
              const OptionalTensor& support_weights, const OptionalTensor& support_negatives,
              const OptionalTensor& support_log_q, int64_t largest_support_in,
              const RaggedItems& query_in, const Tensor& inner_lr_in, int64_t inner_steps,
              const std::string& activation_name, const std::string& loss_name, bool first_order_in)
      : user_part(as_contiguous(user_part_in)),
        item_table(as_contiguous(item_table_in)),
        parameters(as_contiguous(parameters_in)),
        widths(widths_in),
        support("support", support_items, support_offsets, item_table_in, support_negatives,
                support_log_q),
        query(query_in),
        largest_support(largest_support_in),
        inner_lr(as_contiguous(inner_lr_in)),
        steps(inner_steps),
        activation(activation_name == "gelu" ? Activation::kGelu : Activation::kRelu),
        loss(parse_loss(loss_name)),
        first_order(first_order_in) {
    STD_TORCH_CHECK(activation_name == "relu" || activation_name == "gelu",
                    "activation: expected relu or gelu, got '", activation_name, "'");
    STD_TORCH_CHECK(is_pairwise(loss) == support.negatives.has_value(),
                    "support_negatives: needed by the losses bpr and softmax, and by no other");
    STD_TORCH_CHECK(loss == Loss::kSoftmax || !support.log_q,
                    "support_log_q: only the softmax loss has a use for it");
    STD_TORCH_CHECK(is_pairwise(loss) || support_targets,
                    "support_targets: needed by the losses squared and logistic");
    STD_TORCH_CHECK(largest_support >= 0, "largest_support: must be ≥ 0, got ", largest_support);
    STD_TORCH_CHECK(steps >= 0, "inner_steps: must be ≥ 0, got ", steps);
    STD_TORCH_CHECK(item_table.dim() == 2 && D() > 0,
                    "item_table: expected shape [N, D] with D ≥ 1");
    STD_TORCH_CHECK(user_part.dim() == 2 && user_part.size(0) == T(),
                    "user_part: expected shape [T, Du] with T = ", T());
    STD_TORCH_CHECK(query.num_tasks == T(), "query_offsets: expected ", T(),
                    " tasks, like support_offsets, got ", query.num_tasks);
    check_tensor("user_part", user_part, dtype(), item_table);
    check_tensor("parameters", parameters, dtype(), item_table);
    check_tensor("inner_lr", inner_lr, dtype(), item_table);
    item_bias = checked("item_bias", item_bias_in, N());
    targets = checked("support_targets", support_targets, support.size());
    weights = checked("support_weights", support_weights, support.size());
    if (support.log_q) check_tensor("support_log_q", *support.log_q, dtype(), item_table);
    if (query.log_q) check_tensor("query_log_q", *query.log_q, dtype(), item_table);
    STD_TORCH_CHECK(widths.size() >= 2 && widths[0] == Du() + D() && widths.back() == 1,
                    "widths: expected Du + D = ", Du() + D(), ", …, 1");
    int64_t count = 0;
    for (size_t l = 1; l < widths.size(); ++l) {
      STD_TORCH_CHECK(widths[l] > 0, "widths: must be > 0, got ", widths[l]);
      count += widths[l] * (widths[l - 1] + 1);
    }
    check_size("parameters", parameters, count);
    const int64_t dim = inner_lr.dim(), tensors = 2 * (static_cast<int64_t>(widths.size()) - 1);
    STD_TORCH_CHECK(dim == 0 || (dim == 1 && inner_lr.size(0) == steps) ||
                        (dim == 2 && (inner_lr.size(0) == 1 || inner_lr.size(0) == steps) &&
                         inner_lr.size(1) == tensors),
                    "inner_lr: expected a scalar or shape [", steps, "], [1, ", tensors, "] or [",
                    steps, ", ", tensors, "], got ", dim, " dimensions and ", inner_lr.numel(),
                    " numbers");
  }

  // An optional tensor [size], contiguous.
  OptionalTensor checked(const char* name, const OptionalTensor& tensor, int64_t size) const {
    if (!tensor) return OptionalTensor();
    check_tensor(name, *tensor, dtype(), item_table);
    check_size(name, *tensor, size);
    return OptionalTensor(as_contiguous(*tensor));
  }

  // Step sizes, or numbers as they are laid out.
  template <typename Number>
  TowerRates<Number> rates(Number* values) const {
    const bool by_tensor = inner_lr.dim() == 2,
               by_step = inner_lr.dim() > 0 && inner_lr.size(0) > 1;
    return {values, by_step ? (by_tensor ? inner_lr.size(1) : 1) : 0, by_tensor ? 1 : 0};
  }

  ScalarType dtype() const { return item_table.scalar_type(); }
  int64_t T() const { return support.num_tasks; }
  int64_t N() const { return item_table.size(0); }
  int64_t D() const { return item_table.size(1); }
  int64_t Du() const { return user_part.size(1); }
};

}  // namespace metarec_fast
