#include "../sparse_rows.h"
#include "atomic_sums.h"
#include "launch.h"
#include "sorted_ids.h"
#include "sum_rows.h"

namespace metarec_fast::cuda {
namespace {

// Puts sums into rows of a table: that of the id, or that of its number among the distinct ids.
template <typename scalar_t>
struct Store {
  scalar_t* sums;          // [rows, D]
  int64_t width;           // D
  const int64_t* ids;      // [n], ascending
  const int64_t* numbers;  // [n], from 1; or nullptr

  bool is_aligned() const { return cuda::is_aligned(sums); }

  template <int kCount>
  __device__ void operator()(int64_t place, int64_t column,
                             const Pack<scalar_t, kCount>& sum) const {
    const int64_t row = numbers == nullptr ? ids[place] : numbers[place] - 1;
    store(sums + row * width + column, sum);
  }
};

// begins[i] = whether an id begins at place i. One thread a place.
__global__ void __launch_bounds__(kThreadsPerBlock)
    begins_kernel(SortedEntries sorted, int64_t* __restrict__ begins) {
  const int64_t place = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (place >= sorted.count) return;
  begins[place] = place == 0 || sorted.ids[place] != sorted.ids[place - 1];
}

// distinct[numbers[i] − 1] = ids[i], once for every id. One thread a place.
__global__ void __launch_bounds__(kThreadsPerBlock)
    distinct_kernel(SortedEntries sorted, const int64_t* __restrict__ numbers,
                    int64_t* __restrict__ distinct) {
  const int64_t place = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (place >= sorted.count) return;
  if (place == 0 || numbers[place] != numbers[place - 1])
    distinct[numbers[place] - 1] = sorted.ids[place];
}

// The numbers of the sorted ids among the distinct ones, from 1: int64 [n].
Tensor number_ids(const SortedIds& sorted, cudaStream_t stream) {
  const SortedEntries view = sorted.view();
  Tensor begins = empty(sorted.ids, ScalarType::Long, {view.count});
  check_launch("coalesce_rows",
               launch("begins_kernel", begins_kernel, blocks_for(view.count, kThreadsPerBlock),
                      kThreadsPerBlock, 0, stream, view, begins.mutable_data_ptr<int64_t>()));
  return cumulative_sum(begins);
}

Tensor empty_rows(const Tensor& like, int64_t count) {
  return like.dim() == 2 ? empty(like, like.scalar_type(), {count, like.size(1)})
                         : empty(like, like.scalar_type(), {count});
}

// Adds the rows, in no order, to those of `result`.
void add_into(const Tensor& ids, const Tensor& rows, int64_t width, Tensor& result,
              cudaStream_t stream) {
  dispatch_floating(rows.scalar_type(), "sum_rows", [&](auto zero) {
    using scalar_t = decltype(zero);
    check_launch("sum_rows", add_rows(ids.const_data_ptr<int64_t>(),
                                      rows.const_data_ptr<scalar_t>(), ids.size(0), width,
                                      scalar_t{1}, result.mutable_data_ptr<scalar_t>(), stream));
  });
}

// Sums the rows into those of `result`.
void sum_into(const char* op, const SortedIds& sorted, const Tensor& rows, int64_t width,
              const int64_t* numbers, Tensor& result, cudaStream_t stream) {
  const Tensor parts = empty_parts(rows, width);
  dispatch_floating(rows.scalar_type(), op, [&](auto zero) {
    using scalar_t = decltype(zero);
    const SortedEntries view = sorted.view();
    const Store<scalar_t> use{result.mutable_data_ptr<scalar_t>(), width, view.ids, numbers};
    check_launch(op, sum_rows_of_ids(view, rows.const_data_ptr<scalar_t>(), width,
                                     parts.mutable_data_ptr<scalar_t>(), use, stream));
  });
}

// The distinct ids and the sums of their rows, into the first rows of both results.
void coalesce_into(const SortedIds& sorted, const Tensor& numbers, const Tensor& rows,
                   int64_t width, Tensor& result_ids, Tensor& result, cudaStream_t stream) {
  const SortedEntries view = sorted.view();
  const int64_t* number = numbers.const_data_ptr<int64_t>();
  check_launch(
      "coalesce_rows",
      launch("distinct_kernel", distinct_kernel, blocks_for(view.count, kThreadsPerBlock),
             kThreadsPerBlock, 0, stream, view, number, result_ids.mutable_data_ptr<int64_t>()));
  sum_into("coalesce_rows", sorted, rows, width, number, result, stream);
}

// How many ids there are decides the shape: the one operator here that waits for the device.
std::tuple<Tensor, Tensor> coalesce_rows_cuda(const Tensor& ids_in, const Tensor& rows_in) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);

  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  if (count == 0) return {empty(ids, ScalarType::Long, {0}), empty_rows(rows, 0)};

  const OnDevice device(rows);
  const SortedIds sorted(ids);
  const Tensor numbers = number_ids(sorted, device.stream);
  const int64_t distinct = read_scalar(torch::stable::select(numbers, 0, count - 1));
  Tensor result_ids = empty(ids, ScalarType::Long, {distinct}), result = empty_rows(rows, distinct);

  coalesce_into(sorted, numbers, rows, width, result_ids, result, device.stream);
  return {result_ids, result};
}

std::tuple<Tensor, Tensor, Tensor> coalesce_rows_padded_cuda(const Tensor& ids_in,
                                                             const Tensor& rows_in) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);

  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);

  const OnDevice device(rows);
  Tensor result_ids = empty(ids, ScalarType::Long, {count}), result = empty_rows(rows, count);
  torch::stable::fill_(result_ids, -1);
  torch::stable::zero_(result);
  if (count == 0) return {result_ids, result, torch::stable::new_zeros(ids, {})};

  const SortedIds sorted(ids);
  const Tensor numbers = number_ids(sorted, device.stream);
  coalesce_into(sorted, numbers, rows, width, result_ids, result, device.stream);
  return {result_ids, result, torch::stable::clone(torch::stable::select(numbers, 0, count - 1))};
}

}  // namespace

Tensor sum_rows(const Tensor& ids_in, const Tensor& rows_in, int64_t num_rows) {
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  STD_TORCH_CHECK(num_rows >= 0, "num_rows: must be ≥ 0, got ", num_rows);

  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);

  const OnDevice device(rows);
  Tensor result = empty_rows(rows, num_rows);
  torch::stable::zero_(result);
  if (count == 0) return result;

  if (atomics_allowed())
    add_into(ids, rows, width, result, device.stream);
  else
    sum_into("sum_rows", SortedIds(ids), rows, width, nullptr, result, device.stream);
  return result;
}

METAREC_CUDA_OPERATORS(m) {
  m.impl("coalesce_rows", TORCH_BOX(&coalesce_rows_cuda));
  m.impl("coalesce_rows_padded", TORCH_BOX(&coalesce_rows_padded_cuda));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace metarec_fast::cuda
