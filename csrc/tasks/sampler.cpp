#include "sampler.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "random.h"

namespace metarec {
namespace {

SampledEntries allocate(const std::vector<int64_t>& sizes, int64_t num_negatives) {
  SampledEntries entries;
  const int64_t num_tasks = static_cast<int64_t>(sizes.size());
  entries.offsets = Buffer<int64_t>(num_tasks + 1);
  entries.offsets[0] = 0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    entries.offsets[t + 1] = entries.offsets[t] + sizes[t];
    entries.max_size = std::max(entries.max_size, sizes[t]);
  }
  const int64_t n = entries.offsets[num_tasks];
  entries.items = Buffer<int64_t>(n);
  entries.targets = Buffer<float>(n);
  entries.local_items = Buffer<int64_t>(n);
  entries.negatives = Buffer<int64_t>(n * num_negatives);
  entries.local_negatives = Buffer<int64_t>(n * num_negatives);
  return entries;
}

int64_t draw_size(const SizeRange& range, Purpose purpose, int64_t user, uint64_t epoch_key) {
  const uint64_t bits = random_at(random_at(epoch_key, purpose), user);
  return range.low + below(bits, range.high - range.low + 1);
}

}  // namespace

SampledBatch Sampler::sample(const int64_t* users, int64_t num_tasks, uint64_t epoch_key) {
  std::vector<int64_t> support_sizes(num_tasks), query_sizes(num_tasks);
  for (int64_t t = 0; t < num_tasks; ++t) {
    const Sizes sizes = draw_sizes(users[t], epoch_key);
    support_sizes[t] = sizes.support;
    query_sizes[t] = sizes.query;
  }
  SampledBatch batch;
  SampledEntries& support = batch.support = allocate(support_sizes, settings_.num_negatives);
  SampledEntries& query = batch.query = allocate(query_sizes, settings_.num_negatives);
  Buffer<int64_t> support_rows(support.items.size()), query_rows(query.items.size());

  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t t = 0; t < num_tasks; ++t) {
    const Sizes sizes{support_sizes[t], query_sizes[t]};
    draw_rows(users[t], sizes, epoch_key, support_rows.data() + support.offsets[t],
              query_rows.data() + query.offsets[t]);
    if (settings_.num_negatives > 0) {
      draw_negatives(users[t], sizes, epoch_key,
                     support.negatives.data() + support.offsets[t] * settings_.num_negatives,
                     query.negatives.data() + query.offsets[t] * settings_.num_negatives);
    }
  }
  gather(support_rows, support);
  gather(query_rows, query);

  batch.unique_items =
      in_batch_.list((support.items.size() + query.items.size()) * (1 + settings_.num_negatives));
  localize(support);
  localize(query);
  for (const int64_t item : batch.unique_items) in_batch_.clear_around(item);
  return batch;
}

Sampler::Sizes Sampler::draw_sizes(int64_t user, uint64_t epoch_key) const {
  const auto& [support, query, by_time, num_negatives] = settings_;
  const int64_t n = log_.offsets[user + 1] - log_.offsets[user];
  const int64_t most = query.is_none() ? n : n - 1;  // something is left to predict
  if (support.is_rest()) {
    const int64_t q =
        query.is_none() ? 0 : std::min(draw_size(query, Purpose::kQuery, user, epoch_key), most);
    return {n - q, q};
  }
  const int64_t s = std::min(draw_size(support, Purpose::kSupport, user, epoch_key), most);
  if (query.is_none()) return {s, 0};
  if (query.is_rest()) return {s, n - s};
  return {s, std::min(draw_size(query, Purpose::kQuery, user, epoch_key), n - s)};
}

// A partial Fisher-Yates shuffle of 0 … n−1, which costs as much as it draws, whatever n: the
// positions it moved are put back afterwards.
void Sampler::draw_rows(int64_t user, Sizes sizes, uint64_t epoch_key, int64_t* support,
                        int64_t* query) {
  const int64_t begin = log_.offsets[user];
  const int64_t n = log_.offsets[user + 1] - begin;
  const auto [s, q] = sizes;
  if (settings_.by_time) {
    std::iota(support, support + s, begin);
    std::iota(query, query + q, begin + s);
    return;
  }
  if (static_cast<int64_t>(positions_.size()) < n) {
    const int64_t known = positions_.size();
    positions_.resize(n);
    std::iota(positions_.begin() + known, positions_.end(), static_cast<int32_t>(known));
    swapped_.resize(n);
  }
  int32_t* const position = positions_.data();
  const bool query_first = settings_.support.is_rest();
  const int64_t num_swaps = s + q < n ? s + q : query_first ? q : s;

  const uint64_t key = random_at(random_at(epoch_key, Purpose::kRows), user);
  for (int64_t j = 0; j < num_swaps; ++j) {
    swapped_[j] = j + below(random_at(key, j), n - j);
    std::swap(position[j], position[swapped_[j]]);
  }
  const auto copy = [&](int64_t first, int64_t size, int64_t* rows) {
    for (int64_t j = 0; j < size; ++j) rows[j] = begin + position[first + j];
  };
  copy(query_first ? q : 0, s, support);
  copy(query_first ? 0 : s, q, query);
  for (int64_t j = 0; j < num_swaps; ++j) {
    position[j] = static_cast<int32_t>(j);
    position[swapped_[j]] = static_cast<int32_t>(swapped_[j]);
  }
}

void Sampler::draw_negatives(int64_t user, Sizes sizes, uint64_t epoch_key, int64_t* support,
                             int64_t* query) {
  const int32_t* const first = log_.items + log_.offsets[user];
  const int32_t* const last = log_.items + log_.offsets[user + 1];
  const bool dense = 2 * (last - first) > log_.num_items;
  std::for_each(first, last, [this](int32_t item) { rated_.add(item); });
  if (dense) {
    unrated_.clear();
    for (int64_t item = 0; item < log_.num_items; ++item) {
      if (!rated_.contains(item)) unrated_.push_back(item);
    }
  }

  const uint64_t key = random_at(random_at(epoch_key, Purpose::kNegatives), user);
  const auto draw = [&](int64_t slot) {
    const uint64_t slot_key = random_at(key, slot);
    if (dense) return unrated_[below(random_at(slot_key, 0), unrated_.size())];
    for (uint64_t tries = 0;; ++tries) {
      const int64_t item = below(random_at(slot_key, tries), log_.num_items);
      if (!rated_.contains(item)) return item;
    }
  };
  const int64_t in_support = sizes.support * settings_.num_negatives;
  const int64_t in_query = sizes.query * settings_.num_negatives;
  for (int64_t j = 0; j < in_support; ++j) support[j] = draw(j);
  for (int64_t j = 0; j < in_query; ++j) query[j] = draw(in_support + j);
  std::for_each(first, last, [this](int32_t item) { rated_.clear_around(item); });
}

void Sampler::gather(const Buffer<int64_t>& rows, SampledEntries& entries) {
  // Apart from the drawing of rows, so that many of these scattered reads are under way at once.
  constexpr int64_t kAhead = 24;
  const int64_t n = entries.items.size();
  int64_t largest = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t soon = rows[std::min(i + kAhead, n - 1)];
    __builtin_prefetch(log_.items + soon);
    __builtin_prefetch(log_.ratings + soon);
    const int64_t item = log_.items[rows[i]];
    entries.items[i] = item;
    entries.targets[i] = log_.ratings[rows[i]];
    largest = std::max(largest, item);
    in_batch_.add(item);
  }
  for (int64_t i = 0; i < entries.negatives.size(); ++i) {
    largest = std::max(largest, entries.negatives[i]);
    in_batch_.add(entries.negatives[i]);
  }
  entries.max_item = largest;
}

void Sampler::localize(SampledEntries& entries) const {
  in_batch_.positions(entries.items.data(), entries.items.size(), entries.local_items.data());
  in_batch_.positions(entries.negatives.data(), entries.negatives.size(),
                      entries.local_negatives.data());
}

}  // namespace metarec
