// What a launch of the kernels of an MLP tower is given. They stand behind mlp_adapt_and_score, its
// gradient, and mlp_meta_step.
#pragma once

#include "../activations.h"
#include "../tower_rates.h"
#include "dialect.h"
#include "problem.h"

namespace metarec_fast::cuda {

constexpr int kMostLayers = 16;
constexpr int kQueryRows = 32;  // of a task's query, at once, if an entry does not have more

// Layers l = 1 … L, and where the numbers of each are.
struct TowerShape {
  int depth;                       // L
  int width[kMostLayers + 1];      // n_0 … n_L
  int weight_at[kMostLayers + 1];  // W_l among the parameters; b_l is behind it
  int unit_at[kMostLayers + 1];    // n_1 + … + n_{l−1}
  int units;                       // n_1 + … + n_L
  int size;                        // of all parameters

  HOST_DEVICE int bias_at(int l) const { return weight_at[l] + width[l] * width[l - 1]; }
};

// Where the arrays of a block's scratch begin, and how many numbers they are. The task has S rows
// of support items and negatives, of which the launch knows the most; of its query's there are C at
// once. What is [·, units] has layer after layer, each [·, n_l]; steps that nobody goes back to
// share a place.
struct TowerScratch {
  int64_t size;
  int own_size;           // b_1 and layers 2 … L, or all of them if layer 1 is a task's own too
  int step;               // numbers from a step's activations to the next one's
  int inputs;             // X [S, n_0]
  int gram;               // G = X Xᵀ [S, S]
  int first;              // X W_1ᵀ [S, n_1]
  int coefficients;       // A [S, n_1]
  int hidden, delta;      // H, Δ [K, S, units]
  int slopes, bends;      // σ'(Z), (Δ_{l+1} W_{l+1}) ∘ σ''(Z), of gelu
  int curvatures;         // c ℓ''(p) [K, S]
  int weights;            // after a step, as the parameters lie [K, own_size]
  int grad_weights;       // M, m [own_size]
  int grad_delta;         // D [S, units]
  int grad_hidden;        // H̄, then Z̄ [S, units]
  int along;              // E [S, widest]
  int grad_coefficients;  // Ā [S, n_1]
  int grad_first;         // Σ_k Z̄_1 [S, n_1]
  int grad_gram;          // Ḡ [S, S]
  int grad_inputs;        // X̄ [S, n_0]
  int query_inputs;       // X_q [C, n_0]
  int query_hidden, query_delta, query_slopes;  // [C, units]
  int cross;                                    // G_q = X_q Xᵀ, later Ḡ_q [C, S]
  int grad_query_inputs;                        // X̄_q [C, n_0]
};

// Which tasks a launch takes, by the rows of their support, and what it needs for each.
struct TowerLaunch {
  int64_t fewest_rows, most_rows;
  bool own_first;  // layer 1 is a task's own, as deeper layers are
  TowerScratch scratch;
  void* workspace;       // [blocks, scratch.size] where shared memory is too small, or nullptr
  int64_t first_record;  // of the launch's blocks
};

// The sums that a block keeps of what tasks share: of the parameters, step sizes and the loss.
struct TowerRecord {
  int parameters, rates;

  HOST_DEVICE int rates_at() const { return parameters; }
  HOST_DEVICE int loss_at() const { return parameters + rates; }
  HOST_DEVICE int size() const { return parameters + rates + 1; }
};

template <typename scalar_t>
struct TowerWork {
  TowerShape shape;
  const scalar_t* user_part;   // [T, Du]
  const scalar_t* item_table;  // [N, D]
  const scalar_t* item_bias;   // [N], added to scores, or nullptr: zeros
  const scalar_t* parameters;  // W_1, b_1, …, W_L, b_L
  int user_width, dim;
  EntryData<scalar_t> support;
  const scalar_t* targets;  // of the support, [n], or nullptr where pairs are compared
  const scalar_t* weights;  // of the support, [n], or nullptr: ones
  TowerRates<const scalar_t> inner_lr;
  int64_t num_tasks;
  int64_t most_rows;  // no task has more in its support
  int query_rows;     // C
  int steps;          // K
  Activation activation;
  Loss loss;
  bool first_order;

  QueryData<scalar_t> query;

  scalar_t* grad_user;  // [T, Du]
  scalar_t* item_rows;  // [rows, D]
  int64_t* item_ids;    // [rows]
  ItemRows places;
  TowerRecord record;
  scalar_t* records;  // [blocks of all launches, record.size()], or nullptr
  TowerLaunch launch;
};

// How many blocks run at once, and launches them.
template <typename scalar_t>
int64_t resident_tower_blocks(const TowerWork<scalar_t>& work, size_t shared_bytes);
template <typename scalar_t>
const char* launch_tower(const TowerWork<scalar_t>& work, int64_t blocks, size_t shared_bytes,
                         cudaStream_t stream);

// Where a block's arrays begin, if no task has more than S rows.
inline TowerScratch lay_out_tower(const TowerShape& shape, bool own_first, int64_t S, int64_t C,
                                  int64_t steps, bool curved, bool goes_back) {
  TowerScratch at{};
  const auto take = [&at](int64_t count) {
    const int64_t begin = at.size;
    at.size += (count + kPack - 1) / kPack * kPack;
    return static_cast<int>(begin);
  };
  const int64_t n0 = shape.width[0], n1 = shape.width[1], units = shape.units;
  const int64_t K = goes_back ? steps : steps > 0, shared = own_first ? 0 : S;
  int widest = 0;
  for (int l = 1; l <= shape.depth; ++l) widest = shape.width[l] > widest ? shape.width[l] : widest;
  at.own_size = shape.size - (own_first ? 0 : shape.bias_at(1));
  at.step = static_cast<int>(S * units);
  at.inputs = take(S * n0);
  at.gram = take(shared * S), at.first = take(shared * n1), at.coefficients = take(shared * n1);
  at.hidden = take(K * S * units), at.delta = take(K * S * units);
  at.slopes = take(curved ? K * S * units : 0);
  at.bends = take(curved && goes_back ? K * S * units : 0);
  at.curvatures = take(K * S);
  at.weights = take(K * at.own_size);
  at.query_inputs = take(C * n0);
  at.query_hidden = take(C * units);
  at.cross = take(C * shared);
  if (!goes_back) return at;
  at.query_delta = take(C * units), at.query_slopes = take(curved ? C * units : 0);
  at.grad_query_inputs = take(C * n0);
  at.grad_weights = take(at.own_size);
  at.grad_delta = take(S * units), at.grad_hidden = take(S * units), at.along = take(S * widest);
  at.grad_coefficients = take(shared * n1), at.grad_first = take(shared * n1);
  at.grad_gram = take(shared * S);
  at.grad_inputs = take(S * n0);
  return at;
}

}  // namespace metarec_fast::cuda
