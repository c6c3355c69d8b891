// Optimisers that touch only the rows of the batch. Ids may repeat: for each distinct id,
//
//     g = Σ rows of its entries, first to last;    row(s) ← rule(row(s), g)
//
// at once, so that gradient rows are read once, parameter and state rows read and written once, and
// nothing else goes through memory. Parameters whose gradients have the same ids, such as item
// vectors and biases, share the sorting of the ids. Threads share out distinct ids, whose updates
// do not meet: the same bits for any number of threads.
#include "../sparse_rows.h"
#include "huge_pages.h"
#include "sorted_entries.h"

namespace metarec_fast::cpu {
namespace {

template <typename scalar_t, template <typename> class Rule>
ALWAYS_INLINE void prefetch(const TableUpdate<scalar_t, Rule>& part, int64_t id) {
  const int64_t at = id * part.width;
  prefetch_row<true, 2>(part.param + at, part.width);
  for (int k = 0; k < part.kStates; ++k) prefetch_row<true, 2>(part.states[k] + at, part.width);
}

// Updates the row that begins `at`.
template <typename scalar_t, template <typename> class Rule, size_t... k>
ALWAYS_INLINE void update_row(const TableUpdate<scalar_t, Rule>& part, int64_t at,
                              const scalar_t* __restrict__ gradient, int64_t width,
                              std::index_sequence<k...>) {
  const Rule<scalar_t> rule = part.rule;
  scalar_t* __restrict__ param = part.param + at;
  scalar_t* const states[] = {part.states[k] + at..., nullptr};
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) rule.update(gradient[d], param[d], states[k][d]...);
}

// The ids whose entries begin in places [first, last); `sum` is scratch for the widest row.
template <typename scalar_t, template <typename> class Rule, typename Entries>
void update_range(const std::vector<TableUpdate<scalar_t, Rule>>& parts, const Entries& entries,
                  int64_t first, int64_t last, scalar_t* sum) {
  for (int64_t place = entries.next_beginning(first, last), end; place < last; place = end) {
    end = entries.end_of(place);
    const int64_t id = entries.id(place), entry = entries.entry(place);
    look_ahead(entries, place, end, [&](int64_t soon) {
      for (const auto& part : parts) {
        prefetch_row<false, 2>(part.rows + entries.entry(soon) * part.width, part.width);
        prefetch(part, entries.id(soon));
      }
    });
    for (const auto& part : parts) {
      const int64_t width = part.width;
      const std::make_index_sequence<part.kStates> all_states;
      const scalar_t* gradient = part.rows + entry * width;
      if (end > place + 1) {
        sum_group(entries, place, end, part.rows, width, sum);
        gradient = sum;
      }
      if (width == 1)
        update_row(part, id, gradient, 1, all_states);
      else
        update_row(part, id * width, gradient, width, all_states);
    }
  }
}

// Applies Rule{numbers …} to the rows of every parameter.
template <template <typename> class Rule, typename... Numbers>
void update_rows(const char* op, const SparseUpdate& update, Numbers... numbers) {
  if (update.empty()) return;
  const int64_t* id = update.ids.const_data_ptr<int64_t>();
  const int64_t count = update.ids.size(0);
  check_ids("ids:", id, count, update.num_ids);

  dispatch_floating(update.dtype(), op, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Rule<scalar_t> rule{static_cast<scalar_t>(numbers)...};
    std::vector<TableUpdate<scalar_t, Rule>> parts;
    int64_t widest = 0;
    for (size_t i = 0; i < update.params.size(); ++i) {
      parts.push_back(update.part(i, rule));
      widest = std::max(widest, parts.back().width);
    }
    const int64_t largest = std::max<int64_t>(update.num_ids - 1, 0);
    with_sorted_entries(id, count, largest, [&](const auto& entries) {
      for_ranges(count, [&](int64_t first, int64_t last) {
        const std::unique_ptr<scalar_t[]> sum(new scalar_t[widest]);
        update_range(parts, entries, first, last, sum.get());
      });
    });
  });
}

void sparse_adam_cpu(const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                     const Tensor& ids, const Tensors& rows, double lr, double beta1, double beta2,
                     double eps, int64_t step) {
  STD_TORCH_CHECK(step >= 1, "step: must be ≥ 1, got ", step);
  update_rows<Adam>(
      "sparse_adam",
      SparseUpdate(params, {{"exp_avg", &exp_avgs}, {"exp_avg_sq", &exp_avg_sqs}}, ids, rows),
      1 - beta1, 1 - beta2, adam_rate(lr, beta1, beta2, step), eps);
}

void sparse_adagrad_cpu(const Tensors& params, const Tensors& sums, const Tensor& ids,
                        const Tensors& rows, double lr, double eps) {
  update_rows<Adagrad>("sparse_adagrad", SparseUpdate(params, {{"sum", &sums}}, ids, rows), lr,
                       eps);
}

void sparse_sgd_cpu(const Tensors& params, const Tensor& ids, const Tensors& rows, double lr) {
  update_rows<Sgd>("sparse_sgd", SparseUpdate(params, {}, ids, rows), lr);
}

// For a table that is in use already.
void use_huge_pages_cpu(const Tensor& table) { move_to_huge_pages(table); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("sparse_adam", TORCH_BOX(&sparse_adam_cpu));
  m.impl("sparse_adagrad", TORCH_BOX(&sparse_adagrad_cpu));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd_cpu));
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages_cpu));
}

}  // namespace metarec_fast::cpu
