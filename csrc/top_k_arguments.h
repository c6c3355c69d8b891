// What score_top_k is given, checked; ids of excluded items are not looked at.
#pragma once

#include "arguments.h"

namespace metarec_fast {

struct TopKArguments {
  Tensor user;                         // [T, D]
  Tensor user_bias;                    // [T]
  Tensor item_table;                   // [N, D], may be bfloat16 beside float32
  Tensor item_bias;                    // [N]
  int64_t k;                           // in [1, N]
  std::optional<RaggedItems> exclude;  // T tasks

  TopKArguments(const Tensor& user_in, const Tensor& user_bias_in, const Tensor& item_table_in,
                const Tensor& item_bias_in, int64_t k_in, const OptionalTensor& exclude_items,
                const OptionalTensor& exclude_offsets)
      : user(as_contiguous(user_in)),
        user_bias(as_contiguous(user_bias_in)),
        item_table(as_contiguous(item_table_in)),
        item_bias(as_contiguous(item_bias_in)),
        k(k_in) {
    STD_TORCH_CHECK(item_table.dim() == 2, "item_table: expected shape [N, D]");
    STD_TORCH_CHECK(user.dim() == 2 && user.size(1) == D(), "user: expected shape [T, ", D(), "]");
    check_tensor("user", user, dtype(), item_table);
    check_tensor("user_bias", user_bias, dtype(), item_table);
    check_tensor("item_bias", item_bias, dtype(), item_table);
    check_size("user_bias", user_bias, T());
    check_size("item_bias", item_bias, N());
    STD_TORCH_CHECK(k >= 1 && k <= N(), "k: must be in [1, ", N(), "], got ", k);
    STD_TORCH_CHECK(exclude_items.has_value() == exclude_offsets.has_value(),
                    "exclude_items, exclude_offsets: expected both or none");
    if (!exclude_items) return;
    exclude.emplace("exclude", *exclude_items, *exclude_offsets, item_table);
    STD_TORCH_CHECK(exclude->num_tasks == T(), "exclude_offsets: expected ", T(), " tasks, got ",
                    exclude->num_tasks);
  }

  int64_t T() const { return user.size(0); }
  int64_t N() const { return item_table.size(0); }
  int64_t D() const { return item_table.size(1); }
  bool narrow() const { return item_table.scalar_type() == ScalarType::BFloat16; }
  ScalarType dtype() const {  // of arithmetic
    return narrow() ? ScalarType::Float : item_table.scalar_type();
  }
};

}  // namespace metarec_fast
