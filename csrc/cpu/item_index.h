// The distinct items of one task, numbered in the order in which they come.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace metarec_fast::cpu {

class ItemIndex {
 public:
  // Numbers `items`; afterwards `place[e]` is the number of entry e's item.
  void assign(const int64_t* items, int64_t count) {
    ids.assign(items, items + count);
    place.resize(count);
    seen_.fill(0);
    uint64_t met = 0;
    for (int64_t e = 0; e < count; ++e) {
      uint64_t& word = seen_[word_of(items[e])];
      met |= word & bit_of(items[e]);
      word |= bit_of(items[e]);
      place[e] = e;
    }
    hashed_ = met != 0;
    if (hashed_) hash();
  }

  int64_t size() const { return static_cast<int64_t>(ids.size()); }

  // Whether no item comes twice: entry e is item e.
  bool all_distinct() const { return ids.size() == place.size(); }

  // The number of `item`, or −1.
  int64_t operator[](int64_t item) const {
    if ((seen_[word_of(item)] & bit_of(item)) == 0) return kFree;
    if (hashed_) return slots_[find(item)];
    const auto found = std::find(ids.begin(), ids.end(), item);
    return found == ids.end() ? kFree : found - ids.begin();
  }

  std::vector<int64_t> ids, place;

 private:
  static constexpr int64_t kFree = -1;

  static uint64_t word_of(int64_t item) { return static_cast<uint64_t>(item) >> 6 & 15; }
  static uint64_t bit_of(int64_t item) { return uint64_t{1} << (item & 63); }

  // Numbers `ids`, some of which may be the same, by a hash table.
  __attribute__((noinline)) void hash() {
    const int64_t count = size();
    int64_t capacity = 16;
    while (capacity < 2 * count) capacity *= 2;
    mask_ = capacity - 1;
    slots_.assign(capacity, kFree);
    int64_t numbered = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t item = ids[e];
      int64_t& slot = slots_[find(item)];
      if (slot == kFree) {
        slot = numbered;
        ids[numbered++] = item;
      }
      place[e] = slot;
    }
    ids.resize(numbered);
  }

  // The slot that holds `item`, or the free one where it would be.
  int64_t find(int64_t item) const {
    uint64_t slot = static_cast<uint64_t>(item) * 0x9e3779b97f4a7c15u >> 32;
    for (;; ++slot) {
      const int64_t number = slots_[slot & mask_];
      if (number == kFree || ids[number] == item) return slot & mask_;
    }
  }

  // A bit for each remainder of an item modulo 1024. Where each has one of its own, as in most
  // tasks, no item comes twice and no table is needed; most other items are told apart by theirs.
  std::array<uint64_t, 16> seen_;
  bool hashed_ = false;
  std::vector<int64_t> slots_;  // numbers, or kFree
  uint64_t mask_ = 0;
};

}  // namespace metarec_fast::cpu
