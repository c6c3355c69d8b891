// Sums of the rows of equal ids, handed on to whoever has a use for them: the same bits every time.
//
// Entries come sorted by their ids, those of one id in their own order. A group of lanes owns a
// place among them: where an id begins, it sums the id's rows, first to last. An id to which two
// multiples of kChunk belong, as places, is long: its sum is cut there, so that no group has many
// rows to do, and a second kernel adds the parts, one block for each long id:
//
//     place      0           64          128         192
//     id         2 2 3 3 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 6 …
//     who sums   |---|---|-------------------|-------|-…       5 has the places 64 and 128
//     its part               1           … and 2
//
// Nothing depends on how many ids there are, so nothing waits for the device.
#pragma once

#include "pack.h"

namespace metarec_fast::cuda {

constexpr int kThreadsPerBlock = 256;
constexpr int64_t kChunk = 64;  // a group sums fewer than 2 kChunk rows

// [n], ascending, and what they are the ids of.
struct SortedEntries {
  const int64_t* ids;
  const int64_t* entries;
  int64_t count;
};

// The first i in (begin, last] with another id than ids[begin * stride]; ids[last * stride] is not
// looked at. In steps that double, then halve.
__device__ inline int64_t end_of_id(const int64_t* ids, int64_t stride, int64_t begin,
                                    int64_t last) {
  const int64_t id = ids[begin * stride];
  int64_t step = 1;
  while (begin + step < last && ids[(begin + step) * stride] == id) {
    begin += step;
    step *= 2;
  }
  int64_t end = begin + step < last ? begin + step : last;
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    (ids[middle * stride] == id ? begin : end) = middle;
  }
  return end;
}

// Where a sum that begins at a place ends, and whether it is a part of one; nowhere: none begins.
struct Chunk {
  static constexpr int64_t kWhole = -1;
  int64_t end;
  int64_t part;  // its number, or kWhole
};

__device__ inline Chunk chunk_at(const SortedEntries& sorted, int64_t place) {
  const int64_t *ids = sorted.ids, id = ids[place];
  if (place == 0 || ids[place - 1] != id) {
    const int64_t multiple = (place + kChunk - 1) / kChunk;
    const int64_t last =
        (multiple + 1) * kChunk < sorted.count ? (multiple + 1) * kChunk : sorted.count;
    const bool is_long = last < sorted.count && ids[last] == id;
    if (is_long) return {last, multiple};
    return {end_of_id(ids, 1, place, last), Chunk::kWhole};
  }
  const bool continues = place % kChunk == 0 && place >= kChunk && ids[place - kChunk] == id;
  if (!continues) return {place, Chunk::kWhole};
  const int64_t last = place + kChunk < sorted.count ? place + kChunk : sorted.count;
  return {end_of_id(ids, 1, place, last), place / kChunk};
}

// row(begin) + … + row(end − 1), first to last; several are under way at once.
template <typename PackType, typename Row>
__device__ PackType sum_in_order(int64_t begin, int64_t end, const Row& row) {
  constexpr int kAtOnce = 4;
  PackType sum = {};
#pragma unroll 1
  for (; begin + kAtOnce <= end; begin += kAtOnce) {
    PackType more[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) more[i] = row(begin + i);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += more[i];
  }
#pragma unroll 1
  for (; begin < end; ++begin) sum += row(begin);
  return sum;
}

// use(place, column, Σ rows[e, column …] over the entries e of an id), for the ids that are not
// long, with one of their places; of the others the parts.
// A group of `lanes` lanes, a power of two, owns a place; lane j has the packs j, j + lanes, …
template <int kCount, typename scalar_t, typename Use>
__global__ void __launch_bounds__(kThreadsPerBlock)
    sum_chunks_kernel(SortedEntries sorted,               // [n]
                      const scalar_t* __restrict__ rows,  // [n, D]
                      int64_t width,                      // D
                      int lanes,                          //
                      scalar_t* __restrict__ parts,       // [⌈n / kChunk⌉, D]
                      Use use) {
  using PackType = Pack<scalar_t, kCount>;
  const int64_t place = (int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x) / lanes;
  if (place >= sorted.count) return;
  const Chunk chunk = chunk_at(sorted, place);
  if (chunk.end == place) return;
  for (int64_t column = int64_t{threadIdx.x % lanes} * kCount; column < width;
       column += int64_t{lanes} * kCount) {
    const PackType sum = sum_in_order<PackType>(place, chunk.end, [&](int64_t i) {
      return load<PackType>(rows + sorted.entries[i] * width + column);
    });
    if (chunk.part == Chunk::kWhole)
      use(place, column, sum);
    else
      store(parts + chunk.part * width + column, sum);
  }
}

// The same use of the sums of long ids. One block owns a multiple of kChunk, and has something to
// do where it is the first that belongs to a long id. Its groups sum consecutive parts, then the
// first group sums what they have.
template <int kCount, typename scalar_t, typename Use>
__global__ void __launch_bounds__(kThreadsPerBlock)
    sum_parts_kernel(SortedEntries sorted,                // [n]
                     const scalar_t* __restrict__ parts,  // [⌈n / kChunk⌉, D]
                     int64_t width,                       // D
                     int lanes,                           //
                     Use use) {
  using PackType = Pack<scalar_t, kCount>;
  CUDA_SHARED(PackType, sums, kThreadsPerBlock);
  const int64_t multiple = blockIdx.x, place = multiple * kChunk, id = sorted.ids[place];
  const bool is_first = place == 0 || sorted.ids[place - kChunk] != id;
  const bool is_long = place + kChunk < sorted.count && sorted.ids[place + kChunk] == id;
  if (!(is_first && is_long)) return;  // the whole block

  const int64_t multiples = (sorted.count + kChunk - 1) / kChunk;
  const int64_t num_parts = end_of_id(sorted.ids, kChunk, multiple, multiples) - multiple;
  const int groups = kThreadsPerBlock / lanes, group = threadIdx.x / lanes;
  for (int64_t first = 0; first < width; first += int64_t{lanes} * kCount) {
    const int64_t column = first + int64_t{threadIdx.x % lanes} * kCount;
    if (column < width)
      sums[threadIdx.x] = sum_in_order<PackType>(
          num_parts * group / groups, num_parts * (group + 1) / groups,
          [&](int64_t i) { return load<PackType>(parts + (multiple + i) * width + column); });
    __syncthreads();
    if (group == 0 && column < width)
      use(place, column, sum_in_order<PackType>(0, groups, [&](int64_t i) {
            return sums[i * lanes + threadIdx.x];
          }));
    __syncthreads();
  }
}

// How many parts of sums the kernels need room for; 0: they need none.
inline int64_t num_parts(int64_t count) {
  return count <= kChunk ? 0 : (count + kChunk - 1) / kChunk;
}

// Both kernels, on `count` > 0 entries; kCount numbers at once, of which the width is a multiple.
template <int kCount, typename scalar_t, typename Use>
const char* launch_sums(const SortedEntries& sorted, const scalar_t* rows, int64_t width,
                        scalar_t* parts, const Use& use, cudaStream_t stream) {
  const int lanes = lanes_for(width, kCount);
  const char* error = launch("sum_chunks_kernel", sum_chunks_kernel<kCount, scalar_t, Use>,
                             blocks_for(sorted.count * lanes, kThreadsPerBlock), kThreadsPerBlock,
                             0, stream, sorted, rows, width, lanes, parts, use);
  if (error != nullptr || num_parts(sorted.count) == 0) return error;
  return launch("sum_parts_kernel", sum_parts_kernel<kCount, scalar_t, Use>,
                blocks_for(sorted.count, kChunk), kThreadsPerBlock, 0, stream, sorted,
                static_cast<const scalar_t*>(parts), width, lanes, use);
}

// use(place, column, sum) for every id, with a place where it stands and its sum from a column on.
template <typename scalar_t, typename Use>
const char* sum_rows_of_ids(const SortedEntries& sorted, const scalar_t* rows, int64_t width,
                            scalar_t* parts, const Use& use, cudaStream_t stream) {
  constexpr int kWidest = kWidestPack<scalar_t>;
  if (width % kWidest == 0 && is_aligned(rows) && is_aligned(parts) && use.is_aligned())
    return launch_sums<kWidest>(sorted, rows, width, parts, use, stream);
  return launch_sums<1>(sorted, rows, width, parts, use, stream);
}

}  // namespace metarec_fast::cuda
