// Products of a few rows that sit in L1, written with the compiler's vector types, and the buffers
// they live in.
//
// A fast vector (u, c) of D + 1 numbers is stored as  u[0 … D) 0 … 0 | c 0 … 0 : u padded to whole
// registers
// (`width`), then one more register whose first number is the bias (`stride` in all). An item row
// is a fast vector with bias 1, so that row · (u, c) = e·u + c. Padding is zero and stays zero
// under everything done here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

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
};
template <typename scalar_t>
using Vector = typename Register<scalar_t>::type;

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
  scalar_t* take(int64_t count) {
    const int64_t size = std::max(padded<scalar_t>(count), kLanes<scalar_t>);
    if (used_ + size > capacity_) grow(size);
    scalar_t* result = data_ + used_;
    used_ += size;
    std::fill(result + std::max<int64_t>(size - kLanes<scalar_t>, 0), result + size, scalar_t{0});
    return result;
  }

  scalar_t* take_zeros(int64_t count) {
    scalar_t* result = take(count);
    std::fill(result, result + count, scalar_t{0});
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
  void grow(int64_t size) {
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

// Halves the vector until one number is left: always the same order of additions, on every machine.
template <typename scalar_t>
ALWAYS_INLINE scalar_t sum_lanes(const Vector<scalar_t>& vector) {
  typedef scalar_t Half __attribute__((vector_size(kRegisterBytes / 2)));
  typedef scalar_t Quarter __attribute__((vector_size(kRegisterBytes / 4)));
  Half halves[2];
  std::memcpy(halves, &vector, sizeof(halves));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(quarters));
  const Quarter quarter = quarters[0] + quarters[1];
  if constexpr (sizeof(scalar_t) == 4)
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  else
    return quarter[0] + quarter[1];
}

// Σ a_i b_i over `width` numbers, a multiple of a register.
template <typename scalar_t>
ALWAYS_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t width) {
  Vector<scalar_t> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<scalar_t>) sum += load(a + i) * load(b + i);
  return sum_lanes<scalar_t>(sum);
}

template <typename scalar_t>
ALWAYS_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, const Layout<scalar_t>& layout) {
  return dot(a, b, layout.width) + a[layout.width] * b[layout.width];
}

// result[j] = left · rows[j],  j < count
template <typename scalar_t>
ALWAYS_INLINE void dots(const scalar_t* left, const scalar_t* rows, int64_t count,
                        const Layout<scalar_t>& layout, scalar_t* result) {
  constexpr int64_t kRows = 4;  // as many sums at once hide the latency of an addition
  const int64_t width = layout.width, stride = layout.stride;
  int64_t j = 0;
  for (; j + kRows <= count; j += kRows) {
    const scalar_t* row = rows + j * stride;
    Vector<scalar_t> sums[kRows] = {};
    for (int64_t i = 0; i < width; i += kLanes<scalar_t>)
      for (int64_t r = 0; r < kRows; ++r) sums[r] += load(left + i) * load(row + r * stride + i);
    for (int64_t r = 0; r < kRows; ++r)
      result[j + r] = sum_lanes<scalar_t>(sums[r]) + left[width] * row[r * stride + width];
  }
  for (; j < count; ++j) result[j] = dot(left, rows + j * stride, layout);
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

// kRows × kVectors registers of  result = C · basis.
template <int64_t kRows, int64_t kVectors, typename scalar_t>
ALWAYS_INLINE void multiply_block(const Coefficients<scalar_t>& coefficients, int64_t row,
                                  const scalar_t* basis, int64_t basis_stride, int64_t count,
                                  scalar_t* result, int64_t result_stride) {
  Vector<scalar_t> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < kRows; ++r) {
      const scalar_t coefficient = coefficients.at(row + r, j);
      for (int64_t v = 0; v < kVectors; ++v)
        sums[r][v] += coefficient * load(basis + j * basis_stride + v * kLanes<scalar_t>);
    }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v)
      store(result + r * result_stride + v * kLanes<scalar_t>) = sums[r][v];
}

// result[m] = Σ_j C[m, j] basis[j],  m < rows, j < count, over `width` numbers, a multiple of a
// register.
template <typename scalar_t>
ALWAYS_INLINE void multiply(const Coefficients<scalar_t>& coefficients, int64_t rows,
                            const scalar_t* basis, int64_t basis_stride, int64_t count,
                            int64_t width, scalar_t* result, int64_t result_stride) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    int64_t i = 0;
    for (; i + 2 * kLane <= width; i += 2 * kLane)
      multiply_block<4, 2>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride);
    for (; i < width; i += kLane)
      multiply_block<4, 1>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride);
  }
  for (; m < rows; ++m) {
    int64_t i = 0;
    for (; i + 4 * kLane <= width; i += 4 * kLane)
      multiply_block<1, 4>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride);
    for (; i < width; i += kLane)
      multiply_block<1, 1>(coefficients, m, basis + i, basis_stride, count,
                           result + m * result_stride + i, result_stride);
  }
}

// result = Σ_j coefficients[j] rows[j], a fast vector
template <typename scalar_t>
ALWAYS_INLINE void combine(const scalar_t* coefficients, const scalar_t* rows, int64_t count,
                           const Layout<scalar_t>& layout, scalar_t* result) {
  multiply<scalar_t>({coefficients, 0, 1}, 1, rows, layout.stride, count, layout.width, result,
                     layout.stride);
  scalar_t bias = 0;
  for (int64_t j = 0; j < count; ++j)
    bias += coefficients[j] * rows[j * layout.stride + layout.width];
  std::fill(result + layout.width, result + layout.stride, scalar_t{0});
  result[layout.width] = bias;
}

}  // namespace metarec_fast::cpu
