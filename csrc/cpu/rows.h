// Products of a few rows that sit in L1: with a vector, with each other, and combinations of them.
#pragma once

#include "vector.h"

namespace metarec_fast::cpu {

// Rows of `width` numbers, wherever they lie: in a table, or in scratch. Each also has an entry
// `bias` that a fast vector's bias multiplies: 1 for items, 0 for differences of two.
template <typename scalar_t>
struct Rows {
  const scalar_t* const* at;  // [count], the last one again up to a multiple of kRowsAtOnce
  int64_t count, width;
  scalar_t bias;

  ALWAYS_INLINE const scalar_t* operator[](int64_t row) const { return at[row]; }
};

// As many sums at once hide the latency of an addition.
constexpr int64_t kRowsAtOnce = 4;

// Rows that follow each other.
template <typename scalar_t>
struct Stack {
  const scalar_t* values;
  int64_t stride;

  ALWAYS_INLINE const scalar_t* operator[](int64_t row) const { return values + row * stride; }
};

// Room for the addresses of `count` rows, and what makes them such as Rows needs them.
template <typename scalar_t>
ALWAYS_INLINE const scalar_t** take_addresses(Arena<scalar_t>& arena, int64_t count) {
  constexpr int64_t kEach = sizeof(const scalar_t*) / sizeof(scalar_t);
  return reinterpret_cast<const scalar_t**>(arena.take((count + kRowsAtOnce) * kEach));
}
template <typename scalar_t>
ALWAYS_INLINE void fill_up(const scalar_t** at, int64_t count) {
  for (int64_t r = count; r % kRowsAtOnce != 0; ++r) at[r] = at[count - 1];
}

template <typename scalar_t>
ALWAYS_INLINE Rows<scalar_t> rows_of(const Stack<scalar_t>& stack, int64_t count, int64_t width,
                                     scalar_t bias, Arena<scalar_t>& arena) {
  const scalar_t** at = take_addresses(arena, count);
  for (int64_t r = 0; r < count; ++r) at[r] = stack[r];
  fill_up(at, count);
  return {at, count, width, bias};
}

// Calls sink(j, products) for every register of products left · row_j, left · row_{j+1}, …; what
// lies beyond the last row is its product again, or zero. kWidth is rows.width where that is known.
template <typename scalar_t, int64_t kWidth = 0, typename Sink>
ALWAYS_INLINE void each_dots(const scalar_t* left, const Rows<scalar_t>& rows, const Sink& sink) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = kWidth > 0 ? kWidth : rows.width, count = rows.count;
  int64_t first = 0;
#if defined(__AVX__)
  if constexpr (std::is_same_v<scalar_t, float>)
    for (; first + kLane <= count; first += kLane) {
      const scalar_t* const* row = rows.at + first;
      Vector<scalar_t> sums[kLane] = {};
      for (int64_t i = 0; i < width; i += kLane) {
        const Vector<scalar_t> other = load(left + i);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLane; ++r) {
          const Vector<scalar_t> product = other * load(row[r] + i);
          sums[r] = kWidth > 0 && i == 0 ? product : sums[r] + product;
        }
      }
      sink(first, sum_lanes_of_each(sums));
    }
#endif
  for (; first < count; first += kLane) {
    Quad<scalar_t> quads[kLane / kRowsAtOnce] = {};
    for (int64_t q = 0; q < kLane / kRowsAtOnce && first + q * kRowsAtOnce < count; ++q) {
      const scalar_t* const* row = rows.at + first + q * kRowsAtOnce;
      const scalar_t *a = row[0], *b = row[1], *c = row[2], *d = row[3];
      Vector<scalar_t> sums[kRowsAtOnce] = {};
      for (int64_t i = 0; i < width; i += kLane) {
        const Vector<scalar_t> other = load(left + i);
        sums[0] += other * load(a + i);
        sums[1] += other * load(b + i);
        sums[2] += other * load(c + i);
        sums[3] += other * load(d + i);
      }
      quads[q] = sum_lanes<scalar_t>(sums);
    }
    sink(first, joined<scalar_t>(quads));
  }
}

// result[j] = left · row_j + shift + base[j],  j < count;  the last register is filled up with
// zeros. Without `base` it counts as zero. kWidth is rows.width where that is known.
template <typename scalar_t, int64_t kWidth = 0>
ALWAYS_INLINE void dots(const scalar_t* left, const Rows<scalar_t>& rows, scalar_t shift,
                        const scalar_t* base, scalar_t* result) {
  const int64_t count = rows.count;
  each_dots<scalar_t, kWidth>(
      left, rows, [=](int64_t j, const Vector<scalar_t>& products) ALWAYS_INLINE_LAMBDA {
        Vector<scalar_t> sums = products + shift;
        if (base != nullptr) sums += load(base + j);
        store(result + j) =
            j + kLanes<scalar_t> > count ? lower_lanes<scalar_t>(sums, count - j) : sums;
      });
}

// result[i, j] = left_i · row_j + shift for all i, j < count, which must be symmetric: left rows
// are rows, scaled column by column. Tiles of 4 × 4 below the diagonal, each written twice. result
// is [count, stride] with room for rows up to a multiple of 4; columns from count on are garbage.
template <typename scalar_t>
ALWAYS_INLINE void symmetric_products(const Rows<scalar_t>& left, const Rows<scalar_t>& rows,
                                      scalar_t shift, scalar_t* result, int64_t stride) {
  constexpr int64_t kTile = kRowsAtOnce;
  constexpr int64_t kHalf = kNativeBytes == 64 ? 4 : 2;  // rows whose sums fit into registers
  const int64_t width = rows.width;
  for (int64_t i = 0; i < rows.count; i += kTile)
    for (int64_t j = 0; j <= i; j += kTile) {
      Quad<scalar_t> tile[kTile];
      for (int64_t half = 0; half < kTile; half += kHalf) {
        Vector<scalar_t> sums[kHalf][kTile] = {};
        for (int64_t d = 0; d < width; d += kLanes<scalar_t>)
          for (int64_t a = 0; a < kHalf; ++a) {
            const Vector<scalar_t> one = load(left[i + half + a] + d);
            for (int64_t b = 0; b < kTile; ++b) sums[a][b] += one * load(rows[j + b] + d);
          }
        for (int64_t a = 0; a < kHalf; ++a) {
          tile[half + a] = sum_lanes<scalar_t>(sums[a]) + shift;
          put(result + (i + half + a) * stride + j, tile[half + a]);
        }
      }
      if (i == j) continue;
      const auto low01 = __builtin_shufflevector(tile[0], tile[1], 0, 4, 1, 5);
      const auto high01 = __builtin_shufflevector(tile[0], tile[1], 2, 6, 3, 7);
      const auto low23 = __builtin_shufflevector(tile[2], tile[3], 0, 4, 1, 5);
      const auto high23 = __builtin_shufflevector(tile[2], tile[3], 2, 6, 3, 7);
      put(result + j * stride + i, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
      put(result + (j + 1) * stride + i, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
      put(result + (j + 2) * stride + i, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
      put(result + (j + 3) * stride + i, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
    }
}

// A matrix by its strides.
template <typename scalar_t>
struct Coefficients {
  const scalar_t* values;
  int64_t row_stride, column_stride;

  ALWAYS_INLINE scalar_t at(int64_t row, int64_t column) const {
    return values[row * row_stride + column * column_stride];
  }
};

// kRows × kVectors registers of  result = C · basis, from column `first` on.
template <int64_t kRows, int64_t kVectors, typename scalar_t, typename Basis>
ALWAYS_INLINE void multiply_block(const Coefficients<scalar_t>& coefficients, int64_t row,
                                  const Basis& basis, int64_t first, int64_t count,
                                  scalar_t* result, int64_t result_stride, bool stream) {
  Vector<scalar_t> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < kRows; ++r) {
      const scalar_t coefficient = coefficients.at(row + r, j);
      for (int64_t v = 0; v < kVectors; ++v)
        sums[r][v] += coefficient * load(basis[j] + first + v * kLanes<scalar_t>);
    }
  scalar_t* out = result + row * result_stride + first;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v)
      store_out<scalar_t>(sums[r][v], out + r * result_stride + v * kLanes<scalar_t>, stream);
}

// kVectors registers of  result[m] = c[m] vector,  m < rows, from column `first` on.
template <int64_t kVectors, typename scalar_t>
ALWAYS_INLINE void scale_block(const Coefficients<scalar_t>& coefficients, int64_t rows,
                               const scalar_t* vector, int64_t first, scalar_t* result,
                               int64_t result_stride, bool stream) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  Vector<scalar_t> parts[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) parts[v] = load(vector + first + v * kLane);
  for (int64_t m = 0; m < rows; ++m) {
    const scalar_t coefficient = coefficients.at(m, 0);
    scalar_t* out = result + m * result_stride + first;
    for (int64_t v = 0; v < kVectors; ++v)
      store_out<scalar_t>(coefficient * parts[v], out + v * kLane, stream);
  }
}

// result[m] = Σ_j C[m, j] basis[j],  m < rows, j < count, over `width` numbers, a multiple of a
// register; basis is a Stack or Rows, result may lie anywhere.
template <typename scalar_t, typename Basis>
ALWAYS_INLINE void multiply(const Coefficients<scalar_t>& coefficients, int64_t rows,
                            const Basis& basis, int64_t count, int64_t width, scalar_t* result,
                            int64_t result_stride, bool stream = false) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  if (count == 1) {
    int64_t i = 0;
    for (; i + 8 * kLane <= width; i += 8 * kLane)
      scale_block<8>(coefficients, rows, basis[0], i, result, result_stride, stream);
    for (; i + 4 * kLane <= width; i += 4 * kLane)
      scale_block<4>(coefficients, rows, basis[0], i, result, result_stride, stream);
    for (; i < width; i += kLane)
      scale_block<1>(coefficients, rows, basis[0], i, result, result_stride, stream);
    return;
  }
  int64_t m = 0;
  for (; width == kLane && m + 8 <= rows; m += 8)  // eight chains of additions here, too
    multiply_block<8, 1>(coefficients, m, basis, 0, count, result, result_stride, stream);
  for (; m + 4 <= rows; m += 4) {
    int64_t i = 0;
    if constexpr (kNativeBytes == 64)  // which has 32 registers
      for (; i + 4 * kLane <= width; i += 4 * kLane)
        multiply_block<4, 4>(coefficients, m, basis, i, count, result, result_stride, stream);
    for (; i + 2 * kLane <= width; i += 2 * kLane)
      multiply_block<4, 2>(coefficients, m, basis, i, count, result, result_stride, stream);
    for (; i < width; i += kLane)
      multiply_block<4, 1>(coefficients, m, basis, i, count, result, result_stride, stream);
  }
  for (; m < rows; ++m) {
    int64_t i = 0;
    for (; i + 4 * kLane <= width; i += 4 * kLane)
      multiply_block<1, 4>(coefficients, m, basis, i, count, result, result_stride, stream);
    for (; i < width; i += kLane)
      multiply_block<1, 1>(coefficients, m, basis, i, count, result, result_stride, stream);
  }
}

// kVectors registers of  plus + Σ_j coefficients[j] rows[j], from column `first` on, in kChains
// chains of additions each: every kChains-th row in turn.
template <int64_t kVectors, int64_t kChains, typename scalar_t>
ALWAYS_INLINE void combine_block(const scalar_t* coefficients, const Rows<scalar_t>& rows,
                                 int64_t first, const scalar_t* plus, scalar_t* result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  Vector<scalar_t> sums[kChains][kVectors] = {};
  if (plus != nullptr)
    for (int64_t v = 0; v < kVectors; ++v) sums[0][v] = load(plus + first + v * kLane);
  int64_t j = 0;
  for (; j + kChains <= rows.count; j += kChains)
    for (int64_t c = 0; c < kChains; ++c) {
      const scalar_t coefficient = coefficients[j + c];
      const scalar_t* row = rows[j + c] + first;
      for (int64_t v = 0; v < kVectors; ++v) sums[c][v] += coefficient * load(row + v * kLane);
    }
  for (; j < rows.count; ++j)
    for (int64_t v = 0; v < kVectors; ++v)
      sums[0][v] += coefficients[j] * load(rows[j] + first + v * kLane);
  for (int64_t c = 1; c < kChains; ++c)
    for (int64_t v = 0; v < kVectors; ++v) sums[0][v] += sums[c][v];
  for (int64_t v = 0; v < kVectors; ++v) store(result + first + v * kLane) = sums[0][v];
}

// result = plus + Σ_j coefficients[j] row_j; without `plus` it counts as zero. kWidth is rows.width
// where that is known.
template <typename scalar_t, int64_t kWidth = 0>
ALWAYS_INLINE void combine_vectors(const scalar_t* coefficients, const Rows<scalar_t>& rows,
                                   const scalar_t* plus, scalar_t* result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const int64_t width = kWidth > 0 ? kWidth : rows.width;
  int64_t i = 0;
  for (; i + 8 * kLane <= width; i += 8 * kLane)
    combine_block<8, 1>(coefficients, rows, i, plus, result);
  for (; i + 4 * kLane <= width; i += 4 * kLane)
    combine_block<4, 2>(coefficients, rows, i, plus, result);
  for (; i < width; i += kLane) combine_block<1, 2>(coefficients, rows, i, plus, result);
}

// The same of fast vectors, (row_j, bias); the coefficients' last register is filled up with zeros.
template <typename scalar_t, int64_t kWidth = 0>
ALWAYS_INLINE void combine(const scalar_t* coefficients, const Rows<scalar_t>& rows,
                           const scalar_t* plus, scalar_t* result) {
  const int64_t width = kWidth > 0 ? kWidth : rows.width;
  const scalar_t before = plus == nullptr ? scalar_t{0} : plus[width];
  combine_vectors<scalar_t, kWidth>(coefficients, rows, plus, result);
  store(result + width) = first_lane(before + rows.bias * sum(coefficients, rows.count));
}

}  // namespace metarec_fast::cpu
