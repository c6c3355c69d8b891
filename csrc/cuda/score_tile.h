// Scores of a block's users for a chunk of items,  b_i + c + u·e_i,  as a matrix product does it:
// users and items meet in shared memory, kDepth of their coordinates at a time, and every row of
// the table is read from memory once for all users of the block.
#pragma once

#include "../candidate.h"
#include "bfloat16.h"
#include "pack.h"

namespace metarec_fast::cuda {

constexpr int kWarpsPerBlock = 8;
constexpr int kScoringThreads = kWarpsPerBlock * kWarpSize;
constexpr int kItemsPerLane = 4;
constexpr int kItemsPerChunk = kItemsPerLane * kWarpSize;
constexpr int kDepth = 32;
template <typename scalar_t>
constexpr int kBlocksAtOnce = sizeof(scalar_t) > 4 ? 2 : 3;  // of a multiprocessor
constexpr int kItemStride =
    kItemsPerChunk + 1;  // written by coordinate, read by item: no conflicts

template <typename scalar_t, typename row_t>
struct ScoreInputs {
  const scalar_t* user;       // [T, D]
  const scalar_t* user_bias;  // [T]
  const row_t* item_table;    // [N, D]
  const scalar_t* item_bias;  // [N]
  int64_t num_users, num_items, dim;
};

// Of the chunk that begins at `first`, among items up to `end`.
__device__ inline int64_t end_of_chunk(int64_t first, int64_t end) {
  return first + kItemsPerChunk < end ? first + kItemsPerChunk : end;
}

// target(row, d) = table[first + row, depth + d], or 0 where there is no such number; by the block.
template <typename number_t, typename Target>
__device__ void fetch(const number_t* table, int64_t dim, int64_t first, int64_t last, int num_rows,
                      int64_t depth, const Target& target) {
  using scalar_t = std::remove_reference_t<decltype(target(0, 0))>;
#pragma unroll 4
  for (int i = threadIdx.x; i < num_rows * kDepth; i += kScoringThreads) {
    const int row = i / kDepth, d = i % kDepth;
    const bool is_there = first + row < last && depth + d < dim;
    target(row, d) =
        is_there ? static_cast<scalar_t>(table[(first + row) * dim + depth + d]) : scalar_t{0};
  }
}

// A warp has kUsers users, a lane the items  first + lane + kWarpSize j  of all of them. It leaves
// its scores in shared memory too, which costs little and leaves it the registers for other things.
template <int kUserCount, typename scalar_type, typename row_type>
class ScoreTile {
 public:
  using scalar_t = scalar_type;
  using row_t = row_type;
  static constexpr int kUsers = kUserCount;
  static constexpr int kUsersPerBlock = kUsers * kWarpsPerBlock;
  static constexpr int kNumbers = (kUsersPerBlock + kItemStride) * kDepth;  // of shared memory

  __device__ ScoreTile(const ScoreInputs<scalar_t, row_t>& inputs, scalar_t* memory)
      : inputs_(inputs), users_(memory), items_(memory + kUsersPerBlock * kDepth) {}

  // For users from `first_user` on and items [first, last), at most a chunk. The whole block calls
  // it.
  __device__ void score(int64_t first_user, int64_t first, int64_t last) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    scalar_t scores[kUsers][kItemsPerLane] = {};
    for (int64_t depth = 0; depth < inputs_.dim; depth += kDepth) {
      __syncthreads();  // nobody reads what was there
      fetch(inputs_.user, inputs_.dim, first_user, inputs_.num_users, kUsersPerBlock, depth,
            [&](int user, int d) -> scalar_t& { return users_[user * kDepth + d]; });
      fetch(inputs_.item_table, inputs_.dim, first, last, kItemsPerChunk, depth,
            [&](int item, int d) -> scalar_t& { return items_[d * kItemStride + item]; });
      __syncthreads();
      const scalar_t* user = users_ + warp * kUsers * kDepth;
      const scalar_t* item = items_ + lane;
      for (int64_t d = 0; d < kDepth && depth + d < inputs_.dim; d += kPack) {
        Pack<scalar_t, kPack> coordinates[kUsers];
#pragma unroll
        for (int u = 0; u < kUsers; ++u)
          coordinates[u] = load<Pack<scalar_t, kPack>>(user + u * kDepth + d);
#pragma unroll
        for (int i = 0; i < kPack; ++i)
#pragma unroll
          for (int j = 0; j < kItemsPerLane; ++j) {
            const scalar_t coordinate = item[(d + i) * kItemStride + kWarpSize * j];
#pragma unroll
            for (int u = 0; u < kUsers; ++u) scores[u][j] += coordinates[u].values[i] * coordinate;
          }
      }
    }

    __syncthreads();  // nobody reads what was there
#pragma unroll
    for (int j = 0; j < kItemsPerLane; ++j) {
      const int64_t item = first + lane + kWarpSize * j;
      const scalar_t bias = item < last ? inputs_.item_bias[item] : scalar_t{0};
#pragma unroll
      for (int u = 0; u < kUsers; ++u) {
        const int64_t t = first_user + warp * kUsers + u;
        const scalar_t constant = t < inputs_.num_users ? inputs_.user_bias[t] : scalar_t{0};
        *place(u, j) = as_number(scores[u][j] + bias + constant);
      }
    }
  }

  // The score of the warp's user u and the lane's item j; garbage where there is no such item.
  __device__ scalar_t at(int u, int j) const { return *place(u, j); }

 private:
  static_assert(kUsersPerBlock * kItemsPerChunk <= kItemStride * kDepth);
  static constexpr int kPack = kWidestPack<scalar_t>;
  static_assert(kDepth % kPack == 0);

  __device__ scalar_t* place(int u, int j) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return items_ + (warp * kUsers + u) * kItemsPerChunk + lane + kWarpSize * j;
  }

  ScoreInputs<scalar_t, row_t> inputs_;
  scalar_t* users_;  // [kUsersPerBlock, kDepth]
  scalar_t* items_;  // [kDepth, kItemStride], and then scores [kUsersPerBlock, kItemsPerChunk]
};

}  // namespace metarec_fast::cuda
