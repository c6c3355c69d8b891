// Ids as the kernels of sorted_rows.h take them.
#pragma once

#include "aten.h"
#include "sorted_rows.h"

namespace metarec_fast::cuda {

// int64 [n], at least one.
struct SortedIds {
  Tensor ids, entries;

  explicit SortedIds(const Tensor& unsorted) { std::tie(ids, entries) = stable_sort(unsorted); }

  SortedEntries view() const {
    return {ids.const_data_ptr<int64_t>(), entries.const_data_ptr<int64_t>(), ids.size(0)};
  }
};

// Room for the parts of sums of `rows`, [n, D] or [n].
inline Tensor empty_parts(const Tensor& rows, int64_t width) {
  return empty(rows, rows.scalar_type(), {num_parts(rows.size(0)), width});
}

}  // namespace metarec_fast::cuda
