// Products and transposes of small matrices that sit in L1 or L2.
//
// A matrix lies row by row, each row in whole registers, the rest of the last one filled up with
// zeros. Of a product the left factor is read number by number, so it may as well be transposed;
// the right one is read register by register.
#pragma once

#include "rows.h"

namespace metarec_fast::cpu {

// Registers of a tile's rows, of kRowsAtOnce rows: sums, a row of the right factor and a number of
// the left one have to fit into 32 or 16 registers.
constexpr int64_t kTileVectors = kNativeBytes == 64 ? 4 : 2;

// What a product is added to: rows, one row again and again (stride 0), or nothing (nullptr).
template <typename scalar_t>
struct Start {
  const scalar_t* values = nullptr;
  int64_t stride = 0;
};

template <int64_t kRows, int64_t kVectors, typename scalar_t>
ALWAYS_INLINE void product_tile(const scalar_t* left, int64_t row_stride, int64_t column_stride,
                                const scalar_t* right, int64_t right_stride, int64_t count,
                                scalar_t factor, const Start<scalar_t>& start, scalar_t* result,
                                int64_t result_stride) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  Vector<scalar_t> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j, left += column_stride, right += right_stride)
    for (int64_t r = 0; r < kRows; ++r) {
      const scalar_t number = left[r * row_stride];
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += number * load(right + v * kLane);
    }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      Vector<scalar_t> sum = factor * sums[r][v];
      if (start.values != nullptr) sum += load(start.values + r * start.stride + v * kLane);
      store(result + r * result_stride + v * kLane) = sum;
    }
}

// result = start + factor · left right,  result [rows, width], left [rows, count] by its strides,
// right [count, width]; width is a multiple of a register. start may be result.
template <typename scalar_t>
__attribute__((noinline)) void add_product(const Coefficients<scalar_t>& left, int64_t rows,
                                           const scalar_t* right, int64_t right_stride,
                                           int64_t count, int64_t width, scalar_t factor,
                                           const Start<scalar_t>& start, scalar_t* result,
                                           int64_t result_stride) {
  constexpr int64_t kLane = kLanes<scalar_t>, kWide = kTileVectors * kLane;
  const auto tiles = [&]<int64_t kRows>(int64_t row) ALWAYS_INLINE_LAMBDA {
    const auto tile = [&]<int64_t kVectors>(int64_t column) ALWAYS_INLINE_LAMBDA {
      const Start<scalar_t> from{
          start.values == nullptr ? nullptr : start.values + row * start.stride + column,
          start.stride};
      product_tile<kRows, kVectors>(left.values + row * left.row_stride, left.row_stride,
                                    left.column_stride, right + column, right_stride, count, factor,
                                    from, result + row * result_stride + column, result_stride);
    };
    int64_t i = 0;
    for (; i + kWide <= width; i += kWide) tile.template operator()<kTileVectors>(i);
    for (; i < width; i += kLane) tile.template operator()<1>(i);
  };
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) tiles.template operator()<kRowsAtOnce>(row);
  for (; row < rows; ++row) tiles.template operator()<1>(row);
}

// result[r, 0] = start[r, 0] + factor · left_r · right over `width` numbers; the rest of the first
// register of every row becomes zero. `rows` is a multiple of kRowsAtOnce.
template <typename scalar_t>
__attribute__((noinline)) void add_row_dots(const scalar_t* left, int64_t left_stride, int64_t rows,
                                            const scalar_t* right, int64_t width, scalar_t factor,
                                            const Start<scalar_t>& start, scalar_t* result,
                                            int64_t result_stride) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const scalar_t* at = left + row * left_stride;
    Vector<scalar_t> sums[kRowsAtOnce] = {};
    for (int64_t i = 0; i < width; i += kLanes<scalar_t>)
      for (int64_t r = 0; r < kRowsAtOnce; ++r)
        sums[r] += load(right + i) * load(at + r * left_stride + i);
    const Quad<scalar_t> dots = factor * sum_lanes<scalar_t>(sums);
    for (int64_t r = row; r < row + kRowsAtOnce; ++r) {
      const scalar_t before = start.values == nullptr ? 0 : start.values[r * start.stride];
      store(result + r * result_stride) = first_lane<scalar_t>(before + dots[r - row]);
    }
  }
}

// The registers a and b lane by lane in turn: the lower halves, or the upper ones.
template <bool kUpper, typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> interleaved(const Vector<scalar_t>& a, const Vector<scalar_t>& b) {
  if constexpr (kLanes<scalar_t> == 16) {
    if constexpr (kUpper)
      return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                     31);
    else
      return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (kLanes<scalar_t> == 8) {
    if constexpr (kUpper)
      return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    else
      return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else {
    if constexpr (kUpper)
      return __builtin_shufflevector(a, b, 2, 6, 3, 7);
    else
      return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  }
}

// result [padded(columns), padded(rows)] = sourceᵀ, source [rows, columns]. Interleaving row i with
// row i + n/2, log n times, transposes a block of n × n.
template <typename scalar_t>
__attribute__((noinline)) void transpose(const scalar_t* source, int64_t source_stride,
                                         int64_t rows, int64_t columns, scalar_t* result,
                                         int64_t result_stride) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  for (int64_t r = 0; r < rows; r += kLane)
    for (int64_t c = 0; c < columns; c += kLane) {
      Vector<scalar_t> block[kLane], next[kLane];
      const scalar_t* from = source + r * source_stride + c;
      if (r + kLane <= rows)
        for (int64_t i = 0; i < kLane; ++i) block[i] = load(from + i * source_stride);
      else
        for (int64_t i = 0; i < kLane; ++i)
          block[i] = r + i < rows ? load(from + i * source_stride) : Vector<scalar_t>{};
      const auto interleave = [](const Vector<scalar_t>* in,
                                 Vector<scalar_t>* out) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLane / 2; ++i) {
          out[2 * i] = interleaved<false, scalar_t>(in[i], in[i + kLane / 2]);
          out[2 * i + 1] = interleaved<true, scalar_t>(in[i], in[i + kLane / 2]);
        }
      };
      interleave(block, next);
      interleave(next, block);
      if constexpr (kLane >= 8) interleave(block, next);
      if constexpr (kLane == 16) interleave(next, block);
      const Vector<scalar_t>* done = kLane == 8 ? next : block;
      for (int64_t i = 0; i < kLane; ++i) store(result + (c + i) * result_stride + r) = done[i];
    }
}

// sums[i] += factor · Σ_r rows[r, i]
template <typename scalar_t>
ALWAYS_INLINE void add_row_sums(const scalar_t* rows, int64_t count, int64_t width, scalar_t factor,
                                scalar_t* sums) {
  for (int64_t i = 0; i < width; i += kLanes<scalar_t>) {
    Vector<scalar_t> sum = {};
    for (int64_t r = 0; r < count; ++r) sum += load(rows + r * width + i);
    store(sums + i) += factor * sum;
  }
}

}  // namespace metarec_fast::cpu
