// Optimisers that touch only the rows of the batch. Ids may repeat: for each distinct id,
//
//     g = Σ rows of its entries, first to last;    row(s) ← rule(row(s), g)
//
// at once, so that gradient rows are read once, parameter and state rows read and written once, and
// nothing else goes through memory. Threads share out distinct ids, whose updates do not meet: the
// same bits for any number of threads.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>

#include "../arguments.h"
#include "sorted_entries.h"

namespace metarec_fast::cpu {
namespace {

constexpr int64_t kEntriesPerThread = 256;  // at least
constexpr int64_t kAhead = 8;               // entries whose rows are under way

// m ← m + (1 − β1)(g − m),  v ← v + (1 − β2)(g² − v),  p ← p − η m / (√v + ε),
// η = lr √(1 − β2ᵗ) / (1 − β1ᵗ)
template <typename scalar_t>
struct Adam {
  scalar_t *param, *exp_avg, *exp_avg_sq;  // [N, D]
  scalar_t share1, share2, rate, eps;      // 1 − β1, 1 − β2, η, ε

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true>(param + at, width);
    prefetch_row<true>(exp_avg + at, width);
    prefetch_row<true>(exp_avg_sq + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
    scalar_t* __restrict__ m = exp_avg + at;
    scalar_t* __restrict__ v = exp_avg_sq + at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      const scalar_t g = gradient[d];
      m[d] += share1 * (g - m[d]);
      v[d] += share2 * (g * g - v[d]);
      p[d] -= rate * m[d] / (std::sqrt(v[d]) + eps);
    }
  }
};

// s ← s + g²,  p ← p − lr_t g / (√s + ε)
template <typename scalar_t>
struct Adagrad {
  scalar_t *param, *sum;  // [N, D]
  scalar_t rate, eps;

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true>(param + at, width);
    prefetch_row<true>(sum + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
    scalar_t* __restrict__ s = sum + at;
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
  scalar_t* param;  // [N, D]
  scalar_t rate;

  ALWAYS_INLINE void prefetch(int64_t at, int64_t width) const {
    prefetch_row<true>(param + at, width);
  }

  ALWAYS_INLINE void update(int64_t at, const scalar_t* __restrict__ gradient,
                            int64_t width) const {
    scalar_t* __restrict__ p = param + at;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) p[d] -= rate * gradient[d];
  }
};

// The ids whose entries begin in places [first, last). kWidth is D where that is known, else 0;
// `sum` [D] is scratch.
template <int kWidth, typename scalar_t, typename Rule, typename Entries>
MULTIVERSION void update_range(const Rule& rule_in, const Entries& entries, int64_t first,
                               int64_t last, const scalar_t* rows, int64_t dim, scalar_t* sum) {
  const int64_t width = kWidth > 0 ? kWidth : dim, size = entries.size();
  const Rule rule = rule_in;  // in registers: nothing written through a pointer can change it
  for (int64_t place = first, end; place < last; place = end) {
    end = entries.end_of(place);
    if (!entries.begins(place)) continue;
    for (int64_t soon = place + kAhead; soon < std::min(end + kAhead, size); ++soon) {
      prefetch_row<false>(rows + entries.entry(soon) * width, width);
      if (entries.begins(soon)) rule.prefetch(entries.id(soon) * width, width);
    }
    const scalar_t* gradient = rows + entries.entry(place) * width;
    if (end > place + 1) {
      sum_group(entries, place, end, rows, width, sum);
      gradient = sum;
    }
    rule.update(entries.id(place) * width, gradient, width);
  }
}

// Applies make_rule(scalar_t{}) to every distinct id. `tables`: what it changes, by name, the
// parameter first, all [N, D] or all [N].
template <typename MakeRule>
void update_rows(const char* op, const std::vector<std::pair<const char*, const Tensor*>>& tables,
                 const Tensor& ids_in, const Tensor& rows_in, const MakeRule& make_rule) {
  const Tensor& param = *tables.front().second;
  const int64_t width = row_width(ids_in, rows_in), count = ids_in.size(0);
  STD_TORCH_CHECK(param.dim() == rows_in.dim() && (param.dim() == 1 || param.size(1) == width),
                  "rows: expected shape [n] or [n, D], like param but for its length");
  check_tensor("rows", rows_in, param.scalar_type(), param);
  for (const auto& [name, table] : tables) {
    check_tensor(name, *table, param.scalar_type(), param);
    STD_TORCH_CHECK(table->dim() == param.dim() && table->numel() == param.numel() &&
                        table->size(0) == param.size(0),
                    name, ": expected the shape of param");
    STD_TORCH_CHECK(table->is_contiguous(), name, ": expected to be contiguous");
  }
  const Tensor ids = as_contiguous(ids_in), rows = as_contiguous(rows_in);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  check_ids(id, count, param.size(0));

  with_sorted_entries(id, count, std::max<int64_t>(param.size(0) - 1, 0), [&](const auto& entries) {
    dispatch_floating(param.scalar_type(), op, [&](auto zero) {
      using scalar_t = decltype(zero);
      const scalar_t* row = rows.const_data_ptr<scalar_t>();
      const auto rule = make_rule(zero);
      torch::stable::parallel_for(0, count, kEntriesPerThread, [&](int64_t first, int64_t last) {
        const std::unique_ptr<scalar_t[]> sum(new scalar_t[width]);
        if (width == 1)
          update_range<1>(rule, entries, first, last, row, width, sum.get());
        else
          update_range<0>(rule, entries, first, last, row, width, sum.get());
      });
    });
  });
}

void sparse_adam_cpu(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const Tensor& ids, const Tensor& rows, double lr, double beta1, double beta2,
                     double eps, int64_t step) {
  STD_TORCH_CHECK(step >= 1, "step: must be ≥ 1, got ", step);
  const double rate = lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
  update_rows("sparse_adam",
              {{"param", &param}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}}, ids, rows,
              [&](auto zero) {
                using scalar_t = decltype(zero);
                return Adam<scalar_t>{param.mutable_data_ptr<scalar_t>(),
                                      exp_avg.mutable_data_ptr<scalar_t>(),
                                      exp_avg_sq.mutable_data_ptr<scalar_t>(),
                                      static_cast<scalar_t>(1 - beta1),
                                      static_cast<scalar_t>(1 - beta2),
                                      static_cast<scalar_t>(rate),
                                      static_cast<scalar_t>(eps)};
              });
}

void sparse_adagrad_cpu(const Tensor& param, const Tensor& sum, const Tensor& ids,
                        const Tensor& rows, double lr, double eps) {
  update_rows("sparse_adagrad", {{"param", &param}, {"sum", &sum}}, ids, rows, [&](auto zero) {
    using scalar_t = decltype(zero);
    return Adagrad<scalar_t>{param.mutable_data_ptr<scalar_t>(), sum.mutable_data_ptr<scalar_t>(),
                             static_cast<scalar_t>(lr), static_cast<scalar_t>(eps)};
  });
}

void sparse_sgd_cpu(const Tensor& param, const Tensor& ids, const Tensor& rows, double lr) {
  update_rows("sparse_sgd", {{"param", &param}}, ids, rows, [&](auto zero) {
    using scalar_t = decltype(zero);
    return Sgd<scalar_t>{param.mutable_data_ptr<scalar_t>(), static_cast<scalar_t>(lr)};
  });
}

// Asks for the memory of a large table to be in huge pages, what it holds already included, so that
// scattered rows cost fewer page walks. A wish: where the system has none, nothing changes.
void use_huge_pages_cpu(const Tensor& table) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  const auto address = reinterpret_cast<uintptr_t>(table.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + table.numel() * table.element_size()) / kHugePage * kHugePage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("sparse_adam", TORCH_BOX(&sparse_adam_cpu));
  m.impl("sparse_adagrad", TORCH_BOX(&sparse_adagrad_cpu));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd_cpu));
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages_cpu));
}

}  // namespace metarec_fast::cpu
