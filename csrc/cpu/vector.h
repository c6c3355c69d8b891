// Registers of numbers, written with the compiler's vector types, and the buffers they live in.
//
// A fast vector (u, c) of D + 1 numbers is stored as  u[0 … D) 0 … 0 | c 0 … 0 : u padded to whole
// registers (`width`), then one more register whose first number is the bias (`stride` in all).
// Item rows are `width` numbers each; the entry that c multiplies is the same for all of them.
// Padding is zero and stays zero under everything done here.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace metarec_fast::cpu {

// All of this is compiled once for each kind of machine, into libraries of their own; which of them
// to load is known when the package is imported (metarec_fast/_library.py).
#if defined(__AVX512F__)
constexpr int64_t kNativeBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kNativeBytes = 32;
#else
constexpr int64_t kNativeBytes = 16;
#endif
constexpr int64_t kCacheLine = 64;

// A register of at least four numbers: doubles take two where it has only 16 bytes.
template <typename scalar_t>
constexpr int64_t kRegisterBytes =
    std::max<int64_t>(kNativeBytes, 4 * static_cast<int64_t>(sizeof(scalar_t)));

template <typename scalar_t>
constexpr int64_t kLanes = kRegisterBytes<scalar_t> / static_cast<int64_t>(sizeof(scalar_t));

template <typename scalar_t>
struct Register {
  typedef scalar_t type __attribute__((vector_size(kRegisterBytes<scalar_t>), may_alias));
  typedef scalar_t unaligned
      __attribute__((vector_size(kRegisterBytes<scalar_t>), may_alias, aligned(sizeof(scalar_t))));
  typedef scalar_t quad __attribute__((vector_size(4 * sizeof(scalar_t)), may_alias));
};
template <typename scalar_t>
using Vector = typename Register<scalar_t>::type;
template <typename scalar_t>
using Quad = typename Register<scalar_t>::quad;  // four numbers

template <typename scalar_t>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<scalar_t> - 1) & -kLanes<scalar_t>;  // a power of two
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
  ALWAYS_INLINE scalar_t* take(int64_t count) { return take_each(count)[0]; }

  // Several pieces at once, which asks only once whether there is room.
  template <typename... Counts>
  ALWAYS_INLINE std::array<scalar_t*, sizeof...(Counts)> take_each(Counts... counts) {
    const std::array<int64_t, sizeof...(Counts)> sizes = {size_for(counts)...};
    const int64_t total = (size_for(counts) + ...);
    if (used_ + total > capacity_) grow(total);
    scalar_t* end = data_ + used_;
    used_ += total;
    std::array<scalar_t*, sizeof...(Counts)> pieces;
    for (size_t i = 0; i < sizes.size(); ++i) {
      pieces[i] = end;
      end += sizes[i];
      *reinterpret_cast<Vector<scalar_t>*>(end - kLanes<scalar_t>) = Vector<scalar_t>{};
    }
    return pieces;
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
  // Whole registers, one at least.
  static constexpr int64_t size_for(int64_t count) {
    return padded<scalar_t>(std::max<int64_t>(count, 1));
  }

  __attribute__((noinline)) void grow(int64_t size) {
    const int64_t count = std::max(size, 2 * total_);
    blocks_.emplace_back(new std::byte[count * sizeof(scalar_t) + kCacheLine]);
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
    data_ = reinterpret_cast<scalar_t*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
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
  typedef uint16_t Narrow
      __attribute__((vector_size(kRegisterBytes<float> / 2), may_alias, aligned(2)));
  typedef uint32_t Wide __attribute__((vector_size(kRegisterBytes<float>), may_alias));
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

// The cache lines that hold `width` numbers will be needed soon, to be read or (kWrite) changed. By
// kNear 3 they go to the innermost cache, by 2 to the next: what is computed meanwhile fills that.
template <bool kWrite, int kNear = 3, typename scalar_t>
ALWAYS_INLINE void prefetch_row(const scalar_t* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, kWrite, kNear);
}

// Lane i of the result is the sum of all lanes whose number is i modulo 4.
template <typename scalar_t>
ALWAYS_INLINE Quad<scalar_t> fold(const Vector<scalar_t>& v) {
  if constexpr (kLanes<scalar_t> == 16) {
    const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
           __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (kLanes<scalar_t> == 8) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else {
    return v;
  }
}

// Σ of all lanes, always in the same order.
template <typename scalar_t>
ALWAYS_INLINE scalar_t sum_lanes(const Vector<scalar_t>& vector) {
  const Quad<scalar_t> quad = fold<scalar_t>(vector);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

// The sums of four vectors at once, in that same order.
template <typename scalar_t>
ALWAYS_INLINE Quad<scalar_t> sum_lanes(const Vector<scalar_t>* vectors) {
  const Quad<scalar_t> a = fold<scalar_t>(vectors[0]), b = fold<scalar_t>(vectors[1]),
                       c = fold<scalar_t>(vectors[2]), d = fold<scalar_t>(vectors[3]);
  const Quad<scalar_t> ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad<scalar_t> cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

#if defined(__AVX512F__)
// Lane i is the sum of all lanes of vectors[i]: each round adds what two vectors have in halves of
// a kind, so that 15 additions, 19 shuffles and 12 blends do what takes 44 and 59 shuffles with
// four at a time. Two ports blend and one shuffles; pairs are such that the sums end in order.
ALWAYS_INLINE Vector<float> sum_lanes_of_each(const Vector<float>* vectors) {
  __m512 quarters[4], eighths[2];
  const auto halves = [&](int i) ALWAYS_INLINE_LAMBDA {
    const __m512 a = (__m512)vectors[i], b = (__m512)vectors[i + 4];
    return _mm512_mask_blend_ps(0xFF00, a, b) + _mm512_shuffle_f32x4(a, b, 0x4E);
  };
  for (int i = 0; i < 4; ++i) {
    const __m512 a = halves(i), b = halves(i + 8);
    quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
  }
  for (int i = 0; i < 2; ++i)
    eighths[i] = _mm512_mask_blend_ps(0xCCCC, quarters[i], quarters[i + 2]) +
                 _mm512_shuffle_ps(quarters[i], quarters[i + 2], 0x4E);
  const __m512 here = _mm512_mask_blend_ps(0xAAAA, eighths[0], eighths[1]),
               beside = _mm512_mask_blend_ps(0xAAAA, eighths[1], eighths[0]);
  return (Vector<float>)(here + _mm512_permute_ps(beside, 0xB1));
}
#elif defined(__AVX__)
// Lane i is the sum of all lanes of vectors[i]: 7 additions and 14 shuffles for what takes 14 and
// 21 with four at a time.
ALWAYS_INLINE Vector<float> sum_lanes_of_each(const Vector<float>* vectors) {
  __m256 fours[4], twos[2];
  const auto at = [&](int i) ALWAYS_INLINE_LAMBDA { return (__m256)vectors[i]; };
  for (int i = 0; i < 4; ++i)
    fours[i] = _mm256_permute2f128_ps(at(i), at(i + 4), 0x20) +
               _mm256_permute2f128_ps(at(i), at(i + 4), 0x31);
  for (int i = 0; i < 2; ++i)
    twos[i] =
        _mm256_unpacklo_ps(fours[i], fours[i + 2]) + _mm256_unpackhi_ps(fours[i], fours[i + 2]);
  return (Vector<float>)(_mm256_unpacklo_ps(twos[0], twos[1]) +
                         _mm256_unpackhi_ps(twos[0], twos[1]));
}
#endif

// A register of as many fours as it holds.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> joined(const Quad<scalar_t>* quads) {
  if constexpr (kLanes<scalar_t> == 16) {
    const auto low = __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(quads[2], quads[3], 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  } else if constexpr (kLanes<scalar_t> == 8) {
    return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    return quads[0];
  }
}

// The first `count` lanes, and zeros.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> lower_lanes(const Vector<scalar_t>& vector, int64_t count) {
  typedef std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t> Integer;
  typedef Integer Integers __attribute__((vector_size(kRegisterBytes<scalar_t>)));
  Integers lane;
  for (int i = 0; i < kLanes<scalar_t>; ++i) lane[i] = i;
  return lane < static_cast<Integer>(count) ? vector : Vector<scalar_t>{};
}

// `count` times the same into scratch, the last register filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE void fill(scalar_t* result, int64_t count, scalar_t value) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Vector<scalar_t> all = broadcast(value);
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane) store(result + i) = all;
  if (i < count) store(result + i) = lower_lanes<scalar_t>(all, count - i);
}

// Lane 0 is the value, the others are zero.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> first_lane(scalar_t value) {
  Vector<scalar_t> result = {};
  result[0] = value;
  return result;
}

// Σ of `count` numbers whose last register is filled up with zeros.
template <typename scalar_t>
ALWAYS_INLINE scalar_t sum(const scalar_t* values, int64_t count) {
  Vector<scalar_t> total = {};
  for (int64_t i = 0; i < count; i += kLanes<scalar_t>) total += load(values + i);
  return sum_lanes<scalar_t>(total);
}

// Σ a_i b_i over `width` numbers, a multiple of a register.
template <typename scalar_t>
ALWAYS_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t width) {
  Vector<scalar_t> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<scalar_t>) sum += load(a + i) * load(b + i);
  return sum_lanes<scalar_t>(sum);
}

// A native register past the caches, to an address that is a multiple of its size.
typedef float Streamed __attribute__((vector_size(kNativeBytes), may_alias));
ALWAYS_INLINE void stream_out([[maybe_unused]] const Streamed& part, std::byte* address) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(address), part);
#elif defined(__AVX__)
  _mm256_stream_ps(reinterpret_cast<float*>(address), part);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(address), part);
#else
  std::memcpy(address, &part, sizeof(part));
#endif
}

// A vector to anywhere; where `stream`, past the caches, to a multiple of a register.
template <typename scalar_t>
ALWAYS_INLINE void store_out(const Vector<scalar_t>& vector, scalar_t* address, bool stream) {
  if (!stream) {
    *reinterpret_cast<typename Register<scalar_t>::unaligned*>(address) = vector;
    return;
  }
  Streamed parts[kRegisterBytes<scalar_t> / kNativeBytes];
  std::memcpy(parts, &vector, sizeof(parts));
  for (const Streamed& part : parts)
    stream_out(part, reinterpret_cast<std::byte*>(address) +
                         (&part - parts) * static_cast<int64_t>(sizeof(part)));
}

// What was streamed is there for others to see.
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace metarec_fast::cpu
