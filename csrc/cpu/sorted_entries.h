// Entries in ascending order of their ids, those of equal ids in their own order.
//
// An entry is the number  id << entry_bits | position,  so that sorting moves 8 bytes an entry (16
// where ids are too large for that) and looks nothing up. A radix sort by digits of at most 11
// bits; chunks of entries are counted and moved by as many threads as there are, always to the same
// places.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "task_blocks.h"
#include "vector.h"

namespace metarec_fast::cpu {

template <typename Key>
class SortedEntries {
 public:
  // All `ids` [count] lie in [0, largest].
  SortedEntries(const int64_t* ids, int64_t count, int64_t largest)
      : count_(count), entry_bits_(bit_width(std::max<int64_t>(count - 1, 0))) {
    keys_.reset(new Key[count]);
    for (int64_t e = 0; e < count; ++e)
      keys_[e] = static_cast<Key>(ids[e]) << entry_bits_ | static_cast<Key>(e);
    sort(bit_width(largest));
  }

  static int bit_width(int64_t value) { return std::bit_width(static_cast<uint64_t>(value)); }

  int64_t size() const { return count_; }

  ALWAYS_INLINE int64_t id(int64_t place) const {
    return static_cast<int64_t>(keys_[place] >> entry_bits_);
  }
  ALWAYS_INLINE int64_t entry(int64_t place) const {
    return static_cast<int64_t>(keys_[place] & ((Key{1} << entry_bits_) - 1));
  }
  // Whether the entry at `place` is the first of its id.
  ALWAYS_INLINE bool begins(int64_t place) const {
    return place == 0 || id(place) != id(place - 1);
  }
  // The first place in [place, last) where an id begins; `last` if none does.
  ALWAYS_INLINE int64_t next_beginning(int64_t place, int64_t last) const {
    while (place < last && !begins(place)) ++place;
    return place;
  }
  // Where the entries of the id at `place` end.
  ALWAYS_INLINE int64_t end_of(int64_t place) const {
    int64_t end = place + 1;
    while (end < count_ && id(end) == id(place)) ++end;
    return end;
  }

 private:
  static constexpr int kDigitBits = 11;
  static constexpr int64_t kEntriesPerChunk = 16384;

  void sort(int id_bits) {
    const int passes = (id_bits + kDigitBits - 1) / kDigitBits;
    const int digit_bits = passes == 0 ? 0 : (id_bits + passes - 1) / passes;
    const int64_t digits = int64_t{1} << digit_bits;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t chunks = std::clamp<int64_t>(count_ / kEntriesPerChunk, 1, threads);
    std::unique_ptr<Key[]> moved(passes == 0 ? nullptr : new Key[count_]);
    std::vector<int64_t> next(chunks * digits);  // where a chunk's next key with a digit goes
    const auto begin = [&](int64_t chunk) { return chunk * count_ / chunks; };
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = entry_bits_ + pass * digit_bits;
      const auto digit = [&](Key key) { return static_cast<int64_t>(key >> shift) & (digits - 1); };
      std::fill(next.begin(), next.end(), 0);
      for_chunks(chunks, [&](int64_t chunk) {
        int64_t* counts = next.data() + chunk * digits;
        for (int64_t i = begin(chunk); i < begin(chunk + 1); ++i) ++counts[digit(keys_[i])];
      });
      int64_t total = 0;
      for (int64_t d = 0; d < digits; ++d)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total += std::exchange(next[chunk * digits + d], total);
      for_chunks(chunks, [&](int64_t chunk) {
        int64_t* places = next.data() + chunk * digits;
        for (int64_t i = begin(chunk); i < begin(chunk + 1); ++i)
          moved[places[digit(keys_[i])]++] = keys_[i];
      });
      keys_.swap(moved);
    }
  }

  template <typename Body>
  static void for_chunks(int64_t chunks, const Body& body) {
    if (chunks == 1) return body(0);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) body(chunk);
    });
  }

  int64_t count_;
  int entry_bits_;
  std::unique_ptr<Key[]> keys_;
};

// Calls body(entries) with the narrowest keys that hold ids up to `largest`.
template <typename Body>
void with_sorted_entries(const int64_t* ids, int64_t count, int64_t largest, const Body& body) {
  using Narrow = SortedEntries<uint64_t>;
  if (Narrow::bit_width(largest) + Narrow::bit_width(count) <= 64)
    body(Narrow(ids, count, largest));
  else
    body(SortedEntries<unsigned __int128>(ids, count, largest));
}

constexpr int64_t kEntriesPerRange = 1024;

// Calls body(first, last) for ranges of `count` places, whichever thread is free; a range owns the
// ids that begin in it.
template <typename Body>
void for_ranges(int64_t count, const Body& body) {
  const int64_t ranges = (count + kEntriesPerRange - 1) / kEntriesPerRange;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t, int64_t) {
    for (int64_t range; (range = next.fetch_add(1)) < ranges;)
      body(range * kEntriesPerRange, std::min((range + 1) * kEntriesPerRange, count));
  });
}

// sum = Σ rows[entry] over the entries in places [first, last), first to last.
template <typename scalar_t, typename Entries>
ALWAYS_INLINE void sum_group(const Entries& entries, int64_t first, int64_t last,
                             const scalar_t* rows, int64_t width, scalar_t* __restrict__ sum) {
  const scalar_t* row = rows + entries.entry(first) * width;
  for (int64_t d = 0; d < width; ++d) sum[d] = row[d];
  for (int64_t place = first + 1; place < last; ++place) {
    row = rows + entries.entry(place) * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
  }
}

constexpr int64_t kAhead = 16;  // entries whose rows are under way

// Calls ask(place) for the places that come up, kAhead further on, while [place, end) is computed;
// of an id with many entries only for the first ones, more than a cache holds helps nobody.
template <typename Entries, typename Ask>
ALWAYS_INLINE void look_ahead(const Entries& entries, int64_t place, int64_t end, const Ask& ask) {
  const int64_t last = std::min({end + kAhead, place + 4 * kAhead, entries.size()});
  for (int64_t soon = place + kAhead; soon < last; ++soon) ask(soon);
}

}  // namespace metarec_fast::cpu
