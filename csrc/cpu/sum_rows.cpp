#include "sum_rows.h"

#include "../sparse_rows.h"
#include "result_memory.h"
#include "sorted_entries.h"

namespace metarec_fast::cpu {
namespace {

// sums[i] = Σ rows of the id, ids[i] = it: for each id whose entries begin in places [first, last),
// with i from `at` on.
template <typename scalar_t, typename Entries>
void sum_distinct(const Entries& entries, int64_t first, int64_t last, int64_t at,
                  const scalar_t* rows, int64_t width, int64_t* ids, scalar_t* sums) {
  for (int64_t place = entries.next_beginning(first, last), end; place < last; place = end) {
    end = entries.end_of(place);
    look_ahead(entries, place, end, [&](int64_t soon) {
      prefetch_row<false, 2>(rows + entries.entry(soon) * width, width);
    });
    ids[at] = entries.id(place);
    sum_group(entries, place, end, rows, width, sums + at * width);
    ++at;
  }
}

// sums[id] = Σ rows of the id, for the same ids; and zeros for those between the one before and it.
template <typename scalar_t, typename Entries>
void sum_all(const Entries& entries, int64_t first, int64_t last, const scalar_t* rows,
             int64_t width, scalar_t* sums) {
  for (int64_t place = entries.next_beginning(first, last), end; place < last; place = end) {
    end = entries.end_of(place);
    look_ahead(entries, place, end, [&](int64_t soon) {
      prefetch_row<false, 2>(rows + entries.entry(soon) * width, width);
    });
    const int64_t id = entries.id(place), before = place == 0 ? -1 : entries.id(place - 1);
    std::fill(sums + (before + 1) * width, sums + id * width, scalar_t{0});
    sum_group(entries, place, end, rows, width, sums + id * width);
  }
}

Tensor empty_rows(const Tensor& like, int64_t count) {
  return like.dim() == 2 ? empty_result(like, like.scalar_type(), {count, like.size(1)})
                         : empty_result(like, like.scalar_type(), {count});
}

struct Coalesced {
  Tensor ids, rows;
  int64_t count;
};

// The distinct ids, ascending, and the sums of their rows; padded to the number of entries with −1
// and zeros, or not.
Coalesced coalesce(const Tensor& ids_in, const Tensor& rows_in, bool padded) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  check_ids("ids:", id, count, std::numeric_limits<int64_t>::max());
  const int64_t largest = count == 0 ? 0 : *std::max_element(id, id + count);

  Coalesced result{};
  with_sorted_entries(id, count, largest, [&](const auto& entries) {
    std::vector<int64_t> begins{0};  // where a range's distinct ids begin in the result
    for (int64_t first = 0; first < count; first += kEntriesPerRange) {
      const int64_t last = std::min(first + kEntriesPerRange, count);
      int64_t distinct = 0;
      for (int64_t place = first; place < last; ++place) distinct += entries.begins(place);
      begins.push_back(begins.back() + distinct);
    }
    result.count = begins.back();
    const int64_t size = padded ? count : result.count;
    result.ids = empty(ids, ScalarType::Long, {size});
    result.rows = empty_rows(rows, size);

    dispatch_floating(rows.scalar_type(), "coalesce_rows", [&](auto zero) {
      using scalar_t = decltype(zero);
      const scalar_t* row = rows.const_data_ptr<scalar_t>();
      int64_t* distinct = result.ids.mutable_data_ptr<int64_t>();
      scalar_t* sums = result.rows.mutable_data_ptr<scalar_t>();
      for_ranges(count, [&](int64_t first, int64_t last) {
        sum_distinct(entries, first, last, begins[first / kEntriesPerRange], row, width, distinct,
                     sums);
      });
      std::fill(distinct + result.count, distinct + size, int64_t{-1});
      std::fill(sums + result.count * width, sums + size * width, scalar_t{0});
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> coalesce_rows_cpu(const Tensor& ids, const Tensor& rows) {
  Coalesced result = coalesce(ids, rows, /*padded=*/false);
  return {result.ids, result.rows};
}

std::tuple<Tensor, Tensor, Tensor> coalesce_rows_padded_cpu(const Tensor& ids, const Tensor& rows) {
  Coalesced result = coalesce(ids, rows, /*padded=*/true);
  Tensor count = empty(ids, ScalarType::Long, {});
  *count.mutable_data_ptr<int64_t>() = result.count;
  return {result.ids, result.rows, count};
}

}  // namespace

Tensor sum_rows(const Tensor& ids_in, const Tensor& rows_in, int64_t num_rows) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(num_rows >= 0, "num_rows: must be ≥ 0, got ", num_rows);
  check_ids("ids:", id, count, num_rows);

  Tensor result = empty_rows(rows, num_rows);

  with_sorted_entries(id, count, std::max<int64_t>(num_rows - 1, 0), [&](const auto& entries) {
    dispatch_floating(rows.scalar_type(), "sum_rows", [&](auto zero) {
      using scalar_t = decltype(zero);
      const scalar_t* row = rows.const_data_ptr<scalar_t>();
      scalar_t* sums = result.mutable_data_ptr<scalar_t>();
      for_ranges(count, [&](int64_t first, int64_t last) {
        sum_all(entries, first, last, row, width, sums);
      });
      const int64_t after = count == 0 ? 0 : entries.id(count - 1) + 1;
      std::fill(sums + after * width, sums + num_rows * width, scalar_t{0});
    });
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("coalesce_rows", TORCH_BOX(&coalesce_rows_cpu));
  m.impl("coalesce_rows_padded", TORCH_BOX(&coalesce_rows_padded_cpu));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace metarec_fast::cpu
