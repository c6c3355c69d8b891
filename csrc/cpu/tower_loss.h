// The loss that a task adapts by, of the scores of all its candidates: its derivatives, and its
// Hessian on the way back.
//
//   squared, logistic  Δ = c ℓ'(p, y),  c = w/S                            H = c ℓ''
//   bpr                Δ_m = c σ(p_m − p_0),  c = w/(S M),  Δ_0 = −Σ_m Δ_m  H of differences alike
//   softmax            Δ = c (π − y),  y = 1 of the item, 0 of negatives   H = c (diag(π) − ππᵀ)
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
class TowerLoss {
 public:
  // Of entries begin … begin + size − 1, with negatives if the loss compares; `targets` and
  // `weights` are of all entries, nullptr where there are none.
  TowerLoss(Loss loss, const EntryData<scalar_t>& entries, int64_t begin, int64_t size,
            const scalar_t* targets, const scalar_t* weights, Arena<scalar_t>& arena)
      : loss_(loss), group_(entries.candidates()), count_(size * group_) {
    if (entries.log_q != nullptr) log_q_ = entries.log_q + begin * group_;
    targets_ = arena.take(count_);
    shares_ = arena.take(count_);
    for (int64_t i = 0, r = 0; i < size; ++i)
      for (int64_t j = 0; j < group_; ++j, ++r) {
        const scalar_t weight = weights == nullptr ? 1 : weights[begin + i];
        shares_[r] = weight / static_cast<scalar_t>(size);
        if (loss == Loss::kBpr) shares_[r] *= j == 0 ? 0 : 1 / static_cast<scalar_t>(group_ - 1);
        targets_[r] = !is_pairwise(loss) ? targets[begin + i] : loss == Loss::kSoftmax && j == 0;
      }
  }

  // scores ← ℓ', and what `bend` wants to know of ℓ''; both are filled up to whole registers.
  void differentiate(scalar_t* scores, scalar_t* curvatures) const {
    constexpr int64_t kLane = kLanes<scalar_t>;
    if (loss_ == Loss::kSoftmax) {
      for (int64_t r = 0; log_q_ != nullptr && r < count_; ++r) scores[r] -= log_q_[r];
      group_softmax(scores, count_, group_, curvatures);
      for (int64_t r = 0; r < count_; r += kLane)
        store(scores + r) = load(shares_ + r) * (load(curvatures + r) - load(targets_ + r));
      return;
    }
    if (loss_ == Loss::kBpr) subtract_own(scores);
    for (int64_t r = 0; r < count_; r += kLane) {
      const Vector<scalar_t> share = load(shares_ + r), p = load(scores + r),
                             y = load(targets_ + r);
      differentiate_loss<VectorMath<scalar_t>, Vector<scalar_t>>(
          loss_, share, p, y, store(scores + r), store(curvatures + r));
    }
    if (loss_ == Loss::kBpr) balance(scores);
  }

  // along ← H along
  void bend(const scalar_t* curvatures, scalar_t* along) const {
    if (loss_ == Loss::kSoftmax) {
      for (int64_t first = 0; first < count_; first += group_) {
        scalar_t average = 0;
        for (int64_t r = first; r < first + group_; ++r) average += curvatures[r] * along[r];
        for (int64_t r = first; r < first + group_; ++r)
          along[r] = shares_[r] * curvatures[r] * (along[r] - average);
      }
      return;
    }
    if (loss_ == Loss::kBpr) subtract_own(along);
    for (int64_t r = 0; r < count_; r += kLanes<scalar_t>) store(along + r) *= load(curvatures + r);
    if (loss_ == Loss::kBpr) balance(along);
  }

 private:
  // x_m ← x_m − x_0 of an entry's negatives, whose item has a share of 0.
  void subtract_own(scalar_t* numbers) const {
    for (scalar_t* own = numbers; own < numbers + count_; own += group_)
      for (int64_t m = 1; m < group_; ++m) own[m] -= own[0];
  }

  // x_0 ← −Σ_m x_m
  void balance(scalar_t* numbers) const {
    for (scalar_t* own = numbers; own < numbers + count_; own += group_) {
      own[0] = 0;
      for (int64_t m = 1; m < group_; ++m) own[0] -= own[m];
    }
  }

  Loss loss_;
  int64_t group_, count_;  // candidates of an entry, of the task
  scalar_t *targets_, *shares_;
  const scalar_t* log_q_ = nullptr;
};

}  // namespace metarec_fast::cpu
