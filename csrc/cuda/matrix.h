// Products of the small matrices of one task, by all threads of a block.
//
// Both factors come tile by tile into shared memory, whichever way they lie in memory; a thread has
// a few neighbouring columns of a few neighbouring rows of the result in registers.
#pragma once

#include "pack.h"
#include "team.h"

namespace metarec_fast::cuda {

constexpr int kMatrixThreads = 128;

// A matrix by its strides, so that a transposed one is no other.
template <typename scalar_t>
struct Matrix {
  const scalar_t* values;
  int row_stride, column_stride;

  __device__ __forceinline__ Matrix transposed() const {
    return {values, column_stride, row_stride};
  }
};

// One row of `width` numbers after the other.
template <typename scalar_t>
__device__ __forceinline__ Matrix<scalar_t> rows_of(const scalar_t* values, int width) {
  return {values, width, 1};
}

// What a product is added to: a matrix like the result, and a row for all of its rows; or nullptr.
template <typename scalar_t>
struct Start {
  const scalar_t* rows = nullptr;
  const scalar_t* row = nullptr;
};

constexpr int kTileColumns = 64, kTileRows = 32, kTilePad = 4;  // the pad spreads over the banks
constexpr int kColumnsEach = 4;                                 // of a thread
constexpr int kThreadsAcross = kTileColumns / kColumnsEach;
constexpr int kThreadsDown = kMatrixThreads / kThreadsAcross;
template <typename scalar_t>
constexpr int kTileDepth = 128 / sizeof(scalar_t);

// tile[d, i] = values[i · along + d · down], 0 for i ≥ width and for d ≥ depth. A few loads are
// under way before the first store, which for all the compiler knows is to where the next one
// reads.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ void stage(const scalar_t* values, int along, int down, int width,
                                      int depth, scalar_t* tile) {
  constexpr int kDepth = kTileDepth<scalar_t>, kAtOnce = 4;
  static_assert(kWidth * kDepth % (kAtOnce * kMatrixThreads) == 0);
  const bool side_by_side = along == 1;  // then neighbouring threads read neighbours
#pragma unroll 1
  for (int first = 0; first < kWidth * kDepth; first += kAtOnce * kMatrixThreads) {
    scalar_t numbers[kAtOnce];
    int places[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int j = first + n * kMatrixThreads + static_cast<int>(threadIdx.x);
      const int i = side_by_side ? j % kWidth : j / kDepth,
                d = side_by_side ? j / kWidth : j % kDepth;
      numbers[n] = i < width && d < depth ? values[i * along + d * down] : scalar_t{0};
      places[n] = d * (kWidth + kTilePad) + i;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) tile[places[n]] = numbers[n];
  }
}

// The same with kRowsEach rows of a tile for each thread.
template <int kRowsEach, typename scalar_t>
__device__ __forceinline__ void multiply_tiles(const Matrix<scalar_t>& left,
                                               const Matrix<scalar_t>& right, int rows, int depth,
                                               int columns, scalar_t factor,
                                               const Start<scalar_t>& start, scalar_t* result,
                                               scalar_t* left_tile, scalar_t* right_tile) {
  constexpr int kDepth = kTileDepth<scalar_t>, kRows = kRowsEach * kThreadsDown;
  constexpr int kWide = kWidestPack<scalar_t>;
  static_assert(kRows <= kTileRows);
  const int thread = static_cast<int>(threadIdx.x);
  const int across = thread % kThreadsAcross * kColumnsEach,
            down = thread / kThreadsAcross * kRowsEach;
#pragma unroll 1
  for (int row = 0; row < rows; row += kRows)
#pragma unroll 1
    for (int column = 0; column < columns; column += kTileColumns) {
      scalar_t sums[kRowsEach][kColumnsEach] = {};
#pragma unroll 1
      for (int first = 0; first < depth; first += kDepth) {
        const int here = depth - first < kDepth ? depth - first : kDepth;
        __syncthreads();  // the factors are there, and nobody reads the tiles before
        stage<kTileRows>(left.values + row * left.row_stride + first * left.column_stride,
                         left.row_stride, left.column_stride, rows - row, here, left_tile);
        stage<kTileColumns>(right.values + first * right.row_stride + column * right.column_stride,
                            right.column_stride, right.row_stride, columns - column, here,
                            right_tile);
        __syncthreads();
#pragma unroll 4
        for (int d = 0; d < here; ++d) {
          scalar_t numbers[kColumnsEach];
#pragma unroll
          for (int c = 0; c < kColumnsEach; c += kWide) {
            const auto pack = load<Pack<scalar_t, kWide>>(
                right_tile + d * (kTileColumns + kTilePad) + across + c);
#pragma unroll
            for (int i = 0; i < kWide; ++i) numbers[c + i] = pack.values[i];
          }
#pragma unroll
          for (int r = 0; r < kRowsEach; ++r) {
            const scalar_t number = left_tile[d * (kTileRows + kTilePad) + down + r];
#pragma unroll
            for (int c = 0; c < kColumnsEach; ++c) sums[r][c] += number * numbers[c];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
        for (int c = 0; c < kColumnsEach; ++c) {
          const int i = row + down + r, j = column + across + c;
          if (i >= rows || j >= columns) continue;
          scalar_t sum = factor * sums[r][c];
          if (start.rows != nullptr) sum += start.rows[i * columns + j];
          if (start.row != nullptr) sum += start.row[j];
          result[i * columns + j] = sum;
        }
    }
}

// result [rows, columns] = start + factor · left right,  left [rows, depth], right [depth,
// columns]; start may be result. Sees what any thread wrote before; what it writes is seen after a
// barrier.
template <typename scalar_t>
[[gnu::noinline]] __device__ void multiply(Matrix<scalar_t> left, Matrix<scalar_t> right, int rows,
                                           int depth, int columns, scalar_t factor,
                                           Start<scalar_t> start, scalar_t* result) {
  constexpr int kDepth = kTileDepth<scalar_t>;
  CUDA_SHARED(scalar_t, left_tile, kDepth * (kTileRows + kTilePad));
  CUDA_SHARED(scalar_t, right_tile, kDepth * (kTileColumns + kTilePad));
  if (rows <= kTileRows / 2)
    multiply_tiles<2>(left, right, rows, depth, columns, factor, start, result, left_tile,
                      right_tile);
  else
    multiply_tiles<4>(left, right, rows, depth, columns, factor, start, result, left_tile,
                      right_tile);
}

}  // namespace metarec_fast::cuda
