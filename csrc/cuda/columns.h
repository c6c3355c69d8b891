// Vectors and rows as the lanes of a warp hold them: see row_layout.h.
#pragma once

#include "bfloat16.h"
#include "pack.h"
#include "row_layout.h"
#include "team.h"

namespace metarec_fast::cuda {

// Four numbers, from and to addresses that are multiples of 16 bytes (of 8 for bfloat16).
template <typename Number>
constexpr int kLoaded = kWidestPack<Number> < kPack ? kWidestPack<Number> : kPack;  // at once

template <typename Number, typename scalar_t>
__device__ __forceinline__ void load_pack(const Number* from, scalar_t* to) {
#pragma unroll
  for (int begin = 0; begin < kPack; begin += kLoaded<Number>) {
    const auto pack = cuda::load<Pack<Number, kLoaded<Number>>>(from + begin);
#pragma unroll
    for (int i = 0; i < kLoaded<Number>; ++i) to[begin + i] = pack.values[i];
  }
}
template <typename scalar_t>
__device__ __forceinline__ void store_pack(const scalar_t* from, scalar_t* to) {
#pragma unroll
  for (int begin = 0; begin < kPack; begin += kLoaded<scalar_t>) {
    Pack<scalar_t, kLoaded<scalar_t>> pack;
#pragma unroll
    for (int i = 0; i < kLoaded<scalar_t>; ++i) pack.values[i] = from[begin + i];
    cuda::store(to + begin, pack);
  }
}

// A fast vector (u, c), or a row and what stands beside it; the lane's columns of it.
template <typename scalar_t, int kChunks>
struct Vector {
  static constexpr int kSize = kChunks * kPack;
  scalar_t at[kSize];
  scalar_t bias;

  __device__ __forceinline__ static Vector zero() { return filled(0); }
  __device__ __forceinline__ static Vector filled(scalar_t value) {
    Vector result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.at[i] = value;
    result.bias = value;
    return result;
  }

  // this ← function(this, others …), number by number
  template <typename Function, typename... Others>
  __device__ __forceinline__ void update(const Function& function, const Others&... others) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) at[i] = function(at[i], others.at[i]...);
    bias = function(bias, others.bias...);
  }

  __device__ __forceinline__ void add(scalar_t factor, const Vector& other) {
    update([=](scalar_t a, scalar_t b) { return a + factor * b; }, other);
  }

  // Of the lane's columns alone.
  __device__ __forceinline__ scalar_t dot(const Vector& other) const {
    scalar_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += at[i] * other.at[i];
    return sum;
  }
};

template <int kChunks>
struct Columns {
  const RowShape& shape;
  int lane;  // in its group
  int group;

  __device__ __forceinline__ Columns(const RowShape& shape_in, int lane_in_warp)
      : shape(shape_in),
        lane(lane_in_warp & (shape_in.lanes() - 1)),
        group(lane_in_warp >> shape_in.lanes_log2) {}

  __device__ __forceinline__ int dim() const { return shape.dim; }
  __device__ __forceinline__ int lanes() const { return shape.lanes(); }
  __device__ __forceinline__ int groups() const { return kWarpSize >> shape.lanes_log2; }
  __device__ __forceinline__ int width() const {
    return kChunks == 1 ? kPack << shape.lanes_log2 : shape.width();
  }
  __device__ __forceinline__ int column(int chunk) const {
    return ((chunk << shape.lanes_log2) + lane) * kPack;
  }

  // Calls body(chunk, column) for the lane's packs.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (kChunks == 1 || c < shape.chunks) body(c, column(c));
  }

  // A padded row [width] of ours; the bias stays as it is.
  template <typename scalar_t>
  __device__ __forceinline__ void load(const scalar_t* row, Vector<scalar_t, kChunks>& to) const {
    if (kChunks > 1) clear(to);
    each([&](int c, int column) { load_pack(row + column, to.at + c * kPack); });
  }
  template <typename scalar_t>
  __device__ __forceinline__ void store(const Vector<scalar_t, kChunks>& from,
                                        scalar_t* row) const {
    each([&](int c, int column) { store_pack(from.at + c * kPack, row + column); });
  }

  // A row [D] of somebody else's, zeros beyond it; `packed` says that it may be read four at a
  // time.
  template <typename Number, typename scalar_t>
  __device__ __forceinline__ void load_row(const Number* row, bool packed,
                                           Vector<scalar_t, kChunks>& to) const {
    clear(to);
    each([&](int c, int column) {
      if (packed) {
        if (column < dim()) load_pack(row + column, to.at + c * kPack);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i)
          if (column + i < dim()) to.at[c * kPack + i] = static_cast<scalar_t>(row[column + i]);
      }
    });
  }
  template <typename scalar_t>
  __device__ __forceinline__ void store_row(const Vector<scalar_t, kChunks>& from, bool packed,
                                            scalar_t* row) const {
    each([&](int c, int column) {
      if (packed) {
        if (column < dim()) store_pack(from.at + c * kPack, row + column);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i)
          if (column + i < dim()) row[column + i] = from.at[c * kPack + i];
      }
    });
  }

  // The sum over a row's lanes, for all of them.
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t sum(scalar_t value) const {
#pragma unroll 1
    for (int apart = lanes() / 2; apart > 0; apart /= 2)
      value += __shfl_xor_sync(kAllLanes, value, apart);
    return value;
  }

  // Of several values at once: lane i of a group gets the sum of values[i], in half as many
  // exchanges and additions as one by one.
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t sums(const scalar_t (&values)[2]) const {
    return sum_from(2, halve(1, values[0], values[1]));
  }
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t sums(const scalar_t (&values)[4]) const {
    const scalar_t low = halve(1, values[0], values[1]), high = halve(1, values[2], values[3]);
    return sum_from(4, halve(2, low, high));
  }

  // The sum over the groups of a warp, for all of them.
  template <typename scalar_t>
  __device__ __forceinline__ void sum_groups(Vector<scalar_t, kChunks>& vector) const {
#pragma unroll 1
    for (int apart = lanes(); apart < kWarpSize; apart *= 2) {
#pragma unroll
      for (int i = 0; i < Vector<scalar_t, kChunks>::kSize; ++i)
        vector.at[i] += __shfl_xor_sync(kAllLanes, vector.at[i], apart);
      vector.bias += __shfl_xor_sync(kAllLanes, vector.bias, apart);
    }
  }

 private:
  // Of two lanes `apart`, the lower one gets the sum of their `a`, the upper one that of their `b`.
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t halve(int apart, scalar_t a, scalar_t b) const {
    const bool upper = (lane & apart) != 0;
    return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, apart);
  }
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t sum_from(int apart, scalar_t value) const {
#pragma unroll 1
    for (; apart < lanes(); apart *= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
    return value;
  }

  template <typename scalar_t>
  __device__ __forceinline__ static void clear(Vector<scalar_t, kChunks>& vector) {
#pragma unroll
    for (int i = 0; i < Vector<scalar_t, kChunks>::kSize; ++i) vector.at[i] = 0;
  }
};

}  // namespace metarec_fast::cuda
