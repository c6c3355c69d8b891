// What a launch of the kernels that adapt tasks is given. There are two, for the user side alone
// and for items too; they stand behind adapt, adapt_and_score, adapt_all, their gradients,
// meta_step and reptile_step.
#pragma once

#include "dialect.h"
#include "problem.h"

namespace metarec_fast::cuda {

template <typename scalar_t, typename table_t>
struct AdaptWork {
  Problem<scalar_t, table_t> problem;
  QueryData<scalar_t> query;
  GradientData<scalar_t> grads;
  scalar_t* records;            // [teams of all launches, RecordLayout::size], or nullptr
  const scalar_t* item_shares;  // of kMove: what each support entry's item counts [n]
  const scalar_t* grad_rows;    // of kGiven: what arrives at adapted items' rows [n, D], or nullptr
  const scalar_t* grad_biases;  // [n]
  scalar_t *rows_out, *biases_out;  // adapted items: [n, D], [n], or nullptr
  int* hit_places;                  // of the query's candidates [n · (1 + M)]: which item of the
                                    // support each is, or −1
  scalar_t* hit_grads;              // their p̄
  Launch launch;
};

constexpr int kThreads = 128;  // of a block, at most
// At least so many blocks at once, which bounds their registers.
template <typename scalar_t, bool kNarrow>
constexpr int kLeastBlocks = kNarrow                             ? 5
                             : sizeof(scalar_t) == sizeof(float) ? 3
                                                                 : 2;
constexpr int kMostTeams = kThreads / kWarpSize;
constexpr int kLargestTeam = kThreads / kWarpSize;  // warps

// How many blocks run at once, and launches them.
template <typename scalar_t, typename table_t>
int64_t resident_adapt_blocks(const AdaptWork<scalar_t, table_t>& work, size_t shared_bytes);
template <typename scalar_t, typename table_t>
const char* launch_adapt(const AdaptWork<scalar_t, table_t>& work, int64_t blocks,
                         size_t shared_bytes, cudaStream_t stream);

}  // namespace metarec_fast::cuda
