// Rows of the item table, and of asking for them before they are needed: they lie all over it.
#pragma once

#include "../tensor.h"
#include "vector.h"

namespace metarec_fast::cpu {

// Rows [N, D] of scalar_t, or stored as bfloat16 and widened to float32 as they are read.
template <typename scalar_t>
class ItemTable {
 public:
  ItemTable(const Tensor& table, int64_t dim)
      : data(static_cast<const std::byte*>(table.const_data_ptr())),
        row_bytes(dim * table.element_size()),
        dim_(dim),
        narrow_(table.scalar_type() == ScalarType::BFloat16),
        in_place_(!narrow_ && dim % kLanes<scalar_t> == 0 &&
                  reinterpret_cast<uintptr_t>(data) % kRegisterBytes<scalar_t> == 0) {}

  // A row, its last register filled up with zeros.
  ALWAYS_INLINE void read(int64_t item, scalar_t* result) const {
    const std::byte* row = data + item * row_bytes;
    if constexpr (std::is_same_v<scalar_t, float>)
      if (narrow_) return widen_in(reinterpret_cast<const uint16_t*>(row), dim_, result);
    copy_in(reinterpret_cast<const scalar_t*>(row), dim_, result);
  }

  // Whether a row is, where it lies, what `read` would make of it.
  bool in_place() const { return in_place_; }
  ALWAYS_INLINE const scalar_t* row(int64_t item) const {
    return reinterpret_cast<const scalar_t*>(data + item * row_bytes);
  }

  const std::byte* const data;
  const int64_t row_bytes;

 private:
  int64_t dim_;
  bool narrow_, in_place_;
};

// Asks for rows and biases of a list of items, a few at a time: all at once they would wait for
// each other, and what is computed meanwhile would wait for them. How many rounds and which cache
// are best differs from machine to machine (benchmarks/notes.md); one with AVX-512 is taken for a
// Xeon, one without for a Zen.
class RowsAhead {
 public:
  template <typename scalar_t>
  void start(const ItemTable<scalar_t>& table, const scalar_t* item_bias) {
    rows_ = table.data;
    row_bytes_ = table.row_bytes;
    biases_ = reinterpret_cast<const std::byte*>(item_bias);
    bias_bytes_ = sizeof(scalar_t);
    lists_ = list_ = 0;
    total_ = 0;
  }

  void add(const int64_t* items, int64_t count) {
    if (count == 0) return;
    begins_[lists_] = items;
    ends_[lists_++] = items + count;
    total_ += count;
  }

  // In so many rounds at most, each of which is a call of `some`.
  void share_out(int64_t rounds) {
    const int64_t num = std::clamp(rounds, int64_t{1}, kMostRounds);
    a_round_ = (total_ + num - 1) / num;
  }

  void stop() { lists_ = list_ = 0; }

  ALWAYS_INLINE void some() {
    if (list_ < lists_) ask();
  }

 private:
  __attribute__((noinline)) void ask() {
    switch (row_bytes_) {  // the usual ones without a loop over their lines
      case 2 * kCacheLine:
        return ask_lines<2>();
      case 4 * kCacheLine:
        return ask_lines<4>();
      case 8 * kCacheLine:
        return ask_lines<8>();
    }
    ask_lines<0>();
  }

  template <int64_t kLines>
  ALWAYS_INLINE void ask_lines() {
    const int64_t row_bytes = kLines > 0 ? kLines * kCacheLine : row_bytes_;
    for (int64_t left = a_round_; left > 0 && list_ < lists_;) {
      const int64_t* item = begins_[list_];
      const int64_t* end = std::min(item + left, ends_[list_]);
      left -= end - item;
      for (; item < end; ++item) {
        const std::byte* row = rows_ + *item * row_bytes;
        for (int64_t at = 0; at < row_bytes; at += kCacheLine)
          __builtin_prefetch(row + at, 0, kNear);
        __builtin_prefetch(biases_ + *item * bias_bytes_, 0, kNear);
      }
      begins_[list_] = item;
      list_ += item == ends_[list_];
    }
  }

#if defined(__AVX512F__)
  static constexpr int64_t kMostRounds = 5;
  static constexpr int kNear = 3;  // as prefetch_row has it
#else
  static constexpr int64_t kMostRounds = 2;
  static constexpr int kNear = 2;
#endif
  static constexpr int kMostLists = 4;  // items and negatives, of support and query
  const std::byte *rows_ = nullptr, *biases_ = nullptr;
  int64_t row_bytes_ = 0, bias_bytes_ = 0, total_ = 0, a_round_ = 0;
  const int64_t* begins_[kMostLists];
  const int64_t* ends_[kMostLists];
  int lists_ = 0, list_ = 0;
};

}  // namespace metarec_fast::cpu
