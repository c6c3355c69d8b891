// Judges the query of a task: its scores, the loss, and what arrives at φ and at the item rows.
#pragma once

#include "task.h"

namespace metarec_fast::cuda {

// Items as the table has them: none of the query is another in the support.
struct SharedItems {
  static constexpr bool kAdapt = false;
};

template <typename TaskType, typename Items>
struct Judge {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  static constexpr int kChunks = TaskType::kChunks;
  static constexpr int kAtOnce = TaskType::kAtOnce;

  const TaskType& task;
  const QueryData<scalar_t>& query;
  const GradientData<scalar_t>& grads;
  const Items items;
  int64_t begin;
  int entries, group;
  scalar_t share;       // what the loss counts for a unit of query weight
  scalar_t loss = 0;    // this thread's
  scalar_t offset = 0;  // m̄, likewise

  __device__ __forceinline__ Judge(const TaskType& task_in, const QueryData<scalar_t>& query_in,
                                   const GradientData<scalar_t>& grads_in, const Items& items_in)
      : task(task_in), query(query_in), grads(grads_in), items(items_in) {
    const int64_t t = task.index;
    begin = query.entries.begin(t);
    entries = static_cast<int>(query.entries.size(t));
    group = static_cast<int>(query.entries.candidates());
    share = 0;
    if (query.ask != Ask::kLoss || entries == 0) return;
    scalar_t total = static_cast<scalar_t>(entries);
    if (query.weights != nullptr) {
      total = 0;
      task.each(entries, [&](int q) { total += query.weights[begin + q]; });
      total = task.team.sum(total, task.scratch.partial);
    }
    share = query.normalisers[0] * query.task_weight(t) / total;
  }

  // At point k of the path, or the only one: adds what arrives at φ to `grad_fast`, writes scores
  // and the items' gradients, or adds to them where a later point was `first`.
  __device__ __forceinline__ void at(int64_t k, const Fast& fast, bool first, Fast& grad_fast) {
    const scalar_t counts = query.whole_path() ? share * query.step_weights[k] : share;
    Fast sum = Fast::zero();
    if (group == 1)
      single(fast, counts, first, sum);
    else
      compared(fast, counts, first, sum);
    if (!query.goes_back()) return;
    grad_fast.add(1, task.sum_team(sum));
  }

 private:
  // m + b + c + u·e of one candidate in each group of lanes, its row, and where it is in the
  // support; all lanes of the warp come here together.
  struct Candidate {
    Fast row;
    scalar_t score;
    int place;  // or −1
  };
  template <int kCount>
  __device__ __forceinline__ void read(const int64_t (&item)[kCount], const Fast& fast,
                                       Candidate (&candidates)[kCount]) const {
    const Problem<scalar_t, typename TaskType::table_t>& problem = task.problem;
    scalar_t base[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Candidate& one = candidates[i];
      one.place = -1;
      one.row = Fast::zero();
      base[i] = 0;
      if constexpr (Items::kAdapt) one.place = items.find(task, item[i]);
      if (item[i] < 0) continue;
      if (one.place >= 0) {
        if constexpr (Items::kAdapt) base[i] = items.load(task, one.place, one.row);
      } else {
        one.row = task.load_item(item[i]);
        base[i] = task.offset + problem.item_bias[item[i]];
      }
    }
    for (int i = 0; i < kCount; ++i) candidates[i].score = candidates[i].row.dot(fast);
    for (int apart = task.columns.lanes / 2; apart > 0; apart /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        candidates[i].score += __shfl_xor_sync(kAllLanes, candidates[i].score, apart);
#pragma unroll
    for (int i = 0; i < kCount; ++i) candidates[i].score += base[i] + fast.bias;
  }

  // Books p̄ of candidate j of an entry, in its group of lanes.
  __device__ __forceinline__ void book(int64_t entry, int64_t j, int64_t item, const Candidate& one,
                                       const Fast& fast, scalar_t grad, bool first, Fast& sum) {
    if (task.columns.lane == 0) offset += grad;
    sum.add(grad, one.row);
    sum.bias += grad;
    if constexpr (Items::kAdapt) {
      items.note(task, query.entries, entry, j, one.place, grad);
      if (one.place >= 0) grad = 0;  // its row has it all
    }
    if (grads.item_rows == nullptr) return;
    const int64_t place = grads.of_query(entry, j);
    scalar_t* row = grads.item_rows + place * task.problem.dim;
    Fast result = Fast::zero();
    if (!first) task.columns.load_row(row, grads.packed_rows, result);
    result.add(grad, fast);
    task.columns.store_row(result, grads.packed_rows, row);
    if (task.columns.lane != 0) return;
    grads.item_biases[place] = grad + (first ? 0 : grads.item_biases[place]);
    if (grads.item_ids != nullptr) grads.item_ids[place] = item;
  }

  // Entries that are judged by their own score alone: each in a group of lanes, at once.
  __device__ __forceinline__ void single(const Fast& fast, scalar_t counts, bool first, Fast& sum) {
    const int stride = task.team.warps * task.columns.groups();
    for (int from = task.team.warp * task.columns.groups(); from < entries;
         from += kAtOnce * stride) {
      int64_t item[kAtOnce];
      Candidate candidates[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int q = from + i * stride + task.columns.group;
        item[i] = q < entries ? query.entries.items[begin + q] : -1;
      }
      read(item, fast, candidates);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t entry = begin + from + i * stride + task.columns.group;
        if (item[i] < 0) continue;
        if (query.ask == Ask::kScores) {
          if (task.columns.lane == 0) query.scores[entry] = candidates[i].score;
          continue;
        }
        scalar_t grad = 0;
        if (query.ask == Ask::kGiven) {
          grad = query.grad_scores[entry];
        } else {
          const scalar_t weight = query.weights == nullptr ? counts : counts * query.weights[entry];
          scalar_t value, slope;
          judge_point<ScalarMath<scalar_t>>(query.loss, candidates[i].score, query.targets[entry],
                                            value, slope);
          if (task.columns.lane == 0) loss += weight * value;
          grad = weight * slope;
        }
        book(entry, 0, item[i], candidates[i], fast, grad, first, sum);
      }
    }
  }

  // Entries that are compared with their negatives: each in a warp, a candidate in a group of
  // lanes.
  __device__ __forceinline__ void compared(const Fast& fast, scalar_t counts, bool first,
                                           Fast& sum) {
    scalar_t* scores = task.scratch.candidates + 2 * task.team.warp * group;
    scalar_t* grad = scores + group;
    for (int q = task.team.warp; q < entries; q += task.team.warps) {
      const int64_t entry = begin + q;
      const auto each = [&](const auto& body) {
        for (int from = 0; from < group; from += task.columns.groups()) {
          const int j = from + task.columns.group;
          const int64_t item[1] = {j < group ? query.entries.candidate(entry, j) : -1};
          Candidate one[1];
          read(item, fast, one);
          if (j < group) body(j, item[0], one[0]);
        }
      };
      each([&](int j, int64_t, const Candidate& one) {
        if (task.columns.lane == 0) scores[j] = one.score;
      });
      __syncwarp();
      compare(entry, counts, scores, grad);
      each([&](int j, int64_t item, const Candidate& one) {
        book(entry, j, item, one, fast, grad[j], first, sum);
      });
      __syncwarp();
    }
  }

  // p̄ of an entry's candidates from their scores, by one warp; its loss is added.
  __device__ __forceinline__ void compare(int64_t entry, scalar_t counts, const scalar_t* scores,
                                          scalar_t* grad) {
    const int lane = task.team.lane;
    const scalar_t weight = query.weights == nullptr ? counts : counts * query.weights[entry];
    const scalar_t bpr = static_cast<scalar_t>(query.loss.bpr) * weight,
                   softmax = static_cast<scalar_t>(query.loss.softmax) * weight;
    const scalar_t* log_q = query.entries.log_q;
    const auto logit = [&](int j) {
      return scores[j] - (log_q == nullptr ? 0 : log_q[entry * group + j]);
    };
    scalar_t most = logit(0), total = 0, own = 0;
    for (int j = lane; j < group; j += kWarpSize) most = logit(j) > most ? logit(j) : most;
    most = warp_max(most);
    for (int j = lane; j < group; j += kWarpSize) total += std::exp(logit(j) - most);
    total = warp_sum(total);
    for (int j = lane; j < group; j += kWarpSize) {
      scalar_t slope = softmax * std::exp(logit(j) - most) / total;
      if (j > 0) {
        const scalar_t part = bpr / static_cast<scalar_t>(group - 1),
                       behind = scores[j] - scores[0];  // log(1 + e^behind)
        loss += part * ScalarMath<scalar_t>::softplus(behind);
        const scalar_t push = part * ScalarMath<scalar_t>::sigmoid(behind);
        slope += push;
        own -= push;
      }
      grad[j] = slope;
    }
    own = warp_sum(own);
    if (lane == 0) {
      loss += softmax * (most - logit(0) + std::log(total));
      own -= softmax;
      if (query.loss.pointwise()) {
        scalar_t value, slope;
        judge_point<ScalarMath<scalar_t>>(query.loss, scores[0], query.targets[entry], value,
                                          slope);
        loss += weight * value;
        own += weight * slope;
      }
      grad[0] += own;
    }
    __syncwarp();
  }
};

}  // namespace metarec_fast::cuda
