#include "sum_rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "vector.h"

namespace metarec_fast::cpu {
namespace {

constexpr int64_t kRowsPerChunk = 256;

int64_t row_width(const Tensor& ids, const Tensor& rows) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                  "ids: expected int64 [n]");
  STD_TORCH_CHECK((rows.dim() == 1 || rows.dim() == 2) && rows.size(0) == ids.size(0),
                  "rows: expected shape [n] or [n, D] with n = ", ids.size(0));
  return rows.dim() == 2 ? rows.size(1) : 1;
}

// sums[i] = Σ rows[order[e]] over e in [begins[i], begins[i + 1]), first to last
template <typename scalar_t>
void sum_segments(const scalar_t* rows, int64_t width, const std::vector<int64_t>& order,
                  const std::vector<int64_t>& begins, scalar_t* sums) {
  const int64_t segments = static_cast<int64_t>(begins.size()) - 1;
  torch::stable::parallel_for(0, segments, kRowsPerChunk, [&](int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; ++segment) {
      scalar_t* __restrict__ sum = sums + segment * width;
      std::fill(sum, sum + width, scalar_t{0});
      for (int64_t e = begins[segment]; e < begins[segment + 1]; ++e) {
        const scalar_t* __restrict__ row = rows + order[e] * width;
        for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
      }
    }
  });
}

// The entries in ascending order of their ids, entries of equal ids in their own order: a radix
// sort by 11 bits.
std::vector<int64_t> stable_order(const int64_t* ids, int64_t count) {
  constexpr int kBits = 11;
  std::vector<int64_t> order(count), next(count), begins(1 << kBits);
  std::iota(order.begin(), order.end(), 0);
  const int64_t largest = count == 0 ? 0 : *std::max_element(ids, ids + count);
  for (int shift = 0; shift < 63 && largest >> shift != 0; shift += kBits) {
    const auto digit = [&](int64_t e) { return (ids[e] >> shift) & ((1 << kBits) - 1); };
    std::fill(begins.begin(), begins.end(), 0);
    for (int64_t e = 0; e < count; ++e) ++begins[digit(e)];
    std::exclusive_scan(begins.begin(), begins.end(), begins.begin(), int64_t{0});
    for (const int64_t e : order) next[begins[digit(e)]++] = e;
    order.swap(next);
  }
  return order;
}

void check_ids(const int64_t* ids, int64_t count, int64_t limit) {
  for (int64_t e = 0; e < count; ++e)
    STD_TORCH_CHECK(ids[e] >= 0 && ids[e] < limit, "ids: must be in [0, ", limit, "), got ", ids[e],
                    " at position ", e);
}

std::tuple<Tensor, Tensor> coalesce_rows_cpu(const Tensor& ids_in, const Tensor& rows_in) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  check_ids(id, count, std::numeric_limits<int64_t>::max());

  const std::vector<int64_t> order = stable_order(id, count);
  std::vector<int64_t> begins, distinct;
  for (int64_t e = 0; e < count; ++e)
    if (e == 0 || id[order[e]] != id[order[e - 1]]) {
      begins.push_back(e);
      distinct.push_back(id[order[e]]);
    }
  const int64_t size = static_cast<int64_t>(distinct.size());
  begins.push_back(count);

  Tensor result_ids = torch::stable::new_empty(ids, {size});
  Tensor result = rows.dim() == 2 ? torch::stable::new_empty(rows, {size, width})
                                  : torch::stable::new_empty(rows, {size});
  std::copy(distinct.begin(), distinct.end(), result_ids.mutable_data_ptr<int64_t>());

  dispatch_floating(rows.scalar_type(), "coalesce_rows", [&](auto zero) {
    using scalar_t = decltype(zero);
    sum_segments(rows.const_data_ptr<scalar_t>(), width, order, begins,
                 result.mutable_data_ptr<scalar_t>());
  });
  return {result_ids, result};
}

}  // namespace

Tensor sum_rows(const Tensor& ids_in, const Tensor& rows_in, int64_t num_rows) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(num_rows >= 0, "num_rows: must be ≥ 0, got ", num_rows);
  check_ids(id, count, num_rows);

  Tensor result = rows.dim() == 2 ? torch::stable::new_empty(rows, {num_rows, width})
                                  : torch::stable::new_empty(rows, {num_rows});

  std::vector<int64_t> begins(num_rows + 1), order(count);  // a counting sort
  for (int64_t e = 0; e < count; ++e) ++begins[id[e] + 1];
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  std::vector<int64_t> next(begins.begin(), begins.end() - 1);
  for (int64_t e = 0; e < count; ++e) order[next[id[e]]++] = e;

  dispatch_floating(rows.scalar_type(), "sum_rows", [&](auto zero) {
    using scalar_t = decltype(zero);
    sum_segments(rows.const_data_ptr<scalar_t>(), width, order, begins,
                 result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("coalesce_rows", TORCH_BOX(&coalesce_rows_cpu));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace metarec_fast::cpu
