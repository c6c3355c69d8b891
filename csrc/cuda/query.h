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
  static constexpr int kAtOnce = 2;  // rows in each group of lanes

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
    const int64_t t = task.index();
    begin = query.entries.begin(t);
    entries = static_cast<int>(query.entries.size(t));
    group = static_cast<int>(query.entries.candidates());
    share = 0;
    if (query.ask != Ask::kLoss || entries == 0) return;
    scalar_t total = static_cast<scalar_t>(entries);
    if (query.weights != nullptr) {
      total = 0;
      task.each(entries, [&](int q) { total += query.weights[begin + q]; });
      total = task.team.sum(total, task.scratch.partial());
    }
    share = query.normalisers[0] * query.task_weight(t) / total;
  }

  // At point k of the path, or the only one: adds what arrives at φ to `grad_fast`, writes scores
  // and the items' gradients, or adds to them where a later point was `first`.
  __device__ __forceinline__ void at(int64_t k, const Fast& fast, bool first, Fast& grad_fast) {
    const scalar_t counts =
        !TaskType::kPlain && query.whole_path() ? share * query.step_weights[k] : share;
    Fast sum = Fast::zero();
    if (TaskType::kPlain || group == 1)
      single(fast, counts, first, sum);
    else
      compared(fast, counts, first, sum);
    if (!query.goes_back()) return;
    grad_fast.add(1, task.sum_team(sum));
  }

 private:
  // A candidate of the query: an entry's item or one of its negatives; none where entry < 0.
  struct Place {
    int64_t entry, j;
  };

  // Rows of candidates and their products with u, a few in each group of lanes, `place(i)` says
  // which. All lanes of a warp come here together.
  template <int kCount>
  struct Candidates {
    scalar_t rows[kCount][Fast::kSize];
    scalar_t products[kCount];  // of the lane's columns alone
    int found[kCount];          // where in the support, or −1
  };
  template <int kCount, typename PlaceOf>
  __device__ __forceinline__ void read(const PlaceOf& place, const Fast& fast,
                                       Candidates<kCount>& to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at = place(i);
      const int64_t item = at.entry < 0 ? -1 : query.entries.candidate(at.entry, at.j);
      if constexpr (Items::kAdapt) to.found[i] = items.find(task, item);
      Fast row = Fast::zero();
      if (item >= 0) {
        row = task.load_item(item);
        if constexpr (Items::kAdapt)
          if (to.found[i] >= 0) task.columns.load(task.row(to.found[i]), row);
      }
      to.products[i] = row.dot(fast);
#pragma unroll
      for (int c = 0; c < Fast::kSize; ++c) to.rows[i][c] = row.at[c];
    }
  }

  // m + b + c of a candidate.
  __device__ __forceinline__ scalar_t base(int64_t item, int found, const Fast& fast) const {
    if constexpr (Items::kAdapt)
      if (found >= 0) return task.scratch.biases()[found] + fast.bias;
    return *task.problem.offset + task.problem.item_bias[item] + fast.bias;
  }

  // Books p̄ of one candidate, in one thread; returns what its own row gets of it.
  __device__ __forceinline__ scalar_t book(const Place& at, int64_t item, int found, scalar_t grad,
                                           bool first) {
    offset += grad;
    if constexpr (Items::kAdapt) {
      items.note(query.entries, at.entry, at.j, found, grad);
      if (found >= 0) grad = 0;  // the support's row has it all
    }
    if (grads.item_rows == nullptr) return grad;
    const int64_t row = grads.places.of_query(at.entry, at.j);
    grads.item_biases[row] = grad + (first ? 0 : grads.item_biases[row]);
    grads.item_ids[row] = item;
    return grad;
  }

  // Writes p̄ φ to a candidate's gradient row, or adds it.
  __device__ __forceinline__ void write(const Place& at, scalar_t grad, const Fast& fast,
                                        bool first) const {
    if (grads.item_rows == nullptr) return;
    scalar_t* row =
        grads.item_rows + grads.places.of_query(at.entry, at.j) * task.problem.shape.dim;
    Fast result = Fast::zero();
    if (!first) task.columns.load_row(row, grads.packed_rows, result);
    result.add(grad, fast);
    task.columns.store_row(result, grads.packed_rows, row);
  }

  __device__ __forceinline__ void add(scalar_t grad, const scalar_t (&row)[Fast::kSize],
                                      Fast& sum) const {
#pragma unroll
    for (int c = 0; c < Fast::kSize; ++c) sum.at[c] += grad * row[c];
    sum.bias += grad;
  }

  // Entries that are judged by their own score alone: a few in each group of lanes at once, whose
  // first lanes judge one each.
  __device__ __forceinline__ void single(const Fast& fast, scalar_t counts, bool first, Fast& sum) {
    const int stride = task.team.warps * task.columns.groups();
#pragma unroll 1
    for (int from = task.team.warp * task.columns.groups(); from < entries;
         from += kAtOnce * stride) {
      const auto place = [&](int i) {
        const int q = from + i * stride + task.columns.group;
        return Place{q < entries ? begin + q : int64_t{-1}, 0};
      };
      static_assert(kAtOnce == 2);
      Candidates<kAtOnce> candidates;
      read(place, fast, candidates);
      const scalar_t product = task.columns.sums(candidates.products);
      scalar_t grad = 0, row_grad = 0;
      const Place own = task.columns.lane < kAtOnce ? place(task.columns.lane) : Place{-1, 0};
      if (own.entry >= 0) {
        const int64_t item = query.entries.items[own.entry];
        int found = -1;
        if constexpr (Items::kAdapt)
          found = task.columns.lane == 0 ? candidates.found[0] : candidates.found[1];
        const scalar_t score = product + base(item, found, fast);
        if (query.ask == Ask::kScores) {
          query.scores[own.entry] = score;
        } else {
          grad = query.ask == Ask::kGiven ? query.grad_scores[own.entry]
                                          : judge(own.entry, counts, score);
          row_grad = book(own, item, found, grad, first);
        }
      }
      if (query.ask == Ask::kScores) continue;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        add(__shfl_sync(kAllLanes, grad, i, task.columns.lanes()), candidates.rows[i], sum);
        const scalar_t to_row = __shfl_sync(kAllLanes, row_grad, i, task.columns.lanes());
        const Place at = place(i);
        if (at.entry >= 0) write(at, to_row, fast, first);
      }
    }
  }

  // The slope of an entry's loss at its score, which is added.
  __device__ __forceinline__ scalar_t judge(int64_t entry, scalar_t counts, scalar_t score) {
    const scalar_t weight = query.weights == nullptr ? counts : counts * query.weights[entry];
    scalar_t value, slope;
    judge_point<ScalarMath<scalar_t>>(query.loss, score, query.targets[entry], value, slope);
    loss += weight * value;
    return weight * slope;
  }

  // Entries that are compared with their negatives: each in a warp, a candidate in a group of
  // lanes.
  __device__ __forceinline__ void compared(const Fast& fast, scalar_t counts, bool first,
                                           Fast& sum) {
    scalar_t* scores = task.scratch.candidates() + 2 * task.team.warp * group;
    scalar_t* grad = scores + group;
    for (int q = task.team.warp; q < entries; q += task.team.warps) {
      const int64_t entry = begin + q;
      const auto each = [&](const auto& body) {
        for (int from = 0; from < group; from += task.columns.groups()) {
          const int j = from + task.columns.group;
          const Place at{j < group ? entry : int64_t{-1}, j};
          Candidates<1> one;
          read([&](int) { return at; }, fast, one);
          one.products[0] = task.columns.sum(one.products[0]);
          if (at.entry >= 0) body(at, one);
        }
      };
      const auto found = [](const Candidates<1>& one) {
        if constexpr (Items::kAdapt) return one.found[0];
        return -1;
      };
      each([&](const Place& at, const Candidates<1>& one) {
        if (task.columns.lane != 0) return;
        const int64_t item = query.entries.candidate(entry, at.j);
        scores[at.j] = one.products[0] + base(item, found(one), fast);
      });
      __syncwarp();
      compare(entry, counts, scores, grad);
      each([&](const Place& at, const Candidates<1>& one) {
        add(grad[at.j], one.rows[0], sum);
        write(at, found(one) < 0 ? grad[at.j] : scalar_t{0}, fast, first);
        if (task.columns.lane != 0) return;
        book(at, query.entries.candidate(entry, at.j), found(one), grad[at.j], first);
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
      if (query.loss.pointwise()) own += judge(entry, counts, scores[0]);
      grad[0] += own;
    }
    __syncwarp();
  }
};

}  // namespace metarec_fast::cuda
