// One task as the inner loop sees it: its rows gathered into fast vectors, and where its gradients
// go.
#pragma once

#include "../inner_loop.h"
#include "vector.h"

namespace metarec_fast::cpu {

// The support set of one task, everything within reach.
template <typename scalar_t>
struct Task {
  Layout<scalar_t> layout;
  const InnerLoop<scalar_t>& loop;
  int64_t index;            // t
  int64_t size;             // S
  const scalar_t* rows;     // X [S, stride], bias 1
  const scalar_t* base;     // m + b_s [S]
  const scalar_t* targets;  // [S]
  const scalar_t* weights;  // [S]
  const scalar_t* start;    // φ_0 [stride]
  const scalar_t* scale;    // A [stride], ones where there is no preconditioner

  scalar_t mean() const {  // 1/(S + n0)
    const scalar_t count = static_cast<scalar_t>(size) + loop.extra_count;
    return size == 0 ? scalar_t{0} : 1 / count;
  }
  scalar_t pull() const { return loop.prior_pull[index]; }
};

// A sum by index, or over all of them where stride is 0; not wanted where values is nullptr.
template <typename scalar_t>
struct PerIndexSum {
  scalar_t* values;
  int64_t stride;

  explicit operator bool() const { return values != nullptr; }
  void add(int64_t index, scalar_t value) const { values[index * stride] += value; }
};

// Where the gradients of one task go; nullptr where one is not wanted.
template <typename scalar_t>
struct TaskGradients {
  scalar_t* start;    // [stride], overwritten
  scalar_t* rows;     // [S, D], overwritten
  scalar_t* base;     // [S], overwritten: the gradient of m + b_s
  scalar_t* weights;  // [S], overwritten
  scalar_t* scale;    // [stride], added to
  PerIndexSum<scalar_t> inner_lr, momentum, prior_pull;  // added to
};

// u from [D] and c into a fast vector.
template <typename scalar_t>
ALWAYS_INLINE void pack(const scalar_t* vector, scalar_t bias, const Layout<scalar_t>& layout,
                        scalar_t* result) {
  std::memcpy(result, vector, layout.dim * sizeof(scalar_t));
  std::fill(result + layout.dim, result + layout.stride, scalar_t{0});
  result[layout.width] = bias;
}

// The rows of `items` as fast vectors [count, stride] with bias 1, and offset + item_bias [count].
template <typename scalar_t>
ALWAYS_INLINE void gather(const int64_t* items, int64_t count, const scalar_t* table,
                          const scalar_t* item_bias, scalar_t offset,
                          const Layout<scalar_t>& layout, scalar_t* rows, scalar_t* base) {
  for (int64_t i = 0; i < count; ++i) {
    pack(table + items[i] * layout.dim, scalar_t{1}, layout, rows + i * layout.stride);
    base[i] = offset + item_bias[items[i]];
  }
}

// derivative = ℓ'/(S + n0),  curvature = w ℓ''/(S + n0)  of every support entry at `scores`.
template <typename scalar_t>
ALWAYS_INLINE void differentiate(const Task<scalar_t>& task, const scalar_t* scores,
                                 scalar_t* derivative, scalar_t* curvature) {
  const scalar_t mean = task.mean();
  if (task.loop.logistic) {
    for (int64_t s = 0; s < task.size; ++s) {
      const scalar_t probability = LogisticLoss::sigmoid(scores[s]);
      derivative[s] = mean * (probability - task.targets[s]);
      curvature[s] = mean * task.weights[s] * probability * (1 - probability);
    }
  } else {
    for (int64_t s = 0; s < task.size; ++s) {
      derivative[s] = mean * SquaredLoss::derivative(scores[s], task.targets[s]);
      curvature[s] = mean * task.weights[s] * SquaredLoss::curvature(scores[s], task.targets[s]);
    }
  }
}

// Writes  Σ_j C[s, j] basis[j]  to rows[s] of [S, D], for every support entry s.
template <typename scalar_t>
ALWAYS_INLINE void write_rows(const Task<scalar_t>& task,
                              const Coefficients<scalar_t>& coefficients, const scalar_t* basis,
                              int64_t count, Arena<scalar_t>& arena, scalar_t* rows) {
  constexpr int64_t kRows = 4;
  const Layout<scalar_t>& layout = task.layout;
  scalar_t* wide = arena.take(kRows * layout.width);
  for (int64_t s = 0; s < task.size; s += kRows) {
    const int64_t block = std::min(kRows, task.size - s);
    multiply<scalar_t>({coefficients.values + s * coefficients.row_stride, coefficients.row_stride,
                        coefficients.column_stride},
                       block, basis, layout.stride, count, layout.width, wide, layout.width);
    for (int64_t r = 0; r < block; ++r)
      std::memcpy(rows + (s + r) * layout.dim, wide + r * layout.width,
                  layout.dim * sizeof(scalar_t));
  }
}

}  // namespace metarec_fast::cpu
