// One task as the inner loop sees it: its rows in the team's scratch, and products with them.
//
// Rows are shared out over the team's groups of lanes, always in the same way, so that a group
// meets the same rows again; what belongs to a row is one number of an array in scratch.
#pragma once

#include <cmath>

#include "columns.h"
#include "scratch.h"

namespace metarec_fast::cuda {

// What the loss formulas want to know of a number.
template <typename scalar_type>
struct ScalarMath {
  using scalar_t = scalar_type;
  // Of −|p|, so that nothing overflows.
  __device__ __forceinline__ static scalar_t sigmoid(scalar_t p) {
    const scalar_t small = std::exp(-std::fabs(p));
    return (p < 0 ? small : scalar_t{1}) / (1 + small);
  }
  __device__ __forceinline__ static scalar_t softplus(scalar_t p) {
    return (p > 0 ? p : scalar_t{0}) + std::log1p(std::exp(-std::fabs(p)));
  }
  __device__ __forceinline__ static scalar_t one() { return 1; }
};

template <typename scalar_type, typename table_type, int kChunkCount, bool kIsPlain>
struct Task {
  using scalar_t = scalar_type;
  using table_t = table_type;
  static constexpr int kChunks = kChunkCount;
  static constexpr bool kPlain = kIsPlain;  // see Way
  using Fast = Vector<scalar_t, kChunks>;
  // Rows under way at once.
  static constexpr int kAtOnce = kChunks == 1 ? 4 : 2;

  const Problem<scalar_t, table_t>& problem;
  const Team team;
  const Columns<kChunks> columns;
  const Scratch<scalar_t> scratch;
  int group;          // rows of an entry
  scalar_t row_bias;  // what is appended to a row: 1, to a difference 0

  __device__ __forceinline__ Task(const Problem<scalar_t, table_t>& problem_in,
                                  const Scratch<scalar_t>& scratch_in, const Team& team_in)
      : problem(problem_in),
        team(team_in),
        columns(problem_in.shape, team_in.lane),
        scratch(scratch_in) {
    group = kPlain ? 1 : static_cast<int>(problem.support.group(problem.loop.loss));
    row_bias = differences() ? 0 : 1;
  }

  __device__ __forceinline__ int64_t index() const { return scratch.facts.index; }
  __device__ __forceinline__ int64_t begin() const { return scratch.facts.begin; }
  __device__ __forceinline__ int entries() const { return scratch.facts.entries; }
  __device__ __forceinline__ int rows() const { return scratch.facts.rows; }
  __device__ __forceinline__ scalar_t mean() const { return scratch.facts.mean; }
  __device__ __forceinline__ scalar_t pull() const {
    return kPlain ? scalar_t{0} : scratch.facts.pull;
  }

  // What a plain loop has not.
  __device__ __forceinline__ bool differences() const {
    return !kPlain && problem.loop.loss == Loss::kBpr;
  }
  __device__ __forceinline__ bool shares() const {  // a softmax
    return !kPlain && problem.loop.loss == Loss::kSoftmax;
  }
  __device__ __forceinline__ bool scaled() const {
    return !kPlain && problem.loop.preconditioner != nullptr;
  }
  __device__ __forceinline__ bool pulled() const {
    return !kPlain && problem.loop.prior_pull.values != nullptr;
  }
  __device__ __forceinline__ bool moves_on() const {
    return !kPlain && problem.loop.momentum.values != nullptr;
  }
  __device__ __forceinline__ scalar_t momentum(int k) const {
    return kPlain ? scalar_t{0} : problem.loop.momentum[k];
  }

  // Calls body(r) in each group of lanes for the rows that are its own; no warp intrinsics within.
  template <typename Body>
  __device__ __forceinline__ void each_own(int count, const Body& body) const {
#pragma unroll 1
    for (int r = team.warp * columns.groups() + columns.group; r < count;
         r += team.warps * columns.groups())
      body(r);
  }

  // Calls body(r) in one thread for each r.
  template <typename Body>
  __device__ __forceinline__ void each(int count, const Body& body) const {
#pragma unroll 1  // mostly one: a thread for each
    for (int r = team.thread(); r < count; r += team.size()) body(r);
  }

  __device__ __forceinline__ scalar_t* row(int r) const {
    return scratch.rows() + r * columns.width();
  }

  __device__ __forceinline__ Fast load_item(int64_t item) const {
    Fast result;
    columns.load_row(problem.item_table + item * problem.shape.dim, problem.packed_table, result);
    result.bias = 0;
    return result;
  }

  __device__ __forceinline__ Fast load_kept(const scalar_t* rows, const scalar_t* biases,
                                            int k) const {
    Fast result;
    columns.load(rows + k * columns.width(), result);
    result.bias = biases[k];
    return result;
  }
  // By one group of the team; the others read it only after a sync.
  __device__ __forceinline__ void keep(const Fast& vector, scalar_t* rows, scalar_t* biases,
                                       int k) const {
    if (team.warp != 0 || columns.group != 0) return;
    columns.store(vector, rows + k * columns.width());
    if (columns.lane == 0) biases[k] = vector.bias;
  }

  // φ_0
  __device__ __forceinline__ Fast start() const {
    Fast result;
    columns.load_row(problem.user_init + index() * problem.user_stride, /*packed=*/false, result);
    result.bias = problem.user_bias_init[index() * problem.bias_stride];
    return result;
  }

  // A
  __device__ __forceinline__ Fast scale() const {
    if (!scaled()) return Fast::filled(1);
    Fast result;
    columns.load_row(problem.loop.preconditioner, /*packed=*/false, result);
    result.bias = problem.loop.preconditioner[problem.shape.dim];
    return result;
  }

  // Gathers the task of the facts; afterwards the team is in step.
  __device__ __forceinline__ void read() const {
    read_numbers();
#pragma unroll 2
    for (int r = team.warp * columns.groups() + columns.group; r < rows();
         r += team.warps * columns.groups()) {
      const int64_t entry = begin() + (kPlain ? r : r / group);
      const int j = kPlain ? 0 : r % group;
      Fast vector = load_item(problem.support.candidate(entry, differences() ? 0 : j));
      if (differences()) vector.add(-1, load_item(problem.support.candidate(entry, j + 1)));
      columns.store(vector, row(r));
    }
    team.sync();
  }

  // Asks for the rows of entries that will be read soon.
  __device__ __forceinline__ void prefetch(const EntryData<scalar_t>& entries, int64_t t) const {
    constexpr int kLine = 128;
    const int64_t bytes = problem.shape.dim * sizeof(table_t);
    const int64_t candidates = kPlain ? 1 : entries.candidates();
#pragma unroll 1
    for (int64_t e = entries.begin(t) + team.thread(); e < entries.begin(t + 1); e += team.size())
      for (int64_t j = 0; j < candidates; ++j) {
        const table_t* row = problem.item_table + entries.candidate(e, j) * problem.shape.dim;
        for (int64_t at = 0; at < bytes; at += kLine)
          prefetch_line(reinterpret_cast<const char*>(row) + at);
      }
  }

  // What belongs to the rows, a thread for each.
  __device__ __forceinline__ void read_numbers() const {
    const EntryData<scalar_t>& support = problem.support;
    each(rows(), [&](int r) {
      const int64_t entry = begin() + (kPlain ? r : r / group);
      const int j = kPlain ? 0 : r % group;
      scalar_t weight = problem.weights == nullptr ? 1 : problem.weights[entry];
      scalar_t base = problem.item_bias[support.candidate(entry, differences() ? 0 : j)];
      scalar_t target = 1;  // of a difference, and of an entry's own item
      if (differences()) {
        base -= problem.item_bias[support.candidate(entry, j + 1)];
        weight /= static_cast<scalar_t>(group);  // the mean over the negatives
      } else {
        base += *problem.offset;
        if (!shares())
          target = problem.targets[entry];
        else if (j > 0)
          target = 0;
      }
      if (!kPlain && support.log_q != nullptr) base -= support.log_q[entry * group + j];
      scratch.base()[r] = base;
      scratch.weights()[r] = weight;
      scratch.targets()[r] = target;
    });
  }

  // Calls sink(r, x_r · v) in one thread for each of `count` rows, v's bias and the rows' included.
  template <typename Sink>
  __device__ __forceinline__ void dots(const Fast& v, int count, const Sink& sink) const {
    const int stride = team.warps * columns.groups();
    const scalar_t bias = row_bias * v.bias;
#pragma unroll 1
    for (int first = team.warp * columns.groups(); first < count; first += kAtOnce * stride) {
      scalar_t sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = first + i * stride + columns.group;
        Fast x = Fast::zero();
        if (r < count) columns.load(row(r), x);
        sums[i] = x.dot(v);
      }
      const scalar_t sum = columns.sums(sums);
      const int own = first + columns.lane * stride + columns.group;
      if (columns.lane < kAtOnce && own < count) sink(own, sum + bias);
    }
  }

  // Σ_r weight[r] (x_r, row_bias), for all threads. What it reads must have been written before a
  // sync; it ends in one if there are several warps.
  __device__ __forceinline__ Fast combine(const scalar_t* weight, int count) const {
    Fast sum = Fast::zero();
    const int stride = team.warps * columns.groups();
#pragma unroll 4
    for (int r = team.warp * columns.groups() + columns.group; r < count; r += stride) {
      Fast x;
      columns.load(row(r), x);
      x.bias = row_bias;
      sum.add(weight[r], x);
    }
    return sum_team(sum);
  }

  // The sum over all groups of the team.
  __device__ __forceinline__ Fast sum_team(Fast vector) const {
    columns.sum_groups(vector);
    if (team.warps == 1) return vector;
    const int stride = columns.width() + kPack;
    scalar_t* own = scratch.partial() + team.warp * stride;
    if (columns.group == 0) {
      columns.store(vector, own);
      if (columns.lane == 0) own[columns.width()] = vector.bias;
    }
    team.sync();
    Fast sum = Fast::zero();
#pragma unroll 1
    for (int w = 0; w < team.warps; ++w) {
      const scalar_t* part = scratch.partial() + w * stride;
      Fast other;
      columns.load(part, other);
      other.bias = part[columns.width()];
      sum.add(1, other);
    }
    team.sync();
    return sum;
  }

  // The whole dot product of two vectors that all threads hold.
  __device__ __forceinline__ scalar_t dot(const Fast& a, const Fast& b) const {
    return columns.sum(a.dot(b)) + a.bias * b.bias;
  }

  // π = softmax of an entry's scores; by one thread.
  __device__ __forceinline__ void softmax(const scalar_t* scores, scalar_t* probabilities) const {
    scalar_t most = scores[0], total = 0;
    for (int j = 1; j < group; ++j) most = scores[j] > most ? scores[j] : most;
    for (int j = 0; j < group; ++j) total += probabilities[j] = std::exp(scores[j] - most);
    for (int j = 0; j < group; ++j) probabilities[j] /= total;
  }

  // push = w ∘ ℓ'/(S + n0) at `scores`, and what `bend` needs to know of ℓ'': w ℓ''/(S + n0), for
  // softmax π. Ends in step.
  __device__ __forceinline__ void differentiate(const scalar_t* scores, scalar_t* push,
                                                scalar_t* curvature) const {
    team.sync();
    const Loss loss = problem.loop.loss;
    if (shares())
      each(entries(), [&](int s) {
        softmax(scores + s * group, curvature + s * group);
        for (int r = s * group; r < (s + 1) * group; ++r)
          push[r] = mean() * scratch.weights()[r] * (curvature[r] - scratch.targets()[r]);
      });
    else
      each(rows(), [&](int r) {
        differentiate_loss<ScalarMath<scalar_t>>(loss, mean() * scratch.weights()[r], scores[r],
                                                 scratch.targets()[r], push[r], curvature[r]);
      });
    team.sync();
  }

  // result = −rate w/(S + n0) ∘ H along,  H the Hessian of ℓ in the scores, and
  // w̄ −= rate ℓ'/(S + n0) ∘ along. Ends in step.
  __device__ __forceinline__ void bend(const scalar_t* push, const scalar_t* curvature,
                                       scalar_t rate, const scalar_t* along, scalar_t* result,
                                       bool weights_too) const {
    team.sync();
    if (weights_too)
      each(rows(), [&](int r) {
        scratch.grad_weights()[r] -= rate * push[r] / scratch.weights()[r] * along[r];
      });
    if (!shares()) {
      each(rows(), [&](int r) { result[r] = -rate * curvature[r] * along[r]; });
    } else {
      each(entries(), [&](int s) {  // (diag(π) − ππᵀ) along
        const int first = s * group;
        scalar_t average = 0;
        for (int r = first; r < first + group; ++r) average += curvature[r] * along[r];
        for (int r = first; r < first + group; ++r)
          result[r] = -rate * mean() * scratch.weights()[r] * curvature[r] * (along[r] - average);
      });
    }
    team.sync();
  }
};

// Of a team, see RecordLayout; vectors by the lanes that own columns, numbers by the first thread.
template <typename TaskType>
struct Record {
  using scalar_t = typename TaskType::scalar_t;
  const TaskType& task;
  const RecordLayout at;

  __device__ __forceinline__ Record(const TaskType& task_in, int steps)
      : task(task_in), at{task_in.columns.width(), steps} {}

  __device__ __forceinline__ scalar_t* values() const { return task.scratch.record(); }
  // Whether this thread adds numbers, columns.
  __device__ __forceinline__ bool leads() const { return task.team.leads(); }
  __device__ __forceinline__ bool owns() const {
    return task.team.warp == 0 && task.columns.group == 0;
  }

  __device__ __forceinline__ void add(int place, scalar_t value) const {
    if (leads()) values()[place] += value;
  }
  __device__ __forceinline__ void add_vector(int place,
                                             const typename TaskType::Fast& vector) const {
    if (!owns()) return;
    typename TaskType::Fast sum;
    task.columns.load(values() + place, sum);
    sum.add(1, vector);
    task.columns.store(sum, values() + place);
    if (leads()) values()[place + task.columns.width()] += vector.bias;
  }
};

}  // namespace metarec_fast::cuda
