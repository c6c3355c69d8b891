// Products of a few rows that sit in L1, written with the compiler's vector types, and the buffers
// they live in.
//
// A fast vector (u, c) of D + 1 numbers is stored as  u[0 … D) 0 … 0 | c 0 … 0 : u padded to whole
// registers (`width`), then one more register whose first number is the bias (`stride` in all).
// Item rows are `width` numbers each; the entry that c multiplies is the same for all of them.
// Padding is zero and stays zero under everything done here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// One copy of a function for each kind of machine, the right one picked when the library loads.
// What it calls must be ALWAYS_INLINE, or it is compiled for the oldest machine only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace metarec_fast::cpu {

constexpr int64_t kRegisterBytes = 64;

template <typename scalar_t>
constexpr int64_t kLanes = kRegisterBytes / static_cast<int64_t>(sizeof(scalar_t));

template <typename scalar_t>
struct Register {
  typedef scalar_t type __attribute__((vector_size(kRegisterBytes), may_alias));
  typedef scalar_t unaligned
      __attribute__((vector_size(kRegisterBytes), may_alias, aligned(sizeof(scalar_t))));
  typedef scalar_t quad __attribute__((vector_size(4 * sizeof(scalar_t)), may_alias));
};
template <typename scalar_t>
using Vector = typename Register<scalar_t>::type;
template <typename scalar_t>
using Quad = typename Register<scalar_t>::quad;  // four numbers

template <typename scalar_t>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<scalar_t> - 1) / kLanes<scalar_t> * kLanes<scalar_t>;
}

// How fast vectors of D + 1 numbers lie in memory.
template <typename scalar_t>
struct Layout {
  int64_t dim;     // D
  int64_t width;   // where the bias is
  int64_t stride;  // numbers in all

  explicit Layout(int64_t dim_in)
      : dim(dim_in), width(padded<scalar_t>(dim_in)), stride(width + kLanes<scalar_t>) {}
};

// Register-aligned scratch that is handed out piece by piece and taken back all at once.
template <typename scalar_t>
class Arena {
 public:
  // Uninitialised, except for the padding after the last of `count` numbers.
  ALWAYS_INLINE scalar_t* take(int64_t count) {
    const int64_t size = std::max(padded<scalar_t>(count), kLanes<scalar_t>);
    if (used_ + size > capacity_) grow(size);
    scalar_t* result = data_ + used_;
    used_ += size;
    *reinterpret_cast<Vector<scalar_t>*>(result + size - kLanes<scalar_t>) = Vector<scalar_t>{};
    return result;
  }

  ALWAYS_INLINE scalar_t* take_zeros(int64_t count) {
    scalar_t* result = take(count);
    for (int64_t i = 0; i < count; i += kLanes<scalar_t>)
      *reinterpret_cast<Vector<scalar_t>*>(result + i) = Vector<scalar_t>{};
    return result;
  }

  // Takes everything back; what had to be allocated piecemeal becomes one piece.
  void reset() {
    if (blocks_.size() > 1) {
      const int64_t total = total_;
      blocks_.clear();
      capacity_ = used_ = total_ = 0;
      grow(total);
    }
    used_ = 0;
  }

 private:
  __attribute__((noinline)) void grow(int64_t size) {
    const int64_t count = std::max(size, 2 * total_);
    blocks_.emplace_back(new std::byte[count * sizeof(scalar_t) + kRegisterBytes]);
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
    data_ = reinterpret_cast<scalar_t*>((address + kRegisterBytes - 1) / kRegisterBytes *
                                        kRegisterBytes);
    capacity_ = count;
    used_ = 0;
    total_ += count;
  }

  std::vector<std::unique_ptr<std::byte[]>> blocks_;
  scalar_t* data_ = nullptr;
  int64_t capacity_ = 0, used_ = 0, total_ = 0;
};

template <typename scalar_t>
ALWAYS_INLINE const Vector<scalar_t>& load(const scalar_t* address) {
  return *reinterpret_cast<const Vector<scalar_t>*>(address);
}

template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t>& store(scalar_t* address) {
  return *reinterpret_cast<Vector<scalar_t>*>(address);
}

template <typename scalar_t>
ALWAYS_INLINE void put(scalar_t* address, const Quad<scalar_t>& four) {
  *reinterpret_cast<Quad<scalar_t>*>(address) = four;
}

template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> broadcast(scalar_t value) {
  return Vector<scalar_t>{} + value;
}

// `count` numbers from anywhere into scratch, the last register filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE void copy_in(const scalar_t* source, int64_t count, scalar_t* result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane)
    store(result + i) =
        *reinterpret_cast<const typename Register<scalar_t>::unaligned*>(source + i);
  if (i == count) return;
  store(result + i) = Vector<scalar_t>{};
  for (; i < count; ++i) result[i] = source[i];
}

// The same from bfloat16, the upper halves of float32.
ALWAYS_INLINE void widen_in(const uint16_t* source, int64_t count, float* result) {
  typedef uint16_t Narrow __attribute__((vector_size(32), may_alias, aligned(2)));
  typedef uint32_t Wide __attribute__((vector_size(64), may_alias));
  constexpr int64_t kLane = kLanes<float>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane)
    *reinterpret_cast<Wide*>(result + i) =
        __builtin_convertvector(*reinterpret_cast<const Narrow*>(source + i), Wide) << 16;
  if (i == count) return;
  store(result + i) = Vector<float>{};
  for (; i < count; ++i) {
    const uint32_t bits = uint32_t{source[i]} << 16;
    std::memcpy(result + i, &bits, sizeof(bits));
  }
}

// `count` numbers from scratch to anywhere.
template <typename scalar_t>
ALWAYS_INLINE void copy_out(const scalar_t* source, int64_t count, scalar_t* result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane)
    *reinterpret_cast<typename Register<scalar_t>::unaligned*>(result + i) = load(source + i);
  for (; i < count; ++i) result[i] = source[i];
}

// result = factor · source  and  result += source,  `count` numbers anywhere
template <typename scalar_t>
ALWAYS_INLINE void copy_scaled(const scalar_t* source, scalar_t factor, int64_t count,
                               scalar_t* result) {
  typedef typename Register<scalar_t>::unaligned Anywhere;
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane)
    *reinterpret_cast<Anywhere*>(result + i) =
        factor * *reinterpret_cast<const Anywhere*>(source + i);
  for (; i < count; ++i) result[i] = factor * source[i];
}
template <typename scalar_t>
ALWAYS_INLINE void add(const scalar_t* source, int64_t count, scalar_t* result) {
  typedef typename Register<scalar_t>::unaligned Anywhere;
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane)
    *reinterpret_cast<Anywhere*>(result + i) += *reinterpret_cast<const Anywhere*>(source + i);
  for (; i < count; ++i) result[i] += source[i];
}

// The cache lines that hold `width` numbers will be needed soon, to be read or (kWrite) changed.
template <bool kWrite, typename scalar_t>
ALWAYS_INLINE void prefetch_row(const scalar_t* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, kWrite);
}

// Lane i of the result is the sum of all lanes whose number is i modulo 4.
ALWAYS_INLINE Quad<float> fold(const Vector<float>& v) {
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
ALWAYS_INLINE Quad<double> fold(const Vector<double>& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

// Σ of all lanes: always the same order of additions, on every machine.
template <typename scalar_t>
ALWAYS_INLINE scalar_t sum_lanes(const Vector<scalar_t>& vector) {
  const Quad<scalar_t> quad = fold(vector);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

// The sums of four vectors at once, in that same order.
template <typename scalar_t>
ALWAYS_INLINE Quad<scalar_t> sum_lanes(const Vector<scalar_t>* vectors) {
  const Quad<scalar_t> a = fold(vectors[0]), b = fold(vectors[1]), c = fold(vectors[2]),
                       d = fold(vectors[3]);
  const Quad<scalar_t> ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad<scalar_t> cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Rows of `width` numbers, one after the other. Each also has an entry `bias` that a fast vector's
// bias multiplies: 1 for items, 0 for differences of two.
template <typename scalar_t>
struct Rows {
  const scalar_t* values;  // [count, width]
  int64_t count, width;
  scalar_t bias;
};

// Σ a_i b_i over `width` numbers, a multiple of a register.
template <typename scalar_t>
ALWAYS_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t width) {
  Vector<scalar_t> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<scalar_t>) sum += load(a + i) * load(b + i);
  return sum_lanes<scalar_t>(sum);
}

// result[j] = left · row_j + shift,  j < count;  the last register is filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE void dots(const scalar_t* left, const Rows<scalar_t>& rows, scalar_t shift,
                        scalar_t* result) {
  constexpr int64_t kRows = 4;  // as many sums at once hide the latency of an addition
  const scalar_t* values = rows.values;
  const int64_t width = rows.width, count = rows.count, last = count - 1;
  if (count == 0) return;
  store(result + padded<scalar_t>(count) - kLanes<scalar_t>) = Vector<scalar_t>{};
  for (int64_t j = 0; j < count; j += kRows) {
    const scalar_t* row[kRows];  // beyond the end: the last row again
    for (int64_t r = 0; r < kRows; ++r) row[r] = values + std::min(j + r, last) * width;
    Vector<scalar_t> sums[kRows] = {};
    for (int64_t i = 0; i < width; i += kLanes<scalar_t>)
      for (int64_t r = 0; r < kRows; ++r) sums[r] += load(left + i) * load(row[r] + i);
    put(result + j, sum_lanes<scalar_t>(sums) + shift);
  }
  for (int64_t j = count; j % kRows != 0; ++j) result[j] = 0;
}

// result[i, j] = left_i · row_j + shift for all i, j < count, which must be symmetric: left rows
// are rows, scaled column by column. Tiles of 4 × 4 below the diagonal, each written twice. result
// is [count, stride] with room for rows up to a multiple of 4; columns from count on are garbage.
template <typename scalar_t>
ALWAYS_INLINE void symmetric_products(const scalar_t* left, const Rows<scalar_t>& rows,
                                      scalar_t shift, scalar_t* result, int64_t stride) {
  constexpr int64_t kTile = 4, kHalf = 2;  // half a tile's sums fit into registers
  const int64_t width = rows.width, last = rows.count - 1;
  for (int64_t i = 0; i < rows.count; i += kTile)
    for (int64_t j = 0; j <= i; j += kTile) {
      Quad<scalar_t> tile[kTile];
      for (int64_t half = 0; half < kTile; half += kHalf) {
        Vector<scalar_t> sums[kHalf][kTile] = {};
        for (int64_t d = 0; d < width; d += kLanes<scalar_t>)
          for (int64_t a = 0; a < kHalf; ++a) {
            const Vector<scalar_t> one = load(left + std::min(i + half + a, last) * width + d);
            for (int64_t b = 0; b < kTile; ++b)
              sums[a][b] += one * load(rows.values + std::min(j + b, last) * width + d);
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

// A vector to anywhere; where `stream`, past the caches, to an address that is a multiple of 16.
template <typename scalar_t>
ALWAYS_INLINE void store_out(const Vector<scalar_t>& vector, scalar_t* address, bool stream) {
#ifdef __SSE2__
  if (stream) {
    float parts[kRegisterBytes / 4];
    std::memcpy(parts, &vector, sizeof(parts));
    for (int64_t i = 0; i < kRegisterBytes / 4; i += 4)
      _mm_stream_ps(reinterpret_cast<float*>(address) + i, _mm_loadu_ps(parts + i));
    return;
  }
#endif
  *reinterpret_cast<typename Register<scalar_t>::unaligned*>(address) = vector;
}

// What was streamed is there for others to see.
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// kRows × kVectors registers of  result = C · basis.
template <int64_t kRows, int64_t kVectors, typename scalar_t>
ALWAYS_INLINE void multiply_block(const Coefficients<scalar_t>& coefficients, int64_t row,
                                  const scalar_t* basis, int64_t basis_stride, int64_t count,
                                  scalar_t* result, int64_t result_stride, bool stream) {
  Vector<scalar_t> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < kRows; ++r) {
      const scalar_t coefficient = coefficients.at(row + r, j);
      for (int64_t v = 0; v < kVectors; ++v)
        sums[r][v] += coefficient * load(basis + j * basis_stride + v * kLanes<scalar_t>);
    }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v)
      store_out<scalar_t>(sums[r][v], result + r * result_stride + v * kLanes<scalar_t>, stream);
}

// result[m] = Σ_j C[m, j] basis[j],  m < rows, j < count, over `width` numbers, a multiple of a
// register; result may lie anywhere.
template <typename scalar_t>
ALWAYS_INLINE void multiply(const Coefficients<scalar_t>& coefficients, int64_t rows,
                            const scalar_t* basis, int64_t basis_stride, int64_t count,
                            int64_t width, scalar_t* result, int64_t result_stride,
                            bool stream = false) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    int64_t i = 0;
    for (; i + 2 * kLane <= width; i += 2 * kLane)
      multiply_block<4, 2>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride, stream);
    for (; i < width; i += kLane)
      multiply_block<4, 1>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride, stream);
  }
  for (; m < rows; ++m) {
    int64_t i = 0;
    for (; i + 4 * kLane <= width; i += 4 * kLane)
      multiply_block<1, 4>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride, stream);
    for (; i < width; i += kLane)
      multiply_block<1, 1>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride, stream);
  }
}

// Σ of `count` numbers whose last register is filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE scalar_t sum(const scalar_t* values, int64_t count) {
  Vector<scalar_t> total = {};
  for (int64_t i = 0; i < count; i += kLanes<scalar_t>) total += load(values + i);
  return sum_lanes<scalar_t>(total);
}

// kVectors registers of  Σ_j coefficients[j] rows[j], even and odd j apart: two chains of
// additions.
template <int64_t kVectors, typename scalar_t>
ALWAYS_INLINE void combine_block(const scalar_t* coefficients, const scalar_t* rows, int64_t width,
                                 int64_t count, scalar_t* result) {
  Vector<scalar_t> even[kVectors] = {}, odd[kVectors] = {};
  int64_t j = 0;
  for (; j + 2 <= count; j += 2)
    for (int64_t v = 0; v < kVectors; ++v) {
      const scalar_t* at = rows + j * width + v * kLanes<scalar_t>;
      even[v] += coefficients[j] * load(at);
      odd[v] += coefficients[j + 1] * load(at + width);
    }
  if (j < count)
    for (int64_t v = 0; v < kVectors; ++v)
      even[v] += coefficients[j] * load(rows + j * width + v * kLanes<scalar_t>);
  for (int64_t v = 0; v < kVectors; ++v) store(result + v * kLanes<scalar_t>) = even[v] + odd[v];
}

// result = Σ_j coefficients[j] (row_j, bias), a fast vector; the coefficients' last register is
// filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE void combine(const scalar_t* coefficients, const Rows<scalar_t>& rows,
                           scalar_t* result) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + 4 * kLane <= rows.width; i += 4 * kLane)
    combine_block<4>(coefficients, rows.values + i, rows.width, rows.count, result + i);
  for (; i < rows.width; i += kLane)
    combine_block<1>(coefficients, rows.values + i, rows.width, rows.count, result + i);
  store(result + rows.width) = Vector<scalar_t>{};
  result[rows.width] = rows.bias * sum(coefficients, rows.count);
}

}  // namespace metarec_fast::cpu
