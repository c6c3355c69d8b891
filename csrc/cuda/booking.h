// Where a team finds its tasks, and where it puts what they yield.
#pragma once

#include "adapt.h"
#include "task.h"

namespace metarec_fast::cuda {

// From w̄ of the rows, in scratch, to that of the entries.
template <typename TaskType>
__device__ __forceinline__ void write_weights(
    const TaskType& task, const GradientData<typename TaskType::scalar_t>& grads) {
  using scalar_t = typename TaskType::scalar_t;
  if (grads.support_weights == nullptr) return;
  const bool differences = task.differences();
  task.each(task.entries(), [&](int s) {
    scalar_t sum = 0;
#pragma unroll 1
    for (int j = 0; j < task.group; ++j) sum += task.scratch.grad_weights()[s * task.group + j];
    grads.support_weights[task.begin() + s] =
        differences ? sum / static_cast<scalar_t>(task.group) : sum;
  });
}

// Writes `row_of(r)`, X̄ of row r, for all rows, and b̄ from scratch, to the items that the rows are
// made of.
template <typename TaskType, typename RowOf>
__device__ __forceinline__ void write_support_rows(
    const TaskType& task, const GradientData<typename TaskType::scalar_t>& grads,
    const RowOf& row_of) {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  if (grads.item_rows == nullptr || !grads.places.support) return;
  const auto write = [&](int64_t entry, int64_t j, const Fast& row) {
    const int64_t place = grads.places.of_support(entry, j);
    task.columns.store_row(row, grads.packed_rows,
                           grads.item_rows + place * task.problem.shape.dim);
    if (task.columns.lane != 0) return;
    grads.item_biases[place] = row.bias;
    grads.item_ids[place] = task.problem.support.candidate(entry, j);
  };
  const auto row_and_bias = [&](int r) {
    Fast row = row_of(r);
    row.bias = task.scratch.grad_base()[r];
    return row;
  };
  if (!task.differences()) {
    task.each_own(task.rows(), [&](int r) {
      write(task.begin() + r / task.group, r % task.group, row_and_bias(r));
    });
    return;
  }
  task.each_own(task.entries(), [&](int s) {  // differences: e⁺ − e⁻
    Fast own = Fast::zero();
    for (int j = 0; j < task.group; ++j) {
      Fast row = row_and_bias(s * task.group + j);
      own.add(1, row);
      row.update([](scalar_t value) { return -value; });
      write(task.begin() + s, j + 1, row);
    }
    write(task.begin() + s, 0, own);
  });
}

// The team's place among all teams, and its scratch. Kernels for narrow rows are only launched
// where that fits into shared memory.
template <typename scalar_t, bool kAlwaysShared>
struct TeamPlace {
  int in_block;
  int64_t team, num_teams;
  scalar_t* memory;

  __device__ __forceinline__ TeamPlace(const Launch& launch, scalar_t* shared) {
    in_block = launch.teams_per_block == 1 ? 0 : static_cast<int>(threadIdx.x) / kWarpSize;
    team = int64_t{blockIdx.x} * launch.teams_per_block + in_block;
    num_teams = int64_t{gridDim.x} * launch.teams_per_block;
    const int size = static_cast<int>(launch.scratch.size);
    memory = shared + in_block * size;
    if (!kAlwaysShared && launch.workspace != nullptr)
      memory = static_cast<scalar_t*>(launch.workspace) + team * size;
  }
};

// φ̄_0 and m̄ of a task.
template <typename TaskType>
__device__ __forceinline__ void book_start(const TaskType& task, const Record<TaskType>& record,
                                           const GradientData<typename TaskType::scalar_t>& grads,
                                           const typename TaskType::Fast& start) {
  if (!grads.wanted.start()) return;
  if (grads.user_init != nullptr && record.owns())
    task.columns.store_row(start, /*packed=*/false,
                           grads.user_init + task.index() * task.problem.shape.dim);
  if (grads.user_bias_init != nullptr && record.leads())
    grads.user_bias_init[task.index()] = start.bias;
  record.add_vector(record.at.start(), start);
}

// φ_K, if it is asked for.
template <typename TaskType>
__device__ __forceinline__ void write_fast(const TaskType& task, const Record<TaskType>& record,
                                           const QueryData<typename TaskType::scalar_t>& query,
                                           const typename TaskType::Fast& fast) {
  if (query.user == nullptr || !record.owns()) return;
  task.columns.store_row(fast, /*packed=*/false,
                         query.user + task.index() * task.problem.shape.dim);
  if (record.leads()) query.bias[task.index()] = fast.bias;
}

// φ̄_K as far as it is given; else 0.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::Fast given_gradient(
    const TaskType& task, const QueryData<typename TaskType::scalar_t>& query) {
  typename TaskType::Fast grad = TaskType::Fast::zero();
  if (query.ask != Ask::kGiven) return grad;
  task.columns.load_row(query.grad_user + task.index() * task.problem.shape.dim, /*packed=*/false,
                        grad);
  grad.bias = query.grad_bias[task.index()];
  return grad;
}

// Reptile's φ_0 − φ_K, by the task's share.
template <typename TaskType, typename Work>
__device__ __forceinline__ void book_move(const TaskType& task, const Record<TaskType>& record,
                                          const Work& work, const typename TaskType::Fast& fast) {
  using scalar_t = typename TaskType::scalar_t;
  const scalar_t share = work.query.task_weight(task.index()) * work.query.normalisers[0];
  typename TaskType::Fast moved = task.start();
  moved.update([=](scalar_t before, scalar_t after) { return share * (before - after); }, fast);
  book_start(task, record, work.grads, moved);
}

// ρ̄ is added to the record by the forms; where every task has its own, it is taken out again.
template <typename TaskType>
__device__ __forceinline__ void book_pull(const TaskType& task, const Record<TaskType>& record,
                                          const GradientData<typename TaskType::scalar_t>& grads) {
  if (grads.prior_pull == nullptr || !record.leads()) return;
  grads.prior_pull[task.index()] = record.values()[record.at.pull()];
  record.values()[record.at.pull()] = 0;
}

// Σ w ℓ(p, y) / Σ w of the support at `scores` in scratch, written before a sync.
template <typename TaskType>
__device__ __forceinline__ typename TaskType::scalar_t support_loss(const TaskType& task,
                                                                    const OuterLoss& loss) {
  using scalar_t = typename TaskType::scalar_t;
  const Scratch<scalar_t>& scratch = task.scratch;
  scalar_t sum = 0, total = 0;
  task.each(task.rows(), [&](int r) {
    scalar_t value, slope;
    judge_point<ScalarMath<scalar_t>>(loss, scratch.scores()[r], scratch.targets()[r], value,
                                      slope);
    sum += scratch.weights()[r] * value;
    total += scratch.weights()[r];
  });
  sum = task.team.sum(sum, scratch.partial());
  total = task.team.sum(total, scratch.partial());
  return sum / total;
}

// Runs the tasks of this team that the launch takes, each read into scratch; the team's record of
// their sums goes out at the end.
template <typename Runner, typename Work>
__device__ __forceinline__ void run_tasks(const Work& work,
                                          typename Runner::TaskType::scalar_t* shared) {
  using TaskType = typename Runner::TaskType;
  using scalar_t = typename TaskType::scalar_t;
  const Launch& launch = work.launch;
  const auto& problem = work.problem;
  const TeamPlace<scalar_t, TaskType::kChunks == 1> place(launch, shared);
  const Team team(launch.warps);
  CUDA_SHARED(Facts<scalar_t>, facts_of_teams, kMostTeams);
  Facts<scalar_t>& facts = facts_of_teams[place.in_block];
  const TaskType task(problem, {place.memory, launch.scratch, facts}, team);
  const int steps = problem.loop.exact() ? 0 : static_cast<int>(problem.loop.steps);
  const Record<TaskType> record(task, steps);
  task.each(record.at.size(), [&](int i) { record.values()[i] = 0; });
  for (int64_t t = place.team; t < problem.num_tasks; t += place.num_teams) {
    const int64_t rows = problem.support.size(t) * task.group;
    if (rows > problem.most_rows) __trap();  // nobody would take it
    if (rows < launch.fewest_rows || rows > launch.most_rows) continue;
    team.sync();  // the task before has been read to its end
    if (team.leads()) {
      const int entries = static_cast<int>(rows) / task.group;
      const scalar_t count = static_cast<scalar_t>(entries) + problem.loop.extra_count;
      facts = {t,
               problem.support.begin(t),
               entries,
               static_cast<int>(rows),
               entries == 0 ? 0 : 1 / count,
               problem.loop.prior_pull[t]};
    }
    team.sync();
    task.read();
    if (t + place.num_teams < problem.num_tasks) {
      task.prefetch(problem.support, t + place.num_teams);
      if (work.query.ask != Ask::kNothing && work.query.ask != Ask::kMove)
        task.prefetch(work.query.entries, t + place.num_teams);
    }
    Runner{work, task, record}.run();
  }
  team.sync();
  if (work.records != nullptr) {
    scalar_t* out = work.records + (launch.first_record + place.team) * record.at.size();
    task.each(record.at.size(), [&](int i) { out[i] = record.values()[i]; });
  }
}

}  // namespace metarec_fast::cuda
