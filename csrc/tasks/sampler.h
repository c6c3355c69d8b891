// Support and query entries of a batch of users, drawn from a log of interactions.
// The rules are those on top of metarec_fast/_numpy_sampler.py, which gives the same bits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "item_set.h"

namespace metarec {

// Rows of user u: [offsets[u], offsets[u + 1]), oldest first. Not owned.
struct Log {
  const int64_t* offsets;  // [U + 1]
  const int32_t* items;    // [n]
  const float* ratings;    // [n]
  int64_t num_users;
  int64_t num_items;
};

// How many entries each user draws, both ends included; or what the other set leaves.
struct SizeRange {
  int64_t low;
  int64_t high;

  bool is_rest() const { return low < 0; }
  bool is_none() const { return high == 0; }
};

struct Settings {
  SizeRange support;
  SizeRange query;  // is_none() without a query
  bool by_time;
  int64_t num_negatives;  // M
};

// An array that is not initialised, as it is about to be filled.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(new T[size]), size_(size) {}

  T* data() { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* release() { return data_.release(); }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

struct SampledEntries {
  Buffer<int64_t> offsets;          // [T + 1]
  Buffer<int64_t> items;            // [n]
  Buffer<float> targets;            // [n]
  Buffer<int64_t> negatives;        // [n, M]
  Buffer<int64_t> local_items;      // [n], positions in the batch's distinct items
  Buffer<int64_t> local_negatives;  // [n, M]
  int64_t max_size = 0;
  int64_t max_item = -1;  // negatives included
};

struct SampledBatch {
  std::vector<int64_t> unique_items;  // ascending
  SampledEntries support;
  SampledEntries query;
};

class Sampler {
 public:
  Sampler(const Log& log, const Settings& settings)
      : log_(log), settings_(settings), in_batch_(log.num_items), rated_(log.num_items) {}

  // The batch of the given users, all in [0, U), under the key of an epoch. May be called from
  // several threads, which take turns.
  SampledBatch sample(const int64_t* users, int64_t num_tasks, uint64_t epoch_key);

 private:
  struct Sizes {
    int64_t support;
    int64_t query;
  };

  Sizes draw_sizes(int64_t user, uint64_t epoch_key) const;
  void draw_rows(int64_t user, Sizes sizes, uint64_t epoch_key, int64_t* support, int64_t* query);
  void draw_negatives(int64_t user, Sizes sizes, uint64_t epoch_key, int64_t* support,
                      int64_t* query);
  void gather(const Buffer<int64_t>& rows, SampledEntries& entries);
  void localize(SampledEntries& entries) const;

  const Log log_;
  const Settings settings_;
  std::mutex mutex_;                // guards what follows, all of it scratch
  ItemSet in_batch_;                // empty between calls
  ItemSet rated_;                   // by one user; empty between users
  std::vector<int32_t> positions_;  // 0, 1, 2, … between users
  std::vector<int64_t> swapped_;
  std::vector<int64_t> unrated_;
};

}  // namespace metarec
