// What the query of one task is judged by:  Σ_q v_q ℓ_out  and its derivatives in the scores.
#pragma once

#include <cmath>

#include "task_reader.h"

namespace metarec_fast::cpu {

template <typename scalar_t>
struct QueryLoss {
  OuterLoss loss;
  const scalar_t* targets;  // y [n], or nullptr where only pairs are judged
  const scalar_t* weights;  // v [n], or nullptr: ones
  const scalar_t* log_q;    // [n, group], or nullptr

  // Σ_q v_q of the entries [begin, end).
  scalar_t total(int64_t begin, int64_t end) const {
    if (weights == nullptr) return static_cast<scalar_t>(end - begin);
    scalar_t sum = 0;
    for (int64_t q = begin; q < end; ++q) sum += weights[q];
    return sum;
  }
};

// Σ weight ∘ ℓ(p, y) of the pointwise losses; their derivatives are written to grad. All padded,
// weights with zeros.
template <typename scalar_t>
ALWAYS_INLINE scalar_t judge_points(const OuterLoss& loss, const scalar_t* scores,
                                    const scalar_t* targets, const scalar_t* weights, int64_t count,
                                    scalar_t* grad) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  Vector<scalar_t> total = {};
  for (int64_t q = 0; q < count; q += kLane) {
    const Vector<scalar_t> weight = load(weights + q);
    Vector<scalar_t> value, slope;
    judge_point<VectorMath<scalar_t>, Vector<scalar_t>>(loss, load(scores + q), load(targets + q),
                                                        value, slope);
    total += weight * value;
    store(grad + q) = weight * slope;
  }
  return sum_lanes<scalar_t>(total);
}

// Σ weight ∘ mean_m log(1 + e^(p_m − p_0)) over entries of `group` scores; its derivatives are
// added to grad.
template <typename scalar_t>
ALWAYS_INLINE scalar_t judge_differences(const scalar_t* scores, const scalar_t* weights,
                                         int64_t entries, int64_t group, Arena<scalar_t>& arena,
                                         scalar_t* grad) {
  const int64_t M = group - 1, count = entries * M;
  scalar_t *differences = arena.take(count), *shares = arena.take(count);
  for (int64_t q = 0, i = 0; q < entries; ++q)
    for (int64_t m = 1; m < group; ++m, ++i) {
      differences[i] = scores[q * group + m] - scores[q * group];
      shares[i] = weights[q] / static_cast<scalar_t>(M);
    }
  Vector<scalar_t> total = {};
  for (int64_t i = 0; i < count; i += kLanes<scalar_t>) {
    total += load(shares + i) * softplus<scalar_t>(load(differences + i));
    store(differences + i) = load(shares + i) * sigmoid<scalar_t>(load(differences + i));
  }
  for (int64_t q = 0, i = 0; q < entries; ++q)
    for (int64_t m = 1; m < group; ++m, ++i) {
      grad[q * group + m] += differences[i];
      grad[q * group] -= differences[i];
    }
  return sum_lanes<scalar_t>(total);
}

// −Σ weight ∘ log softmax(p − log q)_0 over entries of `group` scores; its derivatives are added to
// grad.
template <typename scalar_t>
ALWAYS_INLINE scalar_t judge_softmax(const scalar_t* scores, const scalar_t* weights,
                                     const scalar_t* log_q, int64_t entries, int64_t group,
                                     Arena<scalar_t>& arena, scalar_t* grad) {
  const int64_t count = entries * group;
  scalar_t *logits = arena.take(count), *probabilities = arena.take(count);
  for (int64_t i = 0; i < count; ++i) logits[i] = scores[i] - (log_q == nullptr ? 0 : log_q[i]);
  group_softmax(logits, count, group, probabilities);
  scalar_t total = 0;
  for (int64_t q = 0; q < entries; ++q) {
    const scalar_t* logit = logits + q * group;
    const scalar_t* probability = probabilities + q * group;
    const int64_t most = std::max_element(logit, logit + group) - logit;
    total += weights[q] * (logit[most] - logit[0] - std::log(probability[most]));
    for (int64_t j = 0; j < group; ++j)
      grad[q * group + j] += weights[q] * (probability[j] - (j == 0 ? 1 : 0));
  }
  return total;
}

// The loss of a task whose query begins at entry `begin`, times `share`; grad_scores [Q · group]
// is overwritten and padded with zeros.
template <typename scalar_t>
scalar_t judge_query(const QueryLoss<scalar_t>& outer, const scalar_t* scores, int64_t begin,
                     int64_t entries, int64_t group, scalar_t share, Arena<scalar_t>& arena,
                     scalar_t* grad_scores) {
  scalar_t* weights = arena.take(entries);
  for (int64_t q = 0; q < entries; ++q)
    weights[q] = outer.weights == nullptr ? share : share * outer.weights[begin + q];
  if (group == 1 && outer.loss.pointwise()) {
    scalar_t* targets = arena.take(entries);
    copy_in(outer.targets + begin, entries, targets);
    return judge_points(outer.loss, scores, targets, weights, entries, grad_scores);
  }
  for (int64_t i = 0; i < entries * group; i += kLanes<scalar_t>)
    store(grad_scores + i) = Vector<scalar_t>{};
  scalar_t total = 0;
  if (outer.loss.pointwise()) {  // of an entry's own item
    scalar_t *own = arena.take(entries), *grad = arena.take(entries),
             *targets = arena.take(entries);
    for (int64_t q = 0; q < entries; ++q) own[q] = scores[q * group];
    copy_in(outer.targets + begin, entries, targets);
    total += judge_points(outer.loss, own, targets, weights, entries, grad);
    for (int64_t q = 0; q < entries; ++q) grad_scores[q * group] = grad[q];
  }
  if (outer.loss.pairwise()) {
    scalar_t* shares = arena.take(entries);
    const auto scaled = [&](double part) {
      for (int64_t q = 0; q < entries; ++q) shares[q] = static_cast<scalar_t>(part) * weights[q];
      return shares;
    };
    if (outer.loss.bpr != 0)
      total +=
          judge_differences(scores, scaled(outer.loss.bpr), entries, group, arena, grad_scores);
    if (outer.loss.softmax != 0)
      total += judge_softmax(scores, scaled(outer.loss.softmax),
                             outer.log_q == nullptr ? nullptr : outer.log_q + begin * group,
                             entries, group, arena, grad_scores);
  }
  return total;
}

}  // namespace metarec_fast::cpu
