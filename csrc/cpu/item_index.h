// The distinct items of one task, numbered in the order in which they come.
#pragma once

#include <cstdint>
#include <vector>

namespace metarec_fast::cpu {

class ItemIndex {
 public:
  // Numbers `items`; afterwards `place[e]` is the number of entry e's item.
  void assign(const int64_t* items, int64_t count) {
    int64_t capacity = 16;
    while (capacity < 2 * count) capacity *= 2;
    mask_ = capacity - 1;
    slots_.assign(capacity, kFree);
    ids.clear();
    seen_ = 0;
    place.resize(count);
    for (int64_t e = 0; e < count; ++e) {
      seen_ |= bit_of(items[e]);
      int64_t& slot = slots_[find(items[e])];
      if (slot == kFree) {
        slot = static_cast<int64_t>(ids.size());
        ids.push_back(items[e]);
      }
      place[e] = slot;
    }
  }

  int64_t size() const { return static_cast<int64_t>(ids.size()); }

  // Whether no item comes twice: entry e is item e.
  bool all_distinct() const { return ids.size() == place.size(); }

  // The number of `item`, or −1.
  int64_t operator[](int64_t item) const {
    return (seen_ & bit_of(item)) == 0 ? kFree : slots_[find(item)];
  }

  std::vector<int64_t> ids, place;

 private:
  static constexpr int64_t kFree = -1;

  static uint64_t bit_of(int64_t item) { return uint64_t{1} << (item & 63); }

  // The slot that holds `item`, or the free one where it would be.
  int64_t find(int64_t item) const {
    uint64_t slot = static_cast<uint64_t>(item) * 0x9e3779b97f4a7c15u >> 32;
    for (;; ++slot) {
      const int64_t number = slots_[slot & mask_];
      if (number == kFree || ids[number] == item) return slot & mask_;
    }
  }

  std::vector<int64_t> slots_;  // numbers, or kFree
  uint64_t mask_ = 0;
  uint64_t seen_ = 0;  // the bits of all items: most others are told apart by theirs
};

}  // namespace metarec_fast::cpu
