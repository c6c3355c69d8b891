// A block takes task after task under an MLP tower: it adapts, scores the query part after part,
// and goes back from there; what tasks share is summed in the block's record.
#pragma once

#include "tower_task.h"

namespace metarec_fast::cuda {
namespace {

// Calls body(first, rows), with scores in rows' H_L, for each part of the query from entry `first`.
template <typename Path, typename Body>
__device__ __forceinline__ void score_query(const Path& path, const Body& body) {
  const auto& entries = path.work.query.entries;
  const int64_t begin = entries.begin(path.task), count = entries.size(path.task);
  const int candidates = static_cast<int>(entries.candidates());
  const int at_once = path.work.query_rows / candidates;
#pragma unroll 1
  for (int64_t first = 0; first < count; first += at_once) {
    const int left = count - first < at_once ? static_cast<int>(count - first) : at_once;
    const auto rows = path.query_rows(left * candidates);
    path.score(begin + first, rows);
    body(begin + first, rows);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void run_task(const TowerPath<scalar_t, false>& path, scalar_t*) {
  if (path.work.query.entries.size(path.task) == 0) return;
  path.adapt();
  const int L = path.shape.depth;
  score_query(path, [&](int64_t first, const TowerRows<scalar_t>& rows) {
    path.each(rows.count, [&](int q) { path.work.query.scores[first + q] = rows.hidden(L)[q]; });
  });
}

// What the loss of task t counts for a unit of query weight.
template <typename scalar_t>
__device__ __forceinline__ scalar_t share_of(const TowerTask<scalar_t>& task, scalar_t* of_warps) {
  const QueryData<scalar_t>& query = task.work.query;
  if (query.ask != Ask::kLoss) return 0;
  const int64_t begin = query.entries.begin(task.task);
  scalar_t total = 0;
  task.each(static_cast<int>(query.entries.size(task.task)),
            [&](int q) { total += query.weights == nullptr ? 1 : query.weights[begin + q]; });
  return query.normalisers[0] * query.task_weight(task.task) / task.team.sum(total, of_warps);
}

template <typename scalar_t>
__device__ __forceinline__ void run_task(const TowerTask<scalar_t>& task, scalar_t* record) {
  CUDA_SHARED(scalar_t, of_warps, kMatrixThreads / kWarpSize);
  const QueryData<scalar_t>& query = task.work.query;
  if (query.entries.size(task.task) == 0) return task.add_nothing();
  task.adapt();
  task.begin_adjoint();
  const int L = task.shape.depth, group = static_cast<int>(query.entries.candidates());
  const scalar_t share = share_of(task, of_warps);
  scalar_t loss = 0;
  score_query(task, [&](int64_t first, const TowerRows<scalar_t>& rows) {
    task.each(rows.count / group, [&](int i) {
      const int64_t q = first + i;
      scalar_t* grads = rows.delta(L) + i * group;
      if (query.ask == Ask::kGiven)
        grads[0] = query.grad_scores[q];
      else
        loss += judge(query.loss, query.weights == nullptr ? share : share * query.weights[q],
                      task.entry_scores(query.entries, q, rows, i),
                      query.targets == nullptr ? nullptr : query.targets + q, grads);
    });
    task.undo_score(rows, first, record);
  });
  loss = task.team.sum(loss, of_warps);
  if (task.team.leads()) record[task.work.record.loss_at()] += loss;
  task.adjoint(record);
}

// At least so many blocks at once, which bounds their registers.
template <typename scalar_t>
constexpr int kLeastTowerBlocks = sizeof(scalar_t) == sizeof(float) ? 4 : 3;

template <typename scalar_t, bool kGoesBack>
__global__ void __launch_bounds__(kMatrixThreads, kLeastTowerBlocks<scalar_t>)
    tower_kernel(const __grid_constant__ TowerWork<scalar_t> work) {
  CUDA_DYNAMIC_SHARED(scalar_t, shared);
  using Path =
      std::conditional_t<kGoesBack, TowerTask<scalar_t>, TowerPath<scalar_t, /*kGoesBack=*/false>>;
  const TowerLaunch& launch = work.launch;
  scalar_t* memory = shared;
  if (launch.workspace != nullptr)
    memory = static_cast<scalar_t*>(launch.workspace) + blockIdx.x * launch.scratch.size;
  scalar_t* record = nullptr;
  if constexpr (kGoesBack) {
    record = work.records + (launch.first_record + blockIdx.x) * work.record.size();
    for (int i = static_cast<int>(threadIdx.x); i < work.record.size(); i += kMatrixThreads)
      record[i] = 0;
  }
#pragma unroll 1
  for (int64_t t = blockIdx.x; t < work.num_tasks; t += gridDim.x) {
    const int64_t rows = work.support.size(t) * work.support.candidates();
    if (rows > work.most_rows) __trap();  // nobody would take it
    if (rows < launch.fewest_rows || rows > launch.most_rows) continue;
    run_task(Path(work, memory, t), record);
  }
}

// Calls body with the kernel.
template <typename scalar_t, typename Body>
auto with_tower_kernel(const TowerWork<scalar_t>& work, const Body& body) {
  return work.query.goes_back() ? body(tower_kernel<scalar_t, true>)
                                : body(tower_kernel<scalar_t, false>);
}

}  // namespace

template <typename scalar_t>
int64_t resident_tower_blocks(const TowerWork<scalar_t>& work, size_t shared_bytes) {
  return with_tower_kernel(
      work, [&](auto* kernel) { return resident_blocks(kernel, kMatrixThreads, shared_bytes); });
}

template <typename scalar_t>
const char* launch_tower(const TowerWork<scalar_t>& work, int64_t blocks, size_t shared_bytes,
                         cudaStream_t stream) {
  return with_tower_kernel(work, [&](auto* kernel) {
    return launch("tower", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMatrixThreads),
                  shared_bytes, stream, work);
  });
}

#define METAREC_TOWER(scalar_t)                                                                \
  template int64_t resident_tower_blocks<scalar_t>(const TowerWork<scalar_t>& work,            \
                                                   size_t shared_bytes);                       \
  template const char* launch_tower<scalar_t>(const TowerWork<scalar_t>& work, int64_t blocks, \
                                              size_t shared_bytes, cudaStream_t stream)

}  // namespace metarec_fast::cuda
