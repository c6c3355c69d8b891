// The scores of a ScoreTile, with the products on tensor cores: float32, with an error of less than
// 2⁻¹⁹ Σ_d |u_d e_d| besides that of summing.
#pragma once

#include "score_tile.h"
#include "tensor_cores.h"

namespace metarec_fast::cuda {

// The block scores the same users and items as a ScoreTile of four users a warp; each warp all
// users with its sixteen items.
template <typename row_type>
class TensorTile {
 public:
  using scalar_t = float;
  using row_t = row_type;
  static constexpr int kUsers = 4;  // of a warp, for whoever asks for scores
  static constexpr int kUsersPerBlock = kUsers * kWarpsPerBlock;
  // Lanes of a fragment read (l / 4, l % 4): by this stride from different banks.
  static constexpr int kStride = kDepth + 4;
  static constexpr int kScoreStride = kItemsPerChunk + 8;
  static constexpr int kNumbers = (kUsersPerBlock + kItemsPerChunk) * kStride;  // of shared memory

  __device__ TensorTile(const ScoreInputs<float, row_t>& inputs, float* memory)
      : inputs_(inputs), users_(memory), items_(memory + kUsersPerBlock * kStride) {}

  // As of ScoreTile.
  __device__ void score(int64_t first_user, int64_t first, int64_t last) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int g = lane / 4, i = lane % 4;
    float sums[kUserParts][kItemParts][4] = {};
    for (int64_t depth = 0; depth < inputs_.dim; depth += kDepth) {
      __syncthreads();  // nobody reads what was there
      fetch(inputs_.user, inputs_.dim, first_user, inputs_.num_users, kUsersPerBlock, depth,
            [&](int user, int d) -> float& { return users_[user * kStride + d]; });
      fetch(inputs_.item_table, inputs_.dim, first, last, kItemsPerChunk, depth,
            [&](int item, int d) -> float& { return items_[item * kStride + d]; });
      __syncthreads();
      for (int d = 0; d < kDepth && depth + d < inputs_.dim; d += 8) {
        Fragment<4> users[kUserParts];
#pragma unroll
        for (int u = 0; u < kUserParts; ++u) {
          const float* at = users_ + (16 * u + g) * kStride + d + i;
          users[u].set({at[0], at[8 * kStride], at[4], at[8 * kStride + 4]});
        }
#pragma unroll
        for (int j = 0; j < kItemParts; ++j) {
          const float* at = items_ + ((warp * kItemParts + j) * 8 + g) * kStride + d + i;
          Fragment<2> items;
          items.set({at[0], at[4]});
#pragma unroll
          for (int u = 0; u < kUserParts; ++u) {
            if constexpr (std::is_same_v<row_t, float>)  // bfloat16 leaves no rest
              multiply_add(users[u].heads, items.rests, sums[u][j]);
            multiply_add(users[u].rests, items.heads, sums[u][j]);
            multiply_add(users[u].heads, items.heads, sums[u][j]);
          }
        }
      }
    }

    __syncthreads();  // nobody reads what was there
#pragma unroll
    for (int j = 0; j < kItemParts; ++j)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int place = (warp * kItemParts + j) * 8 + 2 * i + s % 2;
        const float bias = first + place < last ? inputs_.item_bias[first + place] : 0.0f;
#pragma unroll
        for (int u = 0; u < kUserParts; ++u) {
          const int user = 16 * u + g + s / 2 * 8;
          const int64_t t = first_user + user;
          const float constant = t < inputs_.num_users ? inputs_.user_bias[t] : 0.0f;
          items_[user * kScoreStride + place] = as_number(sums[u][j][s] + bias + constant);
        }
      }
    __syncthreads();  // a warp reads what all have written
  }

  __device__ float at(int u, int j) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return items_[(warp * kUsers + u) * kScoreStride + lane + kWarpSize * j];
  }

 private:
  static constexpr int kUserParts = kUsersPerBlock / 16;
  static constexpr int kItemParts = kItemsPerChunk / kWarpsPerBlock / 8;
  static_assert(kUsersPerBlock * kScoreStride <= kItemsPerChunk * kStride);

  // Numbers of one operand, split.
  template <int kCount>
  struct Fragment {
    float heads[kCount], rests[kCount];

    __device__ __forceinline__ void set(const float (&numbers)[kCount]) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        heads[n] = head_of(numbers[n]);
        rests[n] = head_of(numbers[n] - heads[n]);
      }
    }
  };

  ScoreInputs<float, row_t> inputs_;
  float* users_;  // [kUsersPerBlock, kStride]
  float* items_;  // [kItemsPerChunk, kStride], and then scores [kUsersPerBlock, kScoreStride]
};

}  // namespace metarec_fast::cuda
