// Losses at a tower's output: of one entry, whose item and negatives have `group` scores, one after
// the other and the item's own first. By one thread.
#pragma once

#include "task.h"

namespace metarec_fast::cuda {

template <typename scalar_t>
struct EntryScores {
  const scalar_t* scores;  // [group]
  const scalar_t* log_q;   // [group], or nullptr: zeros
  int group;

  __device__ __forceinline__ scalar_t logit(int j) const {
    return scores[j] - (log_q == nullptr ? 0 : log_q[j]);
  }

  // π of the softmax; returns −log π_0.
  __device__ __forceinline__ scalar_t softmax(scalar_t* probabilities) const {
    scalar_t most = logit(0), total = 0;
    for (int j = 1; j < group; ++j) most = logit(j) > most ? logit(j) : most;
    for (int j = 0; j < group; ++j) total += probabilities[j] = std::exp(logit(j) - most);
    for (int j = 0; j < group; ++j) probabilities[j] /= total;
    return most - logit(0) + std::log(total);
  }
};

// share · ℓ' in the scores, and what `bend` wants to know of ℓ''.
template <typename scalar_t>
__device__ __forceinline__ void differentiate(Loss loss, scalar_t share,
                                              const EntryScores<scalar_t>& entry, scalar_t target,
                                              scalar_t* slopes, scalar_t* curvatures) {
  using Math = ScalarMath<scalar_t>;
  if (!is_pairwise(loss))
    return differentiate_loss<Math>(loss, share, entry.scores[0], target, slopes[0], curvatures[0]);
  if (loss == Loss::kSoftmax) {
    entry.softmax(curvatures);
    for (int j = 0; j < entry.group; ++j) slopes[j] = curvatures[j] *= share;
    slopes[0] -= share;
    return;
  }
  const scalar_t part = share / static_cast<scalar_t>(entry.group - 1), one = 1;
  scalar_t own = 0;
  for (int j = 1; j < entry.group; ++j) {
    const scalar_t difference = entry.scores[0] - entry.scores[j];
    scalar_t push;
    differentiate_loss<Math>(loss, part, difference, one, push, curvatures[j]);
    slopes[j] = -push;
    own += push;
  }
  slopes[0] = own;
}

// h = share · ℓ'' d:  of a softmax  share · (diag π − π πᵀ) d.
template <typename scalar_t>
__device__ __forceinline__ void bend(Loss loss, int group, const scalar_t* curvatures,
                                     const scalar_t* d, scalar_t* h) {
  if (!is_pairwise(loss)) {
    h[0] = curvatures[0] * d[0];
  } else if (loss == Loss::kSoftmax) {
    scalar_t share = 0, mean = 0;
    for (int j = 0; j < group; ++j) {
      share += curvatures[j];
      mean += curvatures[j] * d[j];
    }
    mean = share > 0 ? mean / share : 0;
    for (int j = 0; j < group; ++j) h[j] = curvatures[j] * (d[j] - mean);
  } else {
    scalar_t own = 0;
    for (int j = 1; j < group; ++j) {
      const scalar_t push = curvatures[j] * (d[0] - d[j]);
      h[j] = -push;
      own += push;
    }
    h[0] = own;
  }
}

// weight · ℓ_out, and its slopes in the scores.
template <typename scalar_t>
__device__ __forceinline__ scalar_t judge(const OuterLoss& loss, scalar_t weight,
                                          const EntryScores<scalar_t>& entry,
                                          const scalar_t* target, scalar_t* slopes) {
  const scalar_t softmax = static_cast<scalar_t>(loss.softmax) * weight,
                 bpr = static_cast<scalar_t>(loss.bpr) * weight;
  scalar_t total = 0, own = 0;
  if (loss.pointwise()) {
    judge_point<ScalarMath<scalar_t>>(loss, entry.scores[0], *target, total, own);
    total *= weight, own *= weight;
  }
  for (int j = 0; j < entry.group; ++j) slopes[j] = 0;
  if (softmax != 0) {
    total += softmax * entry.softmax(slopes);
    for (int j = 0; j < entry.group; ++j) slopes[j] *= softmax;
    own -= softmax;
  }
  if (bpr != 0)
    for (int j = 1; j < entry.group; ++j) {
      const scalar_t part = bpr / static_cast<scalar_t>(entry.group - 1),
                     behind = entry.scores[j] - entry.scores[0];  // log(1 + e^behind)
      const scalar_t push = part * ScalarMath<scalar_t>::sigmoid(behind);
      total += part * ScalarMath<scalar_t>::softplus(behind);
      slopes[j] += push;
      own -= push;
    }
  slopes[0] += own;
  return total;
}

}  // namespace metarec_fast::cuda
