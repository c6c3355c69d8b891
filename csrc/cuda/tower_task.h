// The exact way back through the steps of one task under an MLP tower, all threads of a block
// together, by the formulas on top of csrc/cpu/tower_task.h. The query comes part after part, and
// A_k = A_{k+1} − s_k Δ_1 is found again on the way.
#pragma once

#include "tower_path.h"

namespace metarec_fast::cuda {

template <typename scalar_t>
struct TowerTask : TowerPath<scalar_t, /*kGoesBack=*/true> {
  using Base = TowerPath<scalar_t, true>;
  using Rows = typename Base::Rows;
  using Base::Base, Base::work, Base::shape, Base::at, Base::team, Base::memory, Base::task;
  using Base::coefficients, Base::cross, Base::query_inputs, Base::curvatures;
  using Base::each, Base::sum_rows;
  using Base::group, Base::S, Base::K, Base::width, Base::own_first, Base::lowest;
  using Base::weights, Base::first_weights, Base::step_rows, Base::inputs, Base::gram;

  // Room for the gradients of φ_K, to which the query's parts add.
  __device__ __forceinline__ void begin_adjoint() const {
    each(at.own_size, [&](int i) { memory[at.grad_weights + i] = 0; });
    each(work.user_width, [&](int i) { grad_user()[i] = 0; });
    if (K == 0) return;
    if (!own_first()) {
      each(S * width(1), [&](int i) { grad_coefficients()[i] = grad_first()[i] = 0; });
      each(S * S, [&](int i) { grad_gram()[i] = 0; });
    }
    each(S * width(0), [&](int i) { grad_inputs()[i] = 0; });
  }

  // From Δ_L of the query's entries from `first` on to the gradients of φ_K and X̄_q.
  __device__ __forceinline__ void undo_score(const Rows& query, int64_t first,
                                             scalar_t* record) const {
    Base::down(K, query);
    const scalar_t* delta = query.delta(1);
    const Matrix<scalar_t> deltas = rows_of(delta, width(1)),
                           rows = rows_of(query_inputs(), width(0));
#pragma unroll 1
    for (int l = lowest(); l <= shape.depth; ++l)
      add_outer(query, query.delta(l), l == 1 ? query_inputs() : query.hidden(l - 1), l,
                grad_weights(l));
#pragma unroll 1
    for (int l = 1; l <= shape.depth; ++l) add_sums(query.delta(l), query.count, l);
    multiply(deltas, own_first() ? weights(K, 1) : first_weights(), query.count, width(1), width(0),
             scalar_t{1}, {}, grad_query_inputs());
    if (!own_first()) {
      add_outer(query, delta, query_inputs(), 1, record);
      if (K > 0) {
        multiply(rows_of(cross(), S).transposed(), deltas, S, query.count, width(1), scalar_t{-1},
                 {grad_coefficients()}, grad_coefficients());
        multiply(deltas, rows_of(coefficients(), width(1)).transposed(), query.count, width(1), S,
                 scalar_t{-1}, {}, cross());
        const Matrix<scalar_t> grad_cross = rows_of(cross(), S);
        multiply(grad_cross, rows_of(inputs(), width(0)), query.count, S, width(0), scalar_t{1},
                 {grad_query_inputs()}, grad_query_inputs());
        if (!work.first_order)
          multiply(grad_cross.transposed(), rows, S, query.count, width(0), scalar_t{1},
                   {grad_inputs()}, grad_inputs());
      }
    }
    write_rows(grad_query_inputs(), query.count, work.query.entries, first,
               [&](int64_t entry, int64_t j) { return work.places.of_query(entry, j); });
  }

  // From the gradients of φ_K to those of everything.
  __device__ __forceinline__ void adjoint(scalar_t* record) const {
#pragma unroll 1
    for (int k = K - 1; k >= 0; --k) {
      undo_update(k, record + work.record.rates_at());
      if (!work.first_order) undo_gradient(k);
    }
    finish(record);
  }

  // A task without a query, whose gradients are zero.
  __device__ __forceinline__ void add_nothing() const {
    each(work.user_width, [&](int i) { grad_user()[i] = 0; });
    write_zero_rows();
  }

 private:
  // D_l, and H̄_{l−1} as far as it comes from the update of step k; adds s̄_k.
  __device__ __forceinline__ void undo_update(int k, scalar_t* rates) const {
    const Rows rows = step_rows(k);
    const TowerRates<scalar_t> sums{rates, work.inner_lr.step_stride, work.inner_lr.tensor_stride};
#pragma unroll 1
    for (int l = 1; l <= shape.depth; ++l) {
      const scalar_t rate = work.inner_lr.weight(k, l), bias_rate = work.inner_lr.bias(k, l);
      const bool own = l >= lowest();
      const Matrix<scalar_t> grad = rows_of(grad_weights(l), width(l - 1));
      if (own)
        multiply(rows_of(hidden(rows, l - 1), width(l - 1)), grad.transposed(), S, width(l - 1),
                 width(l), scalar_t{1}, {}, grad_delta(l));
      scalar_t of_weight = 0, of_bias = 0;
      each(S * width(l), [&](int i) {
        const scalar_t along = own ? grad_delta(l)[i] : -grad_coefficients()[i],
                       bias = grad_bias(l)[i % width(l)], delta = rows.delta(l)[i];
        of_weight -= along * delta;
        of_bias -= bias * delta;
        grad_delta(l)[i] = -rate * along - bias_rate * bias;
      });
      add_rate(of_weight, sums.weight(k, l));
      add_rate(of_bias, sums.bias(k, l));
      if (work.first_order || !own) continue;
      const Matrix<scalar_t> deltas = rows_of(rows.delta(l), width(l));
      scalar_t* below = l == 1 ? grad_inputs() : grad_hidden(l - 1);
      multiply(deltas, grad, S, width(l), width(l - 1), -rate, {l == 1 ? below : nullptr}, below);
    }
  }

  // From D_l and H̄_{l−1} through step k's gradient to its weights.
  __device__ __forceinline__ void undo_gradient(int k) const {
    const Rows rows = step_rows(k);
    const int L = shape.depth;
#pragma unroll 1
    for (int l = 1; l < L; ++l) {
      each(S * width(l), [&](int i) { along()[i] = grad_delta(l)[i] * rows.slope(l, i); });
      multiply(rows_of(along(), width(l)), weights(k, l + 1).transposed(), S, width(l),
               width(l + 1), scalar_t{1}, {grad_delta(l + 1)}, grad_delta(l + 1));
      add_outer(rows, rows.delta(l + 1), along(), l + 1, grad_weights(l + 1));
    }
    each(S / group, [&](int s) {
      const int begin = s * group;
      bend(work.loss, group, curvatures(k) + begin, grad_delta(L) + begin, grad_hidden(L) + begin);
    });
#pragma unroll 1
    for (int l = L; l >= 2; --l) {
      multiply(rows_of(grad_hidden(l), width(l)), weights(k, l), S, width(l), width(l - 1),
               scalar_t{1}, {grad_hidden(l - 1)}, grad_hidden(l - 1));
      add_outer(rows, grad_hidden(l), rows.hidden(l - 1), l, grad_weights(l));
      add_sums(grad_hidden(l), S, l);
      each(S * width(l - 1), [&](int i) {
        scalar_t& grad = grad_hidden(l - 1)[i];
        grad *= rows.slope(l - 1, i);
        if (rows.all_bends != nullptr)
          grad += grad_delta(l - 1)[i] * rows.all_bends[rows.at(l - 1) + i];
      });
    }
    const scalar_t* grad = grad_hidden(1);
    const Matrix<scalar_t> grads = rows_of(grad, width(1));
    add_sums(grad, S, 1);
    if (own_first()) {
      multiply(grads, weights(k, 1), S, width(1), width(0), scalar_t{1}, {grad_inputs()},
               grad_inputs());
      add_outer(rows, grad, inputs(), 1, grad_weights(1));
      return;
    }
    const scalar_t rate = work.inner_lr.weight(k, 1);
    each(S * width(1), [&](int i) {
      grad_first()[i] += grad[i];
      coefficients()[i] -= rate * rows.delta(1)[i];
    });
    if (k == 0) return;  // A_0 is zero, and nobody asks for its gradient
    multiply(rows_of(gram(), S), grads, S, S, width(1), scalar_t{-1}, {grad_coefficients()},
             grad_coefficients());
    multiply(grads, rows_of(coefficients(), width(1)).transposed(), S, width(1), S, scalar_t{-1},
             {grad_gram()}, grad_gram());
  }

  __device__ __forceinline__ void finish(scalar_t* record) const {
    scalar_t* own = record + Base::own_at();
    each(at.own_size, [&](int i) { own[i] += memory[at.grad_weights + i]; });
    if (work.first_order || K == 0) return write_zero_rows();
    if (!own_first()) {
      const Matrix<scalar_t> rows = rows_of(inputs(), width(0)),
                             grads = rows_of(grad_first(), width(1)),
                             grad_products = rows_of(grad_gram(), S);
      multiply(grads.transposed(), rows, width(1), S, width(0), scalar_t{1}, {record}, record);
      multiply(grads, first_weights(), S, width(1), width(0), scalar_t{1}, {grad_inputs()},
               grad_inputs());
      multiply(grad_products, rows, S, S, width(0), scalar_t{1}, {grad_inputs()}, grad_inputs());
      multiply(grad_products.transposed(), rows, S, S, width(0), scalar_t{1}, {grad_inputs()},
               grad_inputs());
    }
    write_rows(grad_inputs(), S, work.support, work.support.begin(task), of_support());
  }

  // Of a support that has no gradients, where it has rows for them.
  __device__ __forceinline__ void write_zero_rows() const {
    if (!work.places.support) return;
    each_place(
        work.support, S, work.support.begin(task), of_support(),
        [&](int64_t place, int, int column) { work.item_rows[place * work.dim + column] = 0; });
  }

  // Writes the items' part of gradients [count, n_0] of inputs to the rows of entries from `first`
  // on, and adds up the user's part.
  template <typename PlaceOf>
  __device__ __forceinline__ void write_rows(const scalar_t* grads, int count,
                                             const EntryData<scalar_t>& entries, int64_t first,
                                             const PlaceOf& place_of) const {
    each_place(entries, count, first, place_of, [&](int64_t place, int r, int column) {
      work.item_rows[place * work.dim + column] = grads[r * width(0) + work.user_width + column];
    });
    each(work.user_width, [&](int i) {
      scalar_t sum = grad_user()[i];
      for (int r = 0; r < count; ++r) sum += grads[r * width(0) + i];
      grad_user()[i] = sum;
    });
  }

  // Calls put(place, r, column) for each number of the gradient rows of `count` items and negatives
  // of entries, and writes their ids.
  template <typename PlaceOf, typename Put>
  __device__ __forceinline__ void each_place(const EntryData<scalar_t>& entries, int count,
                                             int64_t first, const PlaceOf& place_of,
                                             const Put& put) const {
    const int candidates = static_cast<int>(entries.candidates());
    each(count * work.dim, [&](int i) {
      const int r = i / work.dim, column = i % work.dim;
      const int64_t place = place_of(first + r / candidates, r % candidates);
      if (column == 0) work.item_ids[place] = Base::item_of(entries, first, r);
      put(place, r, column);
    });
  }
  __device__ __forceinline__ auto of_support() const {
    return [this](int64_t entry, int64_t j) { return work.places.of_support(entry, j); };
  }

  // result += leftᵀ right, such as W_l is: left [rows, n_l], right [rows, n_{l−1}].
  __device__ __forceinline__ void add_outer(const Rows& rows, const scalar_t* left,
                                            const scalar_t* right, int l, scalar_t* result) const {
    multiply(rows_of(left, width(l)).transposed(), rows_of(right, width(l - 1)), width(l),
             rows.count, width(l - 1), scalar_t{1}, {result}, result);
  }
  // m_l += the sums over rows [count, n_l]
  __device__ __forceinline__ void add_sums(const scalar_t* rows, int count, int l) const {
    sum_rows(rows, count, width(l), scalar_t{1}, grad_bias(l), grad_bias(l));
  }
  // sum += Σ value over the block
  __device__ __forceinline__ void add_rate(scalar_t value, scalar_t& sum) const {
    CUDA_SHARED(scalar_t, of_warps, kMatrixThreads / kWarpSize);
    value = team.sum(value, of_warps);
    if (team.leads()) sum += value;
  }

  __device__ __forceinline__ const scalar_t* hidden(const Rows& rows, int l) const {
    return l == 0 ? inputs() : rows.hidden(l);
  }
  __device__ __forceinline__ scalar_t* grad_user() const {
    return work.grad_user + task * work.user_width;
  }
  // M_l, m_l
  __device__ __forceinline__ scalar_t* grad_weights(int l) const {
    return memory + at.grad_weights + shape.weight_at[l] - Base::own_at();
  }
  __device__ __forceinline__ scalar_t* grad_bias(int l) const {
    return memory + at.grad_weights + shape.bias_at(l) - Base::own_at();
  }
  __device__ __forceinline__ scalar_t* grad_delta(int l) const {
    return memory + at.grad_delta + S * shape.unit_at[l];
  }
  __device__ __forceinline__ scalar_t* grad_hidden(int l) const {
    return memory + at.grad_hidden + S * shape.unit_at[l];
  }
  __device__ __forceinline__ scalar_t* along() const { return memory + at.along; }
  __device__ __forceinline__ scalar_t* grad_coefficients() const {
    return memory + at.grad_coefficients;
  }
  __device__ __forceinline__ scalar_t* grad_first() const { return memory + at.grad_first; }
  __device__ __forceinline__ scalar_t* grad_gram() const { return memory + at.grad_gram; }
  __device__ __forceinline__ scalar_t* grad_inputs() const { return memory + at.grad_inputs; }
  __device__ __forceinline__ scalar_t* grad_query_inputs() const {
    return memory + at.grad_query_inputs;
  }
};

}  // namespace metarec_fast::cuda
