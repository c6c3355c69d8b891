// Tasks in fixed blocks of about equal work, shared out among threads.
//
// The blocks depend on the sizes of the tasks alone. Whoever computes a block, sums are formed
// inside blocks and then over blocks, always in the same order: results are the same bits for any
// number of threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "../arguments.h"
#include "vector.h"

namespace metarec_fast::cpu {

constexpr int64_t kMostBlocks = 128;

class TaskBlocks {
 public:
  // `offsets` of one or two sets of entries; a task costs its entries and a little more. An entry
  // takes about `entry_cost` multiply-adds. `most` where what is kept of a block is large.
  TaskBlocks(int64_t num_tasks, const int64_t* support, const int64_t* query, int64_t entry_cost,
             int64_t most = kMostBlocks) {
    const auto cost = [&](int64_t task) {
      return support[task] + (query == nullptr ? 0 : query[task]) + kTaskCost * task;
    };
    const int64_t total = cost(num_tasks);
    const int64_t work = total * entry_cost;
    size_ = std::max<int64_t>(1, std::min({most, kMostBlocks, num_tasks, work / kLeastWork}));
    for (int64_t block = 1, task = 0; block < size_; ++block) {
      while (task < num_tasks && cost(task) * size_ < total * block) ++task;
      bounds_[block] = task;
    }
    bounds_[0] = 0;
    bounds_[size_] = num_tasks;
    worth_sharing_ = work > kWorthSharing;
  }

  int64_t size() const { return size_; }

  // body(block, task, last, worker) for every task, with a Worker of the thread that computes it. A
  // thread takes several blocks at once, fewer and fewer of them: it goes on to the task after this
  // one as long as that lies before `last`. It begins with its own part of the blocks, the same one
  // in every call, whose results may still be in its cache, and goes on with what others have left.
  template <typename Worker, typename Body>
  void run(const Body& body) const {
    const int64_t threads = worth_sharing_ ? torch::stable::get_num_threads() : 1;
    const int64_t share = (size() + threads - 1) / threads;  // as parallel_for has it
    const int64_t num_parts = (size() + share - 1) / share;
    std::array<Part, kMostBlocks> parts;
    for (int64_t i = 0; i < num_parts; ++i) {
      parts[i].next = i * share;
      parts[i].end = std::min(size(), (i + 1) * share);
    }
    const auto work = [&](int64_t begin, int64_t) {
      Worker worker{};
      for (int64_t i = 0; i < num_parts; ++i) {
        Part& part = parts[(begin / share + i) % num_parts];
        for (int64_t block, end; part.take(block, end);)
          for (; block < end; ++block)
            for (int64_t task = bounds_[block]; task < bounds_[block + 1]; ++task)
              body(block, task, bounds_[end], worker);
      }
      finish_streaming();
    };
    if (worth_sharing_)
      torch::stable::parallel_for(0, size(), 1, work);
    else
      work(0, size());
  }

 private:
  // Blocks that one thread begins with, on cache lines of their own.
  struct alignas(kCacheLine) Part {
    std::atomic<int64_t> next;
    int64_t end;

    // The first half of what is left, a block at least; false if nothing is.
    bool take(int64_t& first, int64_t& last) {
      first = next.load();
      do {
        if (first >= end) return false;
        last = first + std::max<int64_t>(1, (end - first) / 2);
      } while (!next.compare_exchange_weak(first, last));
      return true;
    }
  };

  static constexpr int64_t kTaskCost = 8;
  // Multiply-adds that take about as long as waking a thread up, and as what a block costs.
  static constexpr int64_t kWorthSharing = 500'000, kLeastWork = 100'000;
  bool worth_sharing_;
  int64_t size_;
  std::array<int64_t, kMostBlocks + 1> bounds_;
};

// Throws unless all ids lie in [0, limit); the message begins with `subject`. One pass without
// branches, by the sign bits of what must not be negative; the culprit is looked for only if there
// is one.
inline void check_ids(const std::string& subject, const int64_t* ids, int64_t count,
                      int64_t limit) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t id = static_cast<uint64_t>(ids[i]);
    signs |= id | (static_cast<uint64_t>(limit) - 1 - id);
  }
  if (signs >> 63 == 0) return;
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < limit, subject, " must be in [0, ", limit, "), got ",
                    ids[i], " at position ", i);
}

// Throws unless every task owns a range of the entries and every id a row of the table.
inline void check_ragged(const char* name, const RaggedItems& entries, int64_t num_rows) {
  const int64_t* offsets = entries.offsets.const_data_ptr<int64_t>();
  const int64_t* items = entries.items.const_data_ptr<int64_t>();
  const int64_t count = entries.size(), num_tasks = entries.num_tasks;
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[num_tasks] == count, name,
                  "_offsets: must run from 0 to ", count, ", got ", offsets[0], " to ",
                  offsets[num_tasks]);
  for (int64_t t = 0; t < num_tasks; ++t)
    STD_TORCH_CHECK(offsets[t] <= offsets[t + 1], name, "_offsets: must not decrease, got ",
                    offsets[t], " then ", offsets[t + 1], " at position ", t);
  check_ids(std::string(name) + "_items: ids", items, count, num_rows);
  if (entries.negatives)
    check_ids(std::string(name) + "_negatives: ids", entries.negatives->const_data_ptr<int64_t>(),
              entries.negatives->numel(), num_rows);
}

// The query of a batch, checked against its support and the table.
inline void check_query(const RaggedItems& query, const Inputs& inputs) {
  JudgedQuery::check_num_tasks(query, inputs);
  check_ragged("query", query, inputs.N());
}

}  // namespace metarec_fast::cpu
