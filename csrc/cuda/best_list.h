// The k best candidates that a warp has been offered, sorted. A score and its id order all
// candidates strictly, so it does not matter who is offered first.
#pragma once

#include "../candidate.h"
#include "dialect.h"

namespace metarec_fast::cuda {

// In memory that the lanes of one warp share; all of them call each function.
template <typename scalar_t>
class BestList {
 public:
  __device__ BestList(scalar_t* scores, int64_t* items, int k)
      : scores_(scores), items_(items), k_(k), lane_(threadIdx.x % kWarpSize) {}

  __device__ static Candidate<scalar_t> nobody() { return {kLowest<scalar_t>, kNoItem}; }

  __device__ void clear() {
    for (int i = lane_; i < k_; i += kWarpSize) put(i, nobody());
    __syncwarp(kAllLanes);
  }

  // Nobody who is not better is let in.
  __device__ Candidate<scalar_t> worst() const { return at(k_ - 1); }

  __device__ Candidate<scalar_t> at(int i) const { return {scores_[i], items_[i]}; }

  // Lets in those of the lanes' candidates who are among the best.
  __device__ void offer(const Candidate<scalar_t>& mine) {
    unsigned waiting = __ballot_sync(kAllLanes, mine.better_than(worst()));
    while (waiting != 0) {
      const int lane = __ffs(waiting) - 1;
      waiting &= waiting - 1;
      const Candidate<scalar_t> candidate{__shfl_sync(kAllLanes, mine.score, lane),
                                          __shfl_sync(kAllLanes, mine.item, lane)};
      if (candidate.better_than(worst())) insert(candidate);
    }
  }

  // The same for a list that another warp has finished; nobody after a refused candidate is better.
  template <typename At>
  __device__ void merge(const At& other_at) {
    for (int first = 0; first < k_; first += kWarpSize) {
      const int i = first + lane_;
      const Candidate<scalar_t> mine = i < k_ ? other_at(i) : nobody();
      if (!__any_sync(kAllLanes, mine.better_than(worst()))) return;
      offer(mine);
    }
  }

  // Id −1 and score −inf where there are fewer than k.
  __device__ void write(scalar_t* scores, int64_t* items) const {
    for (int i = lane_; i < k_; i += kWarpSize) {
      scores[i] = scores_[i];
      items[i] = items_[i] == kNoItem ? -1 : items_[i];
    }
  }

 private:
  __device__ void put(int i, const Candidate<scalar_t>& candidate) {
    scores_[i] = candidate.score;
    items_[i] = candidate.item;
  }

  // Those who are worse move back by one, from the end on, a warp's width at once.
  __device__ void insert(const Candidate<scalar_t>& candidate) {
    int place = 0;
    for (int first = (k_ - 1) / kWarpSize * kWarpSize; first >= 0; first -= kWarpSize) {
      const int i = first + lane_;
      const Candidate<scalar_t> entry = i < k_ ? at(i) : nobody();
      const bool moves = i < k_ && candidate.better_than(entry);
      __syncwarp(kAllLanes);
      if (moves && i + 1 < k_) put(i + 1, entry);
      __syncwarp(kAllLanes);
      const unsigned moved = __ballot_sync(kAllLanes, moves);
      place = first + (moved == 0 ? kWarpSize : __ffs(moved) - 1);
      if (place > first) break;
    }
    if (lane_ == 0) put(place, candidate);
    __syncwarp(kAllLanes);
  }

  scalar_t* scores_;  // [k]
  int64_t* items_;    // [k]
  int k_, lane_;
};

}  // namespace metarec_fast::cuda
