// What the kernels that adapt tasks are given: plain pointers into the tensors of an operator.
#pragma once

#include "../entries.h"
#include "../inner_loop.h"
#include "row_layout.h"

namespace metarec_fast::cuda {

// The meta-parameters, the support, and how it is adapted on.
template <typename scalar_t, typename table_t>
struct Problem {
  const scalar_t* user_init;       // [D] or [T, D]
  const scalar_t* user_bias_init;  // scalar or [T]
  int64_t user_stride, bias_stride;
  const table_t* item_table;  // [N, D]
  const scalar_t* item_bias;  // [N]
  const scalar_t* offset;     // scalar
  EntryData<scalar_t> support;
  const scalar_t* targets;  // [n]
  const scalar_t* weights;  // [n], or nullptr: ones
  InnerLoop<scalar_t> loop;
  int64_t num_tasks;
  int64_t most_rows;  // no task has more
  RowShape shape;
  bool packed_table;  // rows may be read four numbers at a time
};

// Where the gradients of a batch go; nullptr where one is not wanted.
template <typename scalar_t>
struct GradientData {
  Wanted wanted;
  scalar_t* user_init;        // [T, D] if there is a start per task, else summed in records
  scalar_t* user_bias_init;   // likewise
  scalar_t* prior_pull;       // likewise
  scalar_t* support_weights;  // [n]
  scalar_t* item_rows;        // [rows, D]
  scalar_t* item_biases;      // [rows]
  int64_t* item_ids;          // [rows]
  ItemRows places;
  bool packed_rows;  // rows may be written four numbers at a time
};

// What is asked of a task once it has adapted.
enum class Ask {
  kNothing,  // φ_K itself
  kScores,   // of the query
  kLoss,     // of the query, and the way back
  kGiven,    // the way back from given gradients
  kMove,     // how far it moved, and its loss on the support (Reptile)
};

// Query, and what comes of it.
template <typename scalar_t>
struct QueryData {
  Ask ask;
  EntryData<scalar_t> entries;
  OuterLoss loss;
  const scalar_t* targets;       // y [n], or nullptr where only pairs are judged
  const scalar_t* weights;       // v [n], or nullptr: ones
  const scalar_t* task_weights;  // ω [T], or nullptr: ones
  const scalar_t* step_weights;  // κ [K + 1], or nullptr: only the last step counts
  const scalar_t* normalisers;   // 1/Σ ω over tasks with a query; for kMove over all, over those
                                 // with a support
  scalar_t* user;                // φ_K: [T, D], or nullptr
  scalar_t* bias;                // [T]
  scalar_t* scores;              // [n]
  const scalar_t* grad_user;     // of kGiven: [T, D]
  const scalar_t* grad_bias;     // [T]
  const scalar_t* grad_scores;   // [n]

  HOST_DEVICE bool whole_path() const { return step_weights != nullptr; }
  HOST_DEVICE bool goes_back() const { return ask == Ask::kLoss || ask == Ask::kGiven; }
  HOST_DEVICE scalar_t task_weight(int64_t task) const {
    return task_weights == nullptr ? 1 : task_weights[task];
  }
};

// The sums that a team keeps of what all tasks share, in one stretch of memory:
// φ̄_0, Ā, s̄, β̄, ρ̄, m̄, loss.
struct RecordLayout {
  int width, steps;

  HOST_DEVICE int start() const { return 0; }  // [width], then the bias
  HOST_DEVICE int scale() const { return width + kPack; }
  HOST_DEVICE int inner_lr() const { return 2 * (width + kPack); }
  HOST_DEVICE int momentum() const { return inner_lr() + steps; }
  HOST_DEVICE int pull() const { return momentum() + steps; }
  HOST_DEVICE int offset() const { return pull() + 1; }
  HOST_DEVICE int loss() const { return offset() + 1; }
  HOST_DEVICE int size() const { return (loss() + kPack) / kPack * kPack; }
};

// How the inner loop of a task is run. kPlain: kDirect of nothing but the gradient (no A, ρ or β),
// of losses of single scores.
enum class Way { kPlain, kDirect, kGram, kExact, kItemsToo };

// Where the arrays of a team's scratch begin, and how many numbers they are (scratch.h).
struct ScratchLayout {
  int64_t size;
  int record, partial, candidates, base, targets, weights, scores, along, grad_base, grad_weights,
      rows, pushes, curvatures, bends, path, path_bias, directions, direction_bias, gram,
      coefficients, matrix, dual, solved, grad_rows, biases, grad_biases, slopes, moves, place,
      next;
};

// Which tasks a launch takes, by how many rows they have, and what it needs for each.
struct Launch {
  Way way;
  int warps;  // of a team
  int teams_per_block;
  int64_t fewest_rows, most_rows;
  ScratchLayout scratch;
  void* workspace;       // [teams, scratch.size] where shared memory is too small, or nullptr
  int64_t first_record;  // of the launch's teams
};

}  // namespace metarec_fast::cuda
