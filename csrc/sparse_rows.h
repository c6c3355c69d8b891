// Gradients that are rows of ids, which may repeat, and the tables that they change: checks.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "update_rules.h"

namespace metarec_fast {

using Tensors = std::vector<Tensor>;

// Throws unless ids is int64 [n] and rows [n] or [n, D]; returns D, which is 1 for [n].
inline int64_t row_width(const Tensor& ids, const Tensor& rows) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                  "ids: expected int64 [n]");
  STD_TORCH_CHECK((rows.dim() == 1 || rows.dim() == 2) && rows.size(0) == ids.size(0),
                  "rows: expected shape [n] or [n, D] with n = ", ids.size(0));
  STD_TORCH_CHECK(rows.device() == ids.device(), "rows: expected to be on the same device as ids");
  return rows.dim() == 2 ? rows.size(1) : 1;
}

// Parameters whose gradients have the same ids, and what an optimiser keeps of each.
struct SparseUpdate {
  using States = std::vector<std::pair<const char*, const Tensors*>>;  // name, one per parameter

  const Tensors& params;
  States states;
  Tensor ids;       // int64 [n]
  Tensors rows;     // one per parameter
  int64_t num_ids;  // that every parameter has a row for

  SparseUpdate(const Tensors& params_in, const States& states_in, const Tensor& ids_in,
               const Tensors& rows_in)
      : params(params_in),
        states(states_in),
        ids(as_contiguous(ids_in)),
        num_ids(std::numeric_limits<int64_t>::max()) {
    STD_TORCH_CHECK(rows_in.size() == params.size(), "rows: expected ", params.size(),
                    ", one per parameter");
    for (const auto& [name, state] : states)
      STD_TORCH_CHECK(state->size() == params.size(), name, ": expected ", params.size(),
                      ", one per parameter");
    for (size_t i = 0; i < params.size(); ++i) {
      check_part(i, rows_in[i]);
      num_ids = std::min(num_ids, params[i].size(0));
      rows.push_back(as_contiguous(rows_in[i]));
    }
  }

  bool empty() const { return params.empty(); }
  ScalarType dtype() const { return params[0].scalar_type(); }

  // What `rule` is to do to parameter i.
  template <template <typename> class Rule, typename scalar_t>
  TableUpdate<scalar_t, Rule> part(size_t i, const Rule<scalar_t>& rule) const {
    TableUpdate<scalar_t, Rule> result{rule,
                                       params[i].mutable_data_ptr<scalar_t>(),
                                       {},
                                       rows[i].const_data_ptr<scalar_t>(),
                                       rows[i].dim() == 2 ? rows[i].size(1) : 1};
    for (size_t k = 0; k < states.size(); ++k)
      result.states[k] = (*states[k].second)[i].template mutable_data_ptr<scalar_t>();
    return result;
  }

 private:
  // Throws unless rows fit ids, and what is changed fits rows: all [N, D], or all [N].
  void check_part(size_t i, const Tensor& part_rows) const {
    const Tensor& param = params[i];
    const int64_t width = row_width(ids, part_rows);
    STD_TORCH_CHECK(param.dim() == part_rows.dim() && (param.dim() == 1 || param.size(1) == width),
                    "rows: expected shape [n] or [n, D], like param but for its length");
    check_tensor("param", param, dtype(), params[0]);
    check_tensor("rows", part_rows, dtype(), param);
    check_table("param", param, param);
    for (const auto& [name, state] : states) check_table(name, (*state)[i], param);
  }

  static void check_table(const char* name, const Tensor& table, const Tensor& param) {
    check_tensor(name, table, param.scalar_type(), param);
    STD_TORCH_CHECK(table.dim() == param.dim() && table.numel() == param.numel() &&
                        table.size(0) == param.size(0),
                    name, ": expected the shape of param");
    STD_TORCH_CHECK(table.is_contiguous(), name, ": expected to be contiguous");
  }
};

}  // namespace metarec_fast
