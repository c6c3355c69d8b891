// One task as the inner loop sees it: rows gathered into scratch, and where its gradients go.
#pragma once

#include "../inner_loop.h"
#include "item_table.h"
#include "rows.h"
#include "vector_math.h"

namespace metarec_fast::cpu {

// The support set of one task, everything within reach. A row is what one score is taken of: an
// item for pointwise losses, the difference of an item and a negative for bpr, and each of an
// entry's candidates for softmax. What belongs to rows is padded to whole registers.
template <typename scalar_t>
struct Task {
  Layout<scalar_t> layout;
  const InnerLoop<scalar_t>& loop;
  int64_t index;            // t
  int64_t num_entries;      // S
  int64_t group;            // rows of an entry
  int64_t size;             // R = S · group
  Rows<scalar_t> rows;      // X [R, width]
  const scalar_t* base;     // score of a fast vector 0 [R]
  const scalar_t* targets;  // [R]; softmax: 1 for the entry's own item, else 0
  const scalar_t* weights;  // [R], padded with 0
  const scalar_t* start;    // φ_0 [stride]
  const scalar_t* scale;    // A [stride], ones where there is no preconditioner
  RowsAhead& ahead;         // to be asked for `some` now and then

  ALWAYS_INLINE scalar_t mean() const {  // 1/(S + n0)
    const scalar_t count = static_cast<scalar_t>(num_entries) + loop.extra_count;
    return num_entries == 0 ? scalar_t{0} : 1 / count;
  }
  ALWAYS_INLINE scalar_t pull() const { return loop.prior_pull[index]; }
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
  scalar_t* start;    // φ̄_0 [stride], overwritten
  scalar_t* rows;     // X̄ [R, D] anywhere, overwritten; not with first_order, where it is zero
  scalar_t* base;     // [R], overwritten: the gradient of `base`
  scalar_t* weights;  // [R], overwritten
  scalar_t* scale;    // [stride], added to
  PerIndexSum<scalar_t> inner_lr, momentum, prior_pull;  // added to
  bool stream;  // rows past the caches, which they would only wash out
};

// u from [D] and c into a fast vector.
template <typename scalar_t>
ALWAYS_INLINE void pack(const scalar_t* vector, scalar_t bias, const Layout<scalar_t>& layout,
                        scalar_t* result) {
  copy_in(vector, layout.dim, result);
  store(result + layout.width) = Vector<scalar_t>{};
  result[layout.width] = bias;
}

// scores[r] = base[r] + x_r · φ
template <typename scalar_t>
ALWAYS_INLINE void score_rows(const Rows<scalar_t>& rows, const scalar_t* base,
                              const scalar_t* fast, scalar_t* scores) {
  dots(fast, rows, rows.bias * fast[rows.width], base, scores);
}

// π = softmax of `scores` in every group of rows.
template <typename scalar_t>
ALWAYS_INLINE void group_softmax(const scalar_t* scores, int64_t count, int64_t group,
                                 scalar_t* probabilities) {
  store(probabilities + padded<scalar_t>(count) - kLanes<scalar_t>) = Vector<scalar_t>{};
  for (int64_t first = 0; first < count; first += group) {
    scalar_t most = scores[first];
    for (int64_t j = 1; j < group; ++j) most = std::max(most, scores[first + j]);
    for (int64_t j = 0; j < group; ++j) probabilities[first + j] = scores[first + j] - most;
  }
  for (int64_t r = 0; r < count; r += kLanes<scalar_t>)
    store(probabilities + r) = exp_of_negative<scalar_t>(load(probabilities + r));
  for (int64_t first = 0; first < count; first += group) {
    scalar_t total = 0;
    for (int64_t j = 0; j < group; ++j) total += probabilities[first + j];
    for (int64_t j = 0; j < group; ++j) probabilities[first + j] /= total;
  }
}

// push = w ∘ ℓ'/(S + n0) and curvature = w ∘ ℓ''/(S + n0) of the rows from r on, a register of them
// with these scores; not for softmax. Beyond the last row w is zero, so the scores may be garbage.
template <typename scalar_t>
ALWAYS_INLINE void differentiate_points(const Task<scalar_t>& task, int64_t r,
                                        const Vector<scalar_t>& scores, Vector<scalar_t>& push,
                                        Vector<scalar_t>& curvature) {
  const Vector<scalar_t> share = task.mean() * load(task.weights + r);
  differentiate_loss<VectorMath<scalar_t>>(task.loop.loss, share, scores, load(task.targets + r),
                                           push, curvature);
}

// push = w ∘ ℓ'/(S + n0) at `scores`, and what `bend` needs to know of ℓ'': w ℓ''/(S + n0), for
// softmax π.
template <typename scalar_t>
ALWAYS_INLINE void differentiate(const Task<scalar_t>& task, const scalar_t* scores, scalar_t* push,
                                 scalar_t* curvature) {
  const scalar_t mean = task.mean();
  const int64_t size = task.size;
  constexpr int64_t kLane = kLanes<scalar_t>;
  if (task.loop.loss == Loss::kSoftmax) {
    group_softmax(scores, size, task.group, curvature);
    for (int64_t r = 0; r < size; r += kLane)
      store(push + r) =
          mean * load(task.weights + r) * (load(curvature + r) - load(task.targets + r));
  } else {
    for (int64_t r = 0; r < size; r += kLane)
      differentiate_points<scalar_t>(task, r, load(scores + r), store(push + r),
                                     store(curvature + r));
  }
}

// result = −rate w/(S + n0) ∘ H along,  H the Hessian of ℓ in the scores.
template <typename scalar_t>
ALWAYS_INLINE void bend(const Task<scalar_t>& task, const scalar_t* curvature, scalar_t rate,
                        const scalar_t* along, scalar_t* result) {
  if (task.loop.loss != Loss::kSoftmax) {
    for (int64_t r = 0; r < task.size; r += kLanes<scalar_t>)
      store(result + r) = -rate * load(curvature + r) * load(along + r);
    return;
  }
  store(result + padded<scalar_t>(task.size) - kLanes<scalar_t>) = Vector<scalar_t>{};
  const scalar_t share = -rate * task.mean();
  for (int64_t first = 0; first < task.size; first += task.group) {  // (diag(π) − ππᵀ) along
    scalar_t average = 0;
    for (int64_t r = first; r < first + task.group; ++r) average += curvature[r] * along[r];
    for (int64_t r = first; r < first + task.group; ++r)
      result[r] = share * task.weights[r] * curvature[r] * (along[r] - average);
  }
}

// w̄ −= rate ℓ'/(S + n0) ∘ along
template <typename scalar_t>
ALWAYS_INLINE void add_weight_gradient(const Task<scalar_t>& task, const scalar_t* push,
                                       scalar_t rate, const scalar_t* along, scalar_t* grad) {
  for (int64_t r = 0; r < task.size; ++r) grad[r] -= rate * push[r] / task.weights[r] * along[r];
}

// Calls body(width) with layout.width as a constant where it is one of the usual ones, and with 0
// elsewhere.
template <typename scalar_t, typename Body>
void with_width(const Layout<scalar_t>& layout, const Body& body) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, float> && kNativeBytes > 16)
    switch (layout.width / kLane) {
      case 2:
        return body(std::integral_constant<int64_t, 2 * kLane>());
      case 4:
        return body(std::integral_constant<int64_t, 4 * kLane>());
      case 8:
        return body(std::integral_constant<int64_t, 8 * kLane>());
    }
  body(std::integral_constant<int64_t, 0>());
}

// Writes  Σ_j C[r, j] basis[j]  to rows + r · row_stride, D numbers each, which may lie anywhere.
// kWidth is layout.width where that is known.
template <typename scalar_t, int64_t kWidth = 0, typename Basis>
ALWAYS_INLINE void write_rows(const Layout<scalar_t>& layout,
                              const Coefficients<scalar_t>& coefficients, int64_t count,
                              const Basis& basis, int64_t basis_size, Arena<scalar_t>& arena,
                              scalar_t* rows, int64_t row_stride, bool stream) {
  const int64_t width = kWidth > 0 ? kWidth : layout.width;
  if (layout.dim == width)
    return multiply<scalar_t>(coefficients, count, basis, basis_size, width, rows, row_stride,
                              stream);
  constexpr int64_t kRows = 4;
  scalar_t* wide = arena.take(kRows * layout.width);
  for (int64_t r = 0; r < count; r += kRows) {
    const int64_t block = std::min(kRows, count - r);
    multiply<scalar_t>({coefficients.values + r * coefficients.row_stride, coefficients.row_stride,
                        coefficients.column_stride},
                       block, basis, basis_size, layout.width, wide, layout.width);
    for (int64_t i = 0; i < block; ++i)
      copy_out(wide + i * layout.width, layout.dim, rows + (r + i) * row_stride);
  }
}

}  // namespace metarec_fast::cpu
