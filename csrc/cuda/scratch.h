// The memory of a team: what it knows of its task, in shared memory if that is large enough.
#pragma once

#include "problem.h"

namespace metarec_fast::cuda {

// The Gram form costs about 2R passes over R rows, the direct form 5 a step.
constexpr int64_t kGramPasses = 2, kDirectPasses = 5, kLargestGram = 64;

// How a task of `rows` rows is adapted, `compared` if its query's entries are with negatives.
template <typename scalar_t>
HOST_DEVICE Way choose_way(const InnerLoop<scalar_t>& loop, bool items_too, bool whole_path,
                           bool compared, int64_t rows) {
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

// What a team knows of its task, besides.
template <typename scalar_t>
struct Facts {
  int64_t index, begin;  // t, its first support entry
  int entries, rows;     // S, R
  scalar_t mean, pull;   // 1/(S + n0), ρ
};

template <typename scalar_t>
struct Scratch {
  Facts<scalar_t> facts;
  scalar_t *record, *partial;  // [RecordLayout::size], [warps, width + kPack]
  scalar_t* candidates;        // scores of an entry's candidates and p̄: [warps, 2, 1 + M]
  scalar_t *rows, *base, *targets, *weights;  // X [R, width], score of a fast vector 0 [R]; w
  scalar_t *scores, *along, *grad_base, *grad_weights;  // [R]
  scalar_t *pushes, *curvatures, *bends;                // w ℓ'/(S + n0), its slope, h [K, R]
  scalar_t *path, *path_bias;                           // φ_k [K + 1, width], [K + 1]
  scalar_t *directions, *direction_bias;                // η_k = A ∘ λ_{k+1} [K, width], [K]
  scalar_t *gram, *coefficients;                        // G and later C [R, R]; a_k [K + 1, R]
  scalar_t *matrix, *dual, *solved;            // of the exact form: [n, n], [R], [width + 4]
  scalar_t *grad_rows, *biases, *grad_biases;  // of adapted items: ē [R, width], m + b [R]
  scalar_t *slopes, *moves;                    // g_k by item [K, R], s g [R]
  int *place, *next;                           // [R] (see item_places.h)

  // Lays everything out that a task of `rows` rows needs; returns how many numbers that takes.
  HOST_DEVICE int64_t lay_out(scalar_t* memory, Way way, int warps, int dim, int width, int64_t R,
                              int64_t steps, int64_t candidates_of_entry) {
    int64_t end = 0;
    const auto take = [&](int64_t count) {
      scalar_t* const begin = memory == nullptr ? nullptr : memory + end;
      end += (count + kPack - 1) / kPack * kPack;
      return begin;
    };
    const int64_t K = steps < 0 ? 0 : steps;
    const bool direct = way == Way::kDirect || way == Way::kPlain,
               steps_kept = direct || way == Way::kItemsToo;
    record = take(RecordLayout{width, static_cast<int>(K)}.size());
    partial = take(static_cast<int64_t>(warps) * (width + kPack));
    candidates = take(candidates_of_entry > 1 ? 2 * warps * candidates_of_entry : 0);
    base = take(R), targets = take(R), weights = take(R), scores = take(R), along = take(R);
    grad_base = take(R), grad_weights = take(R);
    rows = take(R * width);
    pushes = take(K * R), curvatures = take(K * R), bends = take(K * R);
    path = take(steps_kept ? (K + 1) * width : 0), path_bias = take(steps_kept ? K + 1 : 0);
    directions = take(direct ? K * width : 0);
    direction_bias = take(direct ? K : 0);
    gram = take(way == Way::kGram ? R * R : 0);
    coefficients = take(way == Way::kGram ? (K + 1) * R : 0);
    const int64_t n = way != Way::kExact ? 0 : R <= dim + 1 ? R : dim + 1;
    matrix = take(n * n), dual = take(way == Way::kExact ? R : 0);
    solved = take(way == Way::kExact ? width + kPack : 0);
    const int64_t items = way == Way::kItemsToo ? R : 0;
    grad_rows = take(items * width), biases = take(items), grad_biases = take(items);
    slopes = take(K * items), moves = take(items);
    place = reinterpret_cast<int*>(take(items)), next = reinterpret_cast<int*>(take(items));
    return end;
  }
};

}  // namespace metarec_fast::cuda
