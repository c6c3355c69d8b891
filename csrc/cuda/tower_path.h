// An MLP tower on its way through the steps of one task, all threads of a block together; the
// formulas stand on top of csrc/cpu/tower_task.h.
//
// Whoever works on the task begins with a barrier, and so sees what was written before.
#pragma once

#include "activation.h"
#include "matrix.h"
#include "tower.h"
#include "tower_losses.h"

namespace metarec_fast::cuda {

// What a step leaves behind of all layers, for `count` rows: one layer after the other.
template <typename scalar_t>
struct TowerRows {
  const TowerShape& shape;
  int count;
  scalar_t *all_hidden, *all_delta, *all_slopes, *all_bends;  // slopes and bends: nullptr, if relu

  __device__ __forceinline__ scalar_t* hidden(int l) const { return all_hidden + at(l); }
  __device__ __forceinline__ scalar_t* delta(int l) const { return all_delta + at(l); }
  __device__ __forceinline__ scalar_t slope(int l, int i) const {
    if (all_slopes != nullptr) return all_slopes[at(l) + i];
    return all_hidden[at(l) + i] > 0 ? scalar_t{1} : scalar_t{0};
  }
  __device__ __forceinline__ int at(int l) const { return count * shape.unit_at[l]; }
};

template <typename scalar_t, bool kGoesBack>
struct TowerPath {
  using Rows = TowerRows<scalar_t>;

  const TowerWork<scalar_t>& work;
  const TowerShape& shape;
  const TowerScratch& at;
  const Team team;
  scalar_t* const memory;
  const int64_t task;
  const int group;  // rows of a support entry: its item's, and those of its negatives
  const int S, K;   // rows of the support; steps, 0 if there are none

  __device__ __forceinline__ TowerPath(const TowerWork<scalar_t>& work_in, scalar_t* memory_in,
                                       int64_t task_in)
      : work(work_in),
        shape(work_in.shape),
        at(work_in.launch.scratch),
        team(kMatrixThreads / kWarpSize),
        memory(memory_in),
        task(task_in),
        group(static_cast<int>(work_in.support.candidates())),
        S(static_cast<int>(work_in.support.size(task_in)) * group),
        K(S == 0 ? 0 : work_in.steps) {}

  // φ_1 … φ_K
  __device__ __forceinline__ void adapt() const {
    if (K == 0) return;
    gather(work.support, work.support.begin(task), S, inputs());
    if (!own_first()) {
      const Matrix<scalar_t> rows = rows_of(inputs(), width(0));
      multiply(rows, rows.transposed(), S, width(0), S, scalar_t{1}, {}, gram());
      multiply(rows, first_weights().transposed(), S, width(0), width(1), scalar_t{1}, {}, first());
      each(S * width(1), [&](int i) { coefficients()[i] = 0; });
    }
#pragma unroll 1
    for (int k = 0; k < K; ++k) step(k);
  }

  // The scores, in H_L, of the query's entries from `first` on, by φ_K.
  __device__ __forceinline__ void score(int64_t first_entry, const Rows& query) const {
    gather(work.query.entries, first_entry, query.count, query_inputs());
    const Matrix<scalar_t> rows = rows_of(query_inputs(), width(0));
    const Start<scalar_t> bias{nullptr, biases(K, 1)};
    scalar_t* out = query.hidden(1);
    multiply(rows, (own_first() ? weights(K, 1) : first_weights()).transposed(), query.count,
             width(0), width(1), scalar_t{1}, bias, out);
    if (!own_first() && K > 0) {
      multiply(rows, rows_of(inputs(), width(0)).transposed(), query.count, width(0), S,
               scalar_t{1}, {}, cross());
      multiply(rows_of(cross(), S), rows_of(coefficients(), width(1)), query.count, S, width(1),
               scalar_t{-1}, {out}, out);
    }
    up(K, query);
    add_item_biases(work.query.entries, first_entry, query);
  }

  // [user part; item row] of the items and negatives of entries, [count, n_0].
  __device__ __forceinline__ void gather(const EntryData<scalar_t>& entries, int64_t first_entry,
                                         int count, scalar_t* rows) const {
    const scalar_t* user = work.user_part + task * work.user_width;
    each(count * width(0), [&](int i) {
      const int column = i % width(0) - work.user_width;
      rows[i] =
          column < 0
              ? user[column + work.user_width]
              : work.item_table[item_of(entries, first_entry, i / width(0)) * work.dim + column];
    });
  }
  // Of which item row r is, where those of entries begin with `first_entry`.
  __device__ __forceinline__ static int64_t item_of(const EntryData<scalar_t>& entries,
                                                    int64_t first_entry, int r) {
    const int candidates = static_cast<int>(entries.candidates());
    return entries.candidate(first_entry + r / candidates, r % candidates);
  }
  __device__ __forceinline__ void add_item_biases(const EntryData<scalar_t>& entries,
                                                  int64_t first_entry, const Rows& rows) const {
    if (work.item_bias == nullptr) return;
    each(rows.count, [&](int r) {
      rows.hidden(shape.depth)[r] += work.item_bias[item_of(entries, first_entry, r)];
    });
  }

  // Layer by layer from Z_1, in H_1's place, to Z_L, in H_L's.
  __device__ __forceinline__ void up(int k, const Rows& rows) const {
#pragma unroll 1
    for (int l = 2; l <= shape.depth; ++l) {
      activate(l - 1, rows);
      multiply(rows_of(rows.hidden(l - 1), width(l - 1)), weights(k, l).transposed(), rows.count,
               width(l - 1), width(l), scalar_t{1}, {nullptr, biases(k, l)}, rows.hidden(l));
    }
  }

  // From Δ_L to Δ_1.
  __device__ __forceinline__ void down(int k, const Rows& rows) const {
#pragma unroll 1
    for (int l = shape.depth - 1; l >= 1; --l) {
      multiply(rows_of(rows.delta(l + 1), width(l + 1)), weights(k, l + 1), rows.count,
               width(l + 1), width(l), scalar_t{1}, {}, rows.delta(l));
      each(rows.count * width(l), [&](int i) {
        scalar_t& delta = rows.delta(l)[i];
        if (rows.all_bends != nullptr) rows.all_bends[rows.at(l) + i] *= delta;
        delta *= rows.slope(l, i);
      });
    }
  }

  // The scores of an entry, the i-th in these rows.
  __device__ __forceinline__ EntryScores<scalar_t> entry_scores(const EntryData<scalar_t>& entries,
                                                                int64_t entry, const Rows& rows,
                                                                int i) const {
    const int candidates = static_cast<int>(entries.candidates());
    return {rows.hidden(shape.depth) + i * candidates,
            entries.log_q == nullptr ? nullptr : entries.log_q + entry * candidates, candidates};
  }

  // Calls body(i) in one thread for each i, always the same one.
  template <typename Body>
  __device__ __forceinline__ void each(int count, const Body& body) const {
    team.sync();
#pragma unroll 1
    for (int i = team.thread(); i < count; i += team.size()) body(i);
  }

  // sums[i] = start[i] + factor · Σ_r rows[r, i]; start may be sums.
  __device__ __forceinline__ void sum_rows(const scalar_t* rows, int count, int columns,
                                           scalar_t factor, const scalar_t* start,
                                           scalar_t* sums) const {
    each(columns, [&](int i) {
      scalar_t sum = 0;
#pragma unroll 4
      for (int r = 0; r < count; ++r) sum += rows[r * columns + i];
      sums[i] = start[i] + factor * sum;
    });
  }

  // Whether layer 1 is a task's own, as all others are.
  __device__ __forceinline__ bool own_first() const { return work.launch.own_first; }
  __device__ __forceinline__ int lowest() const { return own_first() ? 1 : 2; }
  __device__ __forceinline__ int width(int l) const { return shape.width[l]; }

  // The activations of step k, and of `count` rows of the query.
  __device__ __forceinline__ Rows step_rows(int k) const {
    const int place = kGoesBack ? k * at.step : 0;
    const bool curved = work.activation == Activation::kGelu;
    return {shape,
            S,
            memory + at.hidden + place,
            memory + at.delta + place,
            curved ? memory + at.slopes + place : nullptr,
            curved && kGoesBack ? memory + at.bends + place : nullptr};
  }
  __device__ __forceinline__ Rows query_rows(int count) const {
    const bool curved = work.activation == Activation::kGelu;
    return {shape,
            count,
            memory + at.query_hidden,
            memory + at.query_delta,
            curved && kGoesBack ? memory + at.query_slopes : nullptr,
            nullptr};
  }

  // W_l and b_l after k steps, of the layers that are the task's own; b_1 always is.
  __device__ __forceinline__ Matrix<scalar_t> weights(int k, int l) const {
    return rows_of(parameters(k) + shape.weight_at[l], width(l - 1));
  }
  __device__ __forceinline__ const scalar_t* biases(int k, int l) const {
    return parameters(k) + shape.bias_at(l);
  }
  __device__ __forceinline__ const scalar_t* parameters(int k) const {
    return k == 0 ? work.parameters : own_parameters(k);
  }
  // After step k ≥ 1; places are those among all parameters.
  __device__ __forceinline__ scalar_t* own_parameters(int k) const {
    return memory + at.weights + (kGoesBack ? (k - 1) * at.own_size : 0) - own_at();
  }
  __device__ __forceinline__ int own_at() const { return shape.size - at.own_size; }
  // W_1, that all tasks start from.
  __device__ __forceinline__ Matrix<scalar_t> first_weights() const {
    return rows_of(work.parameters, width(0));
  }

  __device__ __forceinline__ scalar_t* inputs() const { return memory + at.inputs; }
  __device__ __forceinline__ scalar_t* gram() const { return memory + at.gram; }
  __device__ __forceinline__ scalar_t* first() const { return memory + at.first; }
  __device__ __forceinline__ scalar_t* coefficients() const { return memory + at.coefficients; }
  __device__ __forceinline__ scalar_t* curvatures(int k) const {
    return memory + at.curvatures + (kGoesBack ? k * S : 0);
  }
  __device__ __forceinline__ scalar_t* query_inputs() const { return memory + at.query_inputs; }
  __device__ __forceinline__ scalar_t* cross() const { return memory + at.cross; }

 private:
  __device__ __forceinline__ void step(int k) const {
    const Rows rows = step_rows(k);
    scalar_t* out = rows.hidden(1);
    if (own_first()) {
      multiply(rows_of(inputs(), width(0)), weights(k, 1).transposed(), S, width(0), width(1),
               scalar_t{1}, {nullptr, biases(k, 1)}, out);
    } else {
      multiply(rows_of(gram(), S), rows_of(coefficients(), width(1)), S, S, width(1), scalar_t{-1},
               {first(), biases(k, 1)}, out);
    }
    up(k, rows);
    add_item_biases(work.support, work.support.begin(task), rows);
    differentiate_support(k, rows);
    down(k, rows);
    update(k, rows);
  }

  // Δ_L = c ∘ ℓ'(p, y), and what is to be known of c ∘ ℓ'',  c = w/entries.
  __device__ __forceinline__ void differentiate_support(int k, const Rows& rows) const {
    const int64_t begin = work.support.begin(task);
    const int entries = S / group;
    each(entries, [&](int s) {
      const scalar_t weight = work.weights == nullptr ? 1 : work.weights[begin + s];
      differentiate(work.loss, weight / static_cast<scalar_t>(entries),
                    entry_scores(work.support, begin + s, rows, s),
                    work.targets == nullptr ? scalar_t{0} : work.targets[begin + s],
                    rows.delta(shape.depth) + s * group, curvatures(k) + s * group);
    });
  }

  // φ_{k+1} from φ_k
  __device__ __forceinline__ void update(int k, const Rows& rows) const {
    scalar_t* next = own_parameters(k + 1);
    if (!own_first()) {
      const scalar_t rate = work.inner_lr.weight(k, 1);
      each(S * width(1), [&](int i) { coefficients()[i] += rate * rows.delta(1)[i]; });
      sum_rows(rows.delta(1), S, width(1), -work.inner_lr.bias(k, 1), biases(k, 1),
               next + shape.bias_at(1));
    }
#pragma unroll 1
    for (int l = lowest(); l <= shape.depth; ++l) {
      const scalar_t* below = l == 1 ? inputs() : rows.hidden(l - 1);
      multiply(rows_of(rows.delta(l), width(l)).transposed(), rows_of(below, width(l - 1)),
               width(l), S, width(l - 1), -work.inner_lr.weight(k, l), {weights(k, l).values},
               next + shape.weight_at[l]);
      sum_rows(rows.delta(l), S, width(l), -work.inner_lr.bias(k, l), biases(k, l),
               next + shape.bias_at(l));
    }
  }

  // H_l = σ(Z_l), and the derivatives there.
  __device__ __forceinline__ void activate(int l, const Rows& rows) const {
    each(rows.count * width(l), [&](int i) {
      scalar_t& hidden = rows.hidden(l)[i];
      if (work.activation == Activation::kRelu) {
        hidden = relu(hidden);
        return;
      }
      const Activated<scalar_t> z = gelu(hidden);
      hidden = z.value;
      if (rows.all_slopes != nullptr) rows.all_slopes[rows.at(l) + i] = z.slope;
      if (rows.all_bends != nullptr) rows.all_bends[rows.at(l) + i] = z.bend;
    });
  }
};

}  // namespace metarec_fast::cuda
