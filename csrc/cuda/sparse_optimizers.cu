// Optimisers that touch only the rows of the batch. Ids may repeat: for each distinct id
//
//     g = Σ rows of its entries;    row(s) ← rule(row(s), g)
//
// in one pass: whoever has summed columns of g updates the same columns of the parameter and of
// what is kept of it. Parameters whose gradients have the same ids share the sorting of the ids.
// SGD's rule is linear: where atomics are allowed, it needs no sum (atomic_sums.h).
#include "../sparse_rows.h"
#include "atomic_sums.h"
#include "launch.h"
#include "sorted_ids.h"

namespace metarec_fast::cuda {
namespace {

template <typename scalar_t, template <typename> class Rule>
struct UpdateRow {
  TableUpdate<scalar_t, Rule> part;
  const int64_t* ids;  // [n], ascending

  bool is_aligned() const {
    bool result = cuda::is_aligned(part.param);
    for (int k = 0; k < part.kStates; ++k) result = result && cuda::is_aligned(part.states[k]);
    return result;
  }

  template <int kCount>
  __device__ void operator()(int64_t place, int64_t column,
                             const Pack<scalar_t, kCount>& gradient) const {
    update(ids[place] * part.width + column, gradient,
           std::make_index_sequence<Rule<scalar_t>::kStates>());
  }

  template <int kCount, size_t... k>
  __device__ void update(int64_t at, const Pack<scalar_t, kCount>& gradient,
                         std::index_sequence<k...>) const {
    using PackType = Pack<scalar_t, kCount>;
    PackType param = load<PackType>(part.param + at);
    PackType states[] = {load<PackType>(part.states[k] + at)..., PackType{}};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      part.rule.update(gradient.values[i], param.values[i], states[k].values[i]...);
    store(part.param + at, param);
    (store(part.states[k] + at, states[k]), ...);
  }
};

// Applies Rule{numbers …} to the rows of every parameter.
template <template <typename> class Rule, typename... Numbers>
void update_rows(const char* op, const SparseUpdate& update, Numbers... numbers) {
  if (update.empty() || update.ids.size(0) == 0) return;

  const OnDevice device(update.params[0]);
  const SortedIds sorted(update.ids);

  dispatch_floating(update.dtype(), op, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Rule<scalar_t> rule{static_cast<scalar_t>(numbers)...};
    for (size_t i = 0; i < update.params.size(); ++i) {
      const SortedEntries view = sorted.view();
      const UpdateRow<scalar_t, Rule> use{update.part(i, rule), view.ids};
      const int64_t width = use.part.width;
      const Tensor parts = empty_parts(update.rows[i], width);
      check_launch(op, sum_rows_of_ids(view, use.part.rows, width,
                                       parts.mutable_data_ptr<scalar_t>(), use, device.stream));
    }
  });
}

void sparse_adam_cuda(const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                      const Tensor& ids, const Tensors& rows, double lr, double beta1, double beta2,
                      double eps, int64_t step) {
  STD_TORCH_CHECK(step >= 1, "step: must be ≥ 1, got ", step);
  update_rows<Adam>(
      "sparse_adam",
      SparseUpdate(params, {{"exp_avg", &exp_avgs}, {"exp_avg_sq", &exp_avg_sqs}}, ids, rows),
      1 - beta1, 1 - beta2, adam_rate(lr, beta1, beta2, step), eps);
}

void sparse_adagrad_cuda(const Tensors& params, const Tensors& sums, const Tensor& ids,
                         const Tensors& rows, double lr, double eps) {
  update_rows<Adagrad>("sparse_adagrad", SparseUpdate(params, {{"sum", &sums}}, ids, rows), lr,
                       eps);
}

// row(s) ← row(s) − lr · row of the gradient, in no order, for every parameter.
void subtract_rows(const SparseUpdate& update, double lr) {
  if (update.empty() || update.ids.size(0) == 0) return;

  const OnDevice device(update.params[0]);

  dispatch_floating(update.dtype(), "sparse_sgd", [&](auto zero) {
    using scalar_t = decltype(zero);
    for (size_t i = 0; i < update.params.size(); ++i) {
      const auto part = update.part(i, Sgd<scalar_t>{static_cast<scalar_t>(lr)});
      check_launch("sparse_sgd",
                   add_rows(update.ids.const_data_ptr<int64_t>(), part.rows, update.ids.size(0),
                            part.width, -part.rule.rate, part.param, device.stream));
    }
  });
}

void sparse_sgd_cuda(const Tensors& params, const Tensor& ids, const Tensors& rows, double lr) {
  const SparseUpdate update(params, {}, ids, rows);
  if (atomics_allowed())
    subtract_rows(update, lr);
  else
    update_rows<Sgd>("sparse_sgd", update, lr);
}

// A device's pages are large as they are.
void use_huge_pages_cuda(const Tensor&) {}

}  // namespace

METAREC_CUDA_OPERATORS(m) {
  m.impl("sparse_adam", TORCH_BOX(&sparse_adam_cuda));
  m.impl("sparse_adagrad", TORCH_BOX(&sparse_adagrad_cuda));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd_cuda));
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages_cuda));
}

}  // namespace metarec_fast::cuda
