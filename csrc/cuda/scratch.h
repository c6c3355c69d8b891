// The memory of a team: what it knows of its task, in shared memory if that is large enough.
#pragma once

#include "problem.h"

namespace metarec_fast::cuda {

// The Gram form costs about 2R passes over R rows, the direct form 5 a step.
constexpr int64_t kGramPasses = 2, kDirectPasses = 5, kLargestGram = 64;

// How a task of `rows` rows is adapted, `compared` if its query's entries are with negatives.
template <typename scalar_t>
Way choose_way(const InnerLoop<scalar_t>& loop, bool items_too, bool whole_path, bool compared,
               int64_t rows) {
  if (items_too) return Way::kItemsToo;
  if (loop.exact()) return Way::kExact;
  const bool scaled = loop.preconditioner != nullptr, moves_on = loop.momentum.values != nullptr,
             pulled = loop.prior_pull.values != nullptr;
  const bool possible = !scaled && !whole_path && rows <= kLargestGram;
  const bool pays = kGramPasses * rows < kDirectPasses * loop.steps;
  const bool wanted = loop.form == Form::kGram || (loop.form == Form::kAuto && pays);
  if (possible && wanted) return Way::kGram;
  const bool plain = !scaled && !moves_on && !pulled && !is_pairwise(loop.loss);
  return plain && !whole_path && !compared ? Way::kPlain : Way::kDirect;
}

// What a team knows of its task in a few numbers; in shared memory, where they fill no registers.
template <typename scalar_t>
struct Facts {
  int64_t index, begin;  // t, its first support entry
  int entries, rows;     // S, R
  scalar_t mean, pull;   // 1/(S + n0), ρ
};

// Where a team's arrays begin, if no task has more than R rows.
inline ScratchLayout lay_out_scratch(Way way, int warps, const RowShape& shape, int64_t R,
                                     int64_t steps, int64_t candidates_of_entry) {
  ScratchLayout at{};
  const auto take = [&at](int64_t count) {
    const int64_t begin = at.size;
    at.size += (count + kPack - 1) / kPack * kPack;
    return static_cast<int>(begin);
  };
  const int64_t K = steps < 0 ? 0 : steps, width = shape.width();
  const bool direct = way == Way::kDirect || way == Way::kPlain,
             keeps_path = direct || way == Way::kItemsToo, exact = way == Way::kExact;
  at.record = take(RecordLayout{static_cast<int>(width), static_cast<int>(K)}.size());
  at.partial = take(warps * (width + kPack));
  at.candidates = take(candidates_of_entry > 1 ? 2 * warps * candidates_of_entry : 0);
  at.base = take(R), at.targets = take(R), at.weights = take(R);
  at.scores = take(R), at.along = take(R), at.grad_base = take(R), at.grad_weights = take(R);
  at.rows = take(R * width);
  at.pushes = take(K * R), at.curvatures = take(K * R), at.bends = take(K * R);
  at.path = take(keeps_path ? (K + 1) * width : 0), at.path_bias = take(keeps_path ? K + 1 : 0);
  at.directions = take(direct ? K * width : 0), at.direction_bias = take(direct ? K : 0);
  at.gram = take(way == Way::kGram ? R * R : 0);
  at.coefficients = take(way == Way::kGram ? (K + 1) * R : 0);
  const int64_t n = !exact ? 0 : R <= shape.dim + 1 ? R : shape.dim + 1;
  at.matrix = take(n * n), at.dual = take(exact ? R : 0);
  at.solved = take(exact ? width + kPack : 0);
  const int64_t items = way == Way::kItemsToo ? R : 0;
  at.grad_rows = take(items * width), at.biases = take(items), at.grad_biases = take(items);
  at.slopes = take(K * items), at.moves = take(items);
  at.place = take(items), at.next = take(items);
  return at;
}

// The arrays themselves. R rows, K steps; what belongs to rows has a number for each.
template <typename scalar_t>
struct Scratch {
  scalar_t* memory;
  const ScratchLayout& at;
  Facts<scalar_t>& facts;

  // [RecordLayout::size]; [warps, width + kPack]; scores of an entry's candidates and their p̄,
  // [warps, 2, 1 + M]
  HOST_DEVICE scalar_t* record() const { return memory + at.record; }
  HOST_DEVICE scalar_t* partial() const { return memory + at.partial; }
  HOST_DEVICE scalar_t* candidates() const { return memory + at.candidates; }

  // X [R, width], and of each row its score at a fast vector 0, y, w, p, X η, b̄ and w̄
  HOST_DEVICE scalar_t* rows() const { return memory + at.rows; }
  HOST_DEVICE scalar_t* base() const { return memory + at.base; }
  HOST_DEVICE scalar_t* targets() const { return memory + at.targets; }
  HOST_DEVICE scalar_t* weights() const { return memory + at.weights; }
  HOST_DEVICE scalar_t* scores() const { return memory + at.scores; }
  HOST_DEVICE scalar_t* along() const { return memory + at.along; }
  HOST_DEVICE scalar_t* grad_base() const { return memory + at.grad_base; }
  HOST_DEVICE scalar_t* grad_weights() const { return memory + at.grad_weights; }

  // w ℓ'/(S + n0), its slope, and h, [K, R]
  HOST_DEVICE scalar_t* pushes() const { return memory + at.pushes; }
  HOST_DEVICE scalar_t* curvatures() const { return memory + at.curvatures; }
  HOST_DEVICE scalar_t* bends() const { return memory + at.bends; }

  // Direct: φ_k [K + 1, width], η_k = A ∘ λ_{k+1} [K, width]
  HOST_DEVICE scalar_t* path() const { return memory + at.path; }
  HOST_DEVICE scalar_t* path_bias() const { return memory + at.path_bias; }
  HOST_DEVICE scalar_t* directions() const { return memory + at.directions; }
  HOST_DEVICE scalar_t* direction_bias() const { return memory + at.direction_bias; }

  // Gram: G, later C [R, R]; a_k [K + 1, R]
  HOST_DEVICE scalar_t* gram() const { return memory + at.gram; }
  HOST_DEVICE scalar_t* coefficients() const { return memory + at.coefficients; }

  // Exact: the system [n, n], a [R], a vector [width + kPack]
  HOST_DEVICE scalar_t* matrix() const { return memory + at.matrix; }
  HOST_DEVICE scalar_t* dual() const { return memory + at.dual; }
  HOST_DEVICE scalar_t* solved() const { return memory + at.solved; }

  // Items that adapt: ē [R, width], m + b, b̄, g_k [K, R], s g; where an entry's item comes first,
  // and where next
  HOST_DEVICE scalar_t* grad_rows() const { return memory + at.grad_rows; }
  HOST_DEVICE scalar_t* biases() const { return memory + at.biases; }
  HOST_DEVICE scalar_t* grad_biases() const { return memory + at.grad_biases; }
  HOST_DEVICE scalar_t* slopes() const { return memory + at.slopes; }
  HOST_DEVICE scalar_t* moves() const { return memory + at.moves; }
  HOST_DEVICE int* place() const { return reinterpret_cast<int*>(memory + at.place); }
  HOST_DEVICE int* next() const { return reinterpret_cast<int*>(memory + at.next); }
};

}  // namespace metarec_fast::cuda
