// Checks what the operators of an MLP tower are given and keeps contiguous views of it.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace metarec_fast {

enum class Activation { kRelu, kGelu };  // gelu: z Φ(z)

struct TowerInputs {
  Tensor user_part;             // [T, Du]
  Tensor item_table;            // [N, D]
  Tensor parameters;            // W_1, b_1, …, W_L, b_L, row by row
  std::vector<int64_t> widths;  // n_0 = Du + D, n_1, …, n_L = 1
  RaggedItems support, query;
  Tensor targets;          // of the support, [n]
  OptionalTensor weights;  // of the support, [n]
  Tensor inner_lr;         // scalar or [K]
  int64_t steps;           // K
  Activation activation;
  Loss loss;
  bool first_order;

  TowerInputs(const Tensor& user_part_in, const Tensor& item_table_in, const Tensor& parameters_in,
              const std::vector<int64_t>& widths_in, const Tensor& support_items,
              const Tensor& support_offsets, const Tensor& support_targets,
              const OptionalTensor& support_weights, const Tensor& query_items,
              const Tensor& query_offsets, const Tensor& inner_lr_in, int64_t inner_steps,
              const std::string& activation_name, const std::string& loss_name, bool first_order_in)
      : user_part(as_contiguous(user_part_in)),
        item_table(as_contiguous(item_table_in)),
        parameters(as_contiguous(parameters_in)),
        widths(widths_in),
        support("support", support_items, support_offsets, item_table_in),
        query("query", query_items, query_offsets, item_table_in),
        targets(as_contiguous(support_targets)),
        inner_lr(as_contiguous(inner_lr_in)),
        steps(inner_steps),
        activation(activation_name == "gelu" ? Activation::kGelu : Activation::kRelu),
        loss(loss_name == "logistic" ? Loss::kLogistic : Loss::kSquared),
        first_order(first_order_in) {
    STD_TORCH_CHECK(activation_name == "relu" || activation_name == "gelu",
                    "activation: expected relu or gelu, got '", activation_name, "'");
    STD_TORCH_CHECK(loss_name == "squared" || loss_name == "logistic",
                    "loss: expected squared or logistic, got '", loss_name, "'");
    STD_TORCH_CHECK(steps >= 0, "inner_steps: must be ≥ 0, got ", steps);
    STD_TORCH_CHECK(item_table.dim() == 2 && D() > 0,
                    "item_table: expected shape [N, D] with D ≥ 1");
    STD_TORCH_CHECK(user_part.dim() == 2 && user_part.size(0) == T(),
                    "user_part: expected shape [T, Du] with T = ", T());
    STD_TORCH_CHECK(query.num_tasks == T(), "query_offsets: expected ", T(),
                    " tasks, like support_offsets, got ", query.num_tasks);
    check_tensor("user_part", user_part, dtype(), item_table);
    check_tensor("parameters", parameters, dtype(), item_table);
    check_tensor("support_targets", targets, dtype(), item_table);
    check_tensor("inner_lr", inner_lr, dtype(), item_table);
    check_size("support_targets", targets, support.size());
    weights = checked("support_weights", support_weights, support.size());
    STD_TORCH_CHECK(inner_lr.dim() == 0 || (inner_lr.dim() == 1 && inner_lr.size(0) == steps),
                    "inner_lr: expected a scalar or shape [", steps, "], got ", inner_lr.numel(),
                    " numbers");
    STD_TORCH_CHECK(widths.size() >= 2 && widths[0] == Du() + D() && widths.back() == 1,
                    "widths: expected Du + D = ", Du() + D(), ", …, 1");
    int64_t count = 0;
    for (size_t l = 1; l < widths.size(); ++l) {
      STD_TORCH_CHECK(widths[l] > 0, "widths: must be > 0, got ", widths[l]);
      count += widths[l] * (widths[l - 1] + 1);
    }
    check_size("parameters", parameters, count);
  }

  // An optional tensor [size], contiguous.
  OptionalTensor checked(const char* name, const OptionalTensor& tensor, int64_t size) const {
    if (!tensor) return OptionalTensor();
    check_tensor(name, *tensor, dtype(), item_table);
    check_size(name, *tensor, size);
    return OptionalTensor(as_contiguous(*tensor));
  }

  ScalarType dtype() const { return item_table.scalar_type(); }
  int64_t T() const { return support.num_tasks; }
  int64_t N() const { return item_table.size(0); }
  int64_t D() const { return item_table.size(1); }
  int64_t Du() const { return user_part.size(1); }
};

}  // namespace metarec_fast
