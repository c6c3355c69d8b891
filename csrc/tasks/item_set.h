// A set of item ids that gives its members in ascending order, and the position of each among them.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

// Counting bits is one instruction on every x86-64 processor of the last 15 years, but not on the
// first, which is what compilers build for unless told otherwise.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define METAREC_CLONE_FOR_POPCNT __attribute__((target_clones("popcnt", "default")))
#else
#define METAREC_CLONE_FOR_POPCNT
#endif

namespace metarec {

// One bit per item of the catalogue, and one per word of those: N items cost N/8 bytes, and what is
// done with n ids costs O(n), plus N/4096 for the listing, whatever the catalogue.
class ItemSet {
 public:
  explicit ItemSet(int64_t num_items)
      : words_((num_items + 63) / 64), rank_(words_.size()), used_((words_.size() + 63) / 64) {}

  void add(int64_t item) {
    words_[item >> 6] |= uint64_t{1} << (item & 63);
    used_[item >> 12] |= uint64_t{1} << ((item >> 6) & 63);
  }

  bool contains(int64_t item) const { return words_[item >> 6] >> (item & 63) & 1; }

  // Forgets every item that shares a word of bits with this one.
  void clear_around(int64_t item) {
    words_[item >> 6] = 0;
    used_[item >> 12] = 0;
  }

  // The members, at most `most`, ascending; `positions` works from here until the next change.
  std::vector<int64_t> list(int64_t most) {
    std::vector<int64_t> items;
    items.reserve(most);
    for (size_t block = 0; block < used_.size(); ++block) {
      for (uint64_t used = used_[block]; used != 0; used &= used - 1) {
        const size_t word = block * 64 + std::countr_zero(used);
        rank_[word] = static_cast<int32_t>(items.size());
        for (uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
          items.push_back(static_cast<int64_t>(word * 64 + std::countr_zero(bits)));
        }
      }
    }
    return items;
  }

  // positions[i] = how many members are smaller than items[i].
  METAREC_CLONE_FOR_POPCNT
  void positions(const int64_t* items, int64_t n, int64_t* positions) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t word = items[i] >> 6;
      const uint64_t smaller = words_[word] & ((uint64_t{1} << (items[i] & 63)) - 1);
      positions[i] = rank_[word] + std::popcount(smaller);
    }
  }

 private:
  std::vector<uint64_t> words_;  // [N / 64]
  std::vector<int32_t> rank_;    // [N / 64], members in all words before
  std::vector<uint64_t> used_;   // [N / 4096], which words are not zero
};

}  // namespace metarec
