// Optimisers that touch only the rows of the batch. Ids may repeat: for each distinct id,
//
//     g = Σ rows of its entries, first to last;    row(s) ← rule(row(s), g)
//
// at once, so that gradient rows are read once, parameter and state rows read and written once, and
// nothing else goes through memory. Parameters whose gradients have the same ids, such as item
// vectors and biases, share the sorting of the ids. Threads share out distinct ids, whose updates
// do not meet: the same bits for any number of threads.
#include <cmath>

#include "../arguments.h"
#include "huge_pages.h"
#include "sorted_entries.h"

namespace metarec_fast::cpu {
namespace {

// m ← m + (1 − β1)(g − m),  v ← v + (1 − β2)(g² − v),  p ← p − η m / (√v + ε),
// η = lr √(1 − β2ᵗ) / (1 − β1ᵗ)
template <typename scalar_t>
struct Adam {
  scalar_t* param;                     // [N, D]
  scalar_t* states[2];                 // m, v, [N, D]
  scalar_t share1, share2, rate, eps;  // 1 − β1, 1 − β2, η, ε

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true, 2>(param + at, width);
    prefetch_row<true, 2>(states[0] + at, width);
    prefetch_row<true, 2>(states[1] + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
    scalar_t* __restrict__ m = states[0] + at;
    scalar_t* __restrict__ v = states[1] + at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      const scalar_t g = gradient[d];
      m[d] += share1 * (g - m[d]);
      v[d] += share2 * (g * g - v[d]);
      p[d] -= rate * m[d] / (std::sqrt(v[d]) + eps);
    }
  }
};

// s ← s + g²,  p ← p − lr g / (√s + ε)
template <typename scalar_t>
struct Adagrad {
  scalar_t* param;      // [N, D]
  scalar_t* states[1];  // s, [N, D]
  scalar_t rate, eps;

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true, 2>(param + at, width);
    prefetch_row<true, 2>(states[0] + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
    scalar_t* __restrict__ s = states[0] + at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      const scalar_t g = gradient[d];
      s[d] += g * g;
      p[d] -= rate * g / (std::sqrt(s[d]) + eps);
    }
  }
};

// p ← p − lr g
template <typename scalar_t>
struct Sgd {
  scalar_t* param;      // [N, D]
  scalar_t* states[1];  // none
  scalar_t rate;

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true, 2>(param + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) p[d] -= rate * gradient[d];
  }
};

// One parameter, what a rule keeps of it, and its gradient.
template <typename scalar_t, template <typename> class Rule>
struct Part {
  Rule<scalar_t> rule;
  const scalar_t* rows;  // [n, D]
  int64_t width;         // D
};

// The ids whose entries begin in places [first, last); `sum` is scratch for the widest row.
template <typename scalar_t, template <typename> class Rule, typename Entries>
void update_range(const std::vector<Part<scalar_t, Rule>>& parts, const Entries& entries,
                  int64_t first, int64_t last, scalar_t* sum) {
  for (int64_t place = entries.next_beginning(first, last), end; place < last; place = end) {
    end = entries.end_of(place);
    const int64_t id = entries.id(place), entry = entries.entry(place);
    look_ahead(entries, place, end, [&](int64_t soon) {
      for (const auto& [rule, rows, width] : parts) {
        prefetch_row<false, 2>(rows + entries.entry(soon) * width, width);
        rule.prefetch(entries.id(soon) * width, width);
      }
    });
    for (const auto& [rule, rows, width] : parts) {
      const scalar_t* gradient = rows + entry * width;
      if (end > place + 1) {
        sum_group(entries, place, end, rows, width, sum);
        gradient = sum;
      }
      if (width == 1)
        rule.update(id, gradient, 1);
      else
        rule.update(id * width, gradient, width);
    }
  }
}

using Tensors = std::vector<Tensor>;

// Throws unless rows fit ids, and what a rule changes fits rows: all [N, D], or all [N].
void check_part(const std::vector<std::pair<const char*, const Tensor*>>& tables, const Tensor& ids,
                const Tensor& rows) {
  const Tensor& param = *tables.front().second;
  const int64_t width = row_width(ids, rows);
  STD_TORCH_CHECK(param.dim() == rows.dim() && (param.dim() == 1 || param.size(1) == width),
                  "rows: expected shape [n] or [n, D], like param but for its length");
  check_tensor("rows", rows, param.scalar_type(), param);
  for (const auto& [name, table] : tables) {
    check_tensor(name, *table, param.scalar_type(), param);
    STD_TORCH_CHECK(table->dim() == param.dim() && table->numel() == param.numel() &&
                        table->size(0) == param.size(0),
                    name, ": expected the shape of param");
    STD_TORCH_CHECK(table->is_contiguous(), name, ": expected to be contiguous");
  }
}

// Applies Rule{params[i], states[i] …, numbers …} to the rows of every parameter i.
template <template <typename> class Rule, typename... Numbers>
void update_rows(const char* op, const Tensors& params,
                 const std::vector<std::pair<const char*, const Tensors*>>& states,
                 const Tensor& ids_in, const Tensors& rows_in, Numbers... numbers) {
  const size_t num_parts = params.size();
  STD_TORCH_CHECK(rows_in.size() == num_parts, "rows: expected ", num_parts, ", one per parameter");
  int64_t num_ids = std::numeric_limits<int64_t>::max();  // that every parameter has
  Tensors rows;
  for (size_t i = 0; i < num_parts; ++i) {
    std::vector<std::pair<const char*, const Tensor*>> tables{{"param", &params[i]}};
    for (const auto& [name, state] : states) {
      STD_TORCH_CHECK(state->size() == num_parts, name, ": expected ", num_parts,
                      ", one per parameter");
      tables.emplace_back(name, &(*state)[i]);
    }
    check_part(tables, ids_in, rows_in[i]);
    check_tensor("param", params[i], params[0].scalar_type(), params[0]);
    num_ids = std::min(num_ids, params[i].size(0));
    rows.push_back(as_contiguous(rows_in[i]));
  }
  if (num_parts == 0) return;
  const Tensor ids = as_contiguous(ids_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t count = ids.size(0);
  check_ids("ids:", id, count, num_ids);

  dispatch_floating(params[0].scalar_type(), op, [&](auto zero) {
    using scalar_t = decltype(zero);
    std::vector<Part<scalar_t, Rule>> parts;
    int64_t widest = 0;
    for (size_t i = 0; i < num_parts; ++i) {
      Rule<scalar_t> rule{
          params[i].mutable_data_ptr<scalar_t>(), {}, static_cast<scalar_t>(numbers)...};
      for (size_t k = 0; k < states.size(); ++k)
        rule.states[k] = (*states[k].second)[i].template mutable_data_ptr<scalar_t>();
      const int64_t width = rows[i].dim() == 2 ? rows[i].size(1) : 1;
      parts.push_back({rule, rows[i].const_data_ptr<scalar_t>(), width});
      widest = std::max(widest, width);
    }
    with_sorted_entries(id, count, std::max<int64_t>(num_ids - 1, 0), [&](const auto& entries) {
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
  const double rate = lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
  update_rows<Adam>("sparse_adam", params, {{"exp_avg", &exp_avgs}, {"exp_avg_sq", &exp_avg_sqs}},
                    ids, rows, 1 - beta1, 1 - beta2, rate, eps);
}

void sparse_adagrad_cpu(const Tensors& params, const Tensors& sums, const Tensor& ids,
                        const Tensors& rows, double lr, double eps) {
  update_rows<Adagrad>("sparse_adagrad", params, {{"sum", &sums}}, ids, rows, lr, eps);
}

void sparse_sgd_cpu(const Tensors& params, const Tensor& ids, const Tensors& rows, double lr) {
  update_rows<Sgd>("sparse_sgd", params, {}, ids, rows, lr);
}

// For a table that is in use already.
void use_huge_pages_cpu(const Tensor& table) { prefer_huge_pages(table, /*collapse=*/true); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("sparse_adam", TORCH_BOX(&sparse_adam_cpu));
  m.impl("sparse_adagrad", TORCH_BOX(&sparse_adagrad_cpu));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd_cpu));
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages_cpu));
}

}  // namespace metarec_fast::cpu
