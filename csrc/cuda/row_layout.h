// How rows of D numbers lie across a warp. L lanes hold a row, four neighbouring columns each, of
// every chunk of 4 L columns; 32 / L rows are held at once, by as many groups of lanes.
//
//   D = 64, L = 16:   lane 0 … 15: row r, columns 0–3, 4–7, … 60–63    lane 16 … 31: row r + 1
//
// Vectors that belong to no row lie in the same way, a copy in every group.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace metarec_fast::cuda {

constexpr int kWarpSize = 32;
constexpr int kPack = 4;                         // columns that are loaded together
constexpr int kWidestChunk = kPack * kWarpSize;  // columns
constexpr int kMostChunks = 2;
constexpr int kLargestDim = kMostChunks * kWidestChunk;

// What follows from D, worked out once. Every group has at least as many lanes as rows are finished
// together, one by each (columns.h).
struct RowShape {
  int dim;
  int lanes_log2;  // L = 2^lanes_log2
  int chunks;

  RowShape() = default;
  explicit RowShape(int dim_in) : dim(dim_in), lanes_log2(2) {
    while (lanes() < kWarpSize && lanes() * kPack < dim) ++lanes_log2;
    chunks = (dim + lanes() * kPack - 1) / (lanes() * kPack);
  }
  HOST_DEVICE int lanes() const { return 1 << lanes_log2; }
  HOST_DEVICE int width() const { return chunks * kPack << lanes_log2; }  // of a row in scratch
};

// For the widest loads and stores.
inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether rows of D numbers may be read and written four at a time.
template <typename Number>
bool packs(const Number* rows, int64_t dim) {
  return dim % kPack == 0 && is_aligned(rows);
}

}  // namespace metarec_fast::cuda
