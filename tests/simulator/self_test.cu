// Scores of a user for the rows of each task, p[t, s] = u · e[items[t, s]], and their sum over
// everything: by a warp per task and by a block per task, with faults to choose from. Its `main`
// says whether the numbers are right, what the simulator found, or nothing, where a sanitizer ends
// it.
//   self_test KERNEL FAULT
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_simulator.h"

namespace {

using namespace metarec_fast;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kDim = 64, kRows = 5, kTasks = 6, kItems = 20, kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTile = kRows * kDim;

// They are numbered in the order of FAULTS in tests/test_simulator.py.
enum Fault {
  kNone,
  kNoWarpBarrier,
  kNoBlockBarrier,
  kShuffleInBranch,
  kPastShared,
  kPastGlobal,
  kRaceAcrossBlocks,
  kMisaligned,
  kUninitialised,
  kLanesLeave,
  kWrongMask,
  kThreadsLeave,
  kOverflow,
  kDivergentBarrier,
  kShuffleAsBarrier,
  kTooMuchShared
};

struct Problem {
  const float* table;    // [kItems, kDim]
  const int64_t* items;  // [kTasks, kRows]
  const float* user;     // [kDim]
  float* scores;         // [kTasks, kRows]
  float* total;          // [1]
  Fault fault;
};

__device__ float warp_sum(float value, unsigned mask = kAllLanes) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
  return value;
}

__device__ void add_to_total(const Problem& p, float score) {
  if (p.fault == kRaceAcrossBlocks)
    *p.total += score;
  else
    atomicAdd(p.total, score);
}

__device__ const float* row_of(const Problem& p, int task, int s) {
  const int64_t item = p.items[task * kRows + s];
  if (p.fault == kOverflow) return p.table + static_cast<int>(item) * 100000000 * kDim;
  return p.table + item * kDim + (p.fault == kMisaligned ? s % 2 : 0);
}

// One warp owns one task; its rows sit in shared memory, lane j reads what lanes 4 j … have
// written.
__global__ void warp_per_task(Problem p) {
  CUDA_DYNAMIC_SHARED(float, rows);
  const int lane = threadIdx.x % 32, task = blockIdx.x * kWarps + threadIdx.x / 32;
  if (task >= kTasks) return;
  if (p.fault == kLanesLeave && lane >= 20) return;
  float* tile = rows + threadIdx.x / 32 * kTile;
  for (int s = 0; s < kRows; ++s)
    if (lane < kDim / 4)
      reinterpret_cast<float4*>(tile + s * kDim)[lane] =
          reinterpret_cast<const float4*>(row_of(p, task, s))[lane];
  if (p.fault == kShuffleAsBarrier) warp_sum(1.0f);
  if (p.fault != kShuffleAsBarrier && p.fault != kNoWarpBarrier) __syncwarp();
  const int past = p.fault == kPastShared ? kWarps * kTile : 0;
  for (int s = 0; s < kRows; ++s) {
    float score = p.user[lane] * tile[s * kDim + lane + past] +
                  p.user[lane + 32] * tile[s * kDim + lane + 32];
    if (p.fault == kShuffleInBranch) {
      if (lane < 16) score = warp_sum(score);
    } else {
      score = warp_sum(score, p.fault == kWrongMask ? 0xffffu : kAllLanes);
    }
    if (lane != 0) continue;
    p.scores[task * kRows + s] = score;
    add_to_total(p, score);
  }
}

// One block owns one task; thread j holds column j, and the first threads sum the products of a
// row.
__global__ void block_per_task(Problem p) {
  CUDA_SHARED(float, user, kDim);
  CUDA_SHARED(float, products, kTile);
  CUDA_SHARED(float, more, 8 * 1024);
  const int j = threadIdx.x, task = blockIdx.x;
  if (p.fault == kThreadsLeave && j >= kDim) return;
  if (p.fault != kUninitialised && j < kDim) user[j] = p.user[j];
  if (p.fault == kTooMuchShared) {
    CUDA_SHARED(float, still_more, 8 * 1024);
    still_more[j] = more[j] = 0;
  }
  __syncthreads();
  for (int i = j; i < kTile; i += kThreads)
    products[i] = user[i % kDim] * row_of(p, task, i / kDim)[i % kDim];
  if (p.fault == kDivergentBarrier && j < kDim)
    __syncthreads();
  else if (p.fault != kNoBlockBarrier)
    __syncthreads();
  if (j >= kRows) return;
  float score = 0;
  for (int i = 0; i < kDim; ++i) score += products[j * kDim + i];
  p.scores[task * kRows + j + (p.fault == kPastGlobal ? kTasks * kRows : 0)] = score;
  add_to_total(p, score);
}

const char* launch(bool by_block, const Problem& p) {
  if (by_block)
    return cuda::launch("block_per_task", block_per_task, dim3(kTasks), dim3(kThreads), 0, nullptr,
                        p);
  return cuda::launch("warp_per_task", warp_per_task, dim3((kTasks + kWarps - 1) / kWarps),
                      dim3(kThreads), kWarps * kTile * sizeof(float), nullptr, p);
}

}  // namespace

int main(int, char** arguments) {
  const bool by_block = std::atoi(arguments[1]);
  std::vector<float> table(kItems * kDim), user(kDim), scores(kTasks * kRows), total(1);
  std::vector<int64_t> items(kTasks * kRows);
  for (size_t i = 0; i < table.size(); ++i) table[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < user.size(); ++i) user[i] = std::cos(static_cast<float>(i));
  for (size_t i = 0; i < items.size(); ++i) items[i] = (7 * i + 19) % kItems;

  const auto fault = static_cast<Fault>(std::atoi(arguments[2]));
  const Problem problem{table.data(),  items.data(), user.data(),
                        scores.data(), total.data(), fault};
  if (const char* error = launch(by_block, problem)) {
    std::printf("%s\n", error);
    return 3;
  }

  double sum = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    double score = 0;
    for (int j = 0; j < kDim; ++j) score += double{user[j]} * table[items[i] * kDim + j];
    sum += score;
    if (!(std::fabs(scores[i] - score) < 1e-5)) {
      std::printf("score %zu: expected %g, got %g\n", i, score, scores[i]);
      return 2;
    }
  }
  if (std::fabs(sum - total[0]) < 1e-4) return 0;
  std::printf("sum: expected %g, got %g\n", sum, total[0]);
  return 2;
}
