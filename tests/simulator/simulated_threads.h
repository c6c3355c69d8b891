// Who a thread is, and how threads meet: indices, barriers, shuffles and votes. Macros, because the
// scheduler is told where they stand in the source.
#pragma once

#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define CUDA_SIMULATOR_HERE \
  cuda_simulator::Place { __FILE__, __LINE__ }

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (cuda_simulator::thread_index())
#define blockIdx (cuda_simulator::block_index())
#define blockDim (cuda_simulator::block_size())
#define gridDim (cuda_simulator::grid_size())

static constexpr int warpSize = 32;

#define __syncthreads() cuda_simulator::block_barrier(false, CUDA_SIMULATOR_HERE)
#define __syncthreads_count(predicate) \
  cuda_simulator::block_barrier((predicate) != 0, CUDA_SIMULATOR_HERE)
#define __syncthreads_or(predicate) int(__syncthreads_count(predicate) != 0)
#define __syncthreads_and(predicate) int(__syncthreads_count((predicate) == 0) == 0)
#define __syncwarp(...) (cuda_simulator::SyncWarp{CUDA_SIMULATOR_HERE}(__VA_ARGS__))

#define __shfl_sync \
  cuda_simulator::Shuffle { cuda_simulator::Collective::kShuffle, CUDA_SIMULATOR_HERE }
#define __shfl_xor_sync \
  cuda_simulator::Shuffle { cuda_simulator::Collective::kShuffleXor, CUDA_SIMULATOR_HERE }
#define __shfl_up_sync \
  cuda_simulator::Shuffle { cuda_simulator::Collective::kShuffleUp, CUDA_SIMULATOR_HERE }
#define __shfl_down_sync \
  cuda_simulator::Shuffle { cuda_simulator::Collective::kShuffleDown, CUDA_SIMULATOR_HERE }

#define __ballot_sync(mask, predicate) \
  CUDA_SIMULATOR_REDUCE(kBallot, mask, uint64_t{(predicate) != 0})
#define __any_sync(mask, predicate) int(__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) int(__ballot_sync(mask, (predicate) == 0) == 0)
#define __reduce_add_sync(mask, value) CUDA_SIMULATOR_REDUCE(kAdd, mask, unsigned(value))
#define __reduce_max_sync(mask, value) CUDA_SIMULATOR_REDUCE(kMax, mask, unsigned(value))
#define __reduce_min_sync(mask, value) CUDA_SIMULATOR_REDUCE(kMin, mask, unsigned(value))
#define CUDA_SIMULATOR_REDUCE(op, mask, value)                                                 \
  unsigned(cuda_simulator::warp_collective(cuda_simulator::Collective::op, mask, value, 0, 32, \
                                           CUDA_SIMULATOR_HERE))

#define __trap() cuda_simulator::stop(CUDA_SIMULATOR_HERE, "__trap()")
#define __activemask()                                                                             \
  (cuda_simulator::stop(CUDA_SIMULATOR_HERE, "__activemask() does not say which lanes will come"), \
   0u)

namespace cuda_simulator {

struct SyncWarp {
  Place place;

  void operator()(unsigned mask = 0xffffffffu) const {
    warp_collective(Collective::kSyncwarp, mask, 0, 0, warpSize, place);
  }
};

struct Shuffle {
  Collective op;
  Place place;

  template <typename T>
  T operator()(unsigned mask, T value, int argument, int width = warpSize) const {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_collective(op, mask, bits, argument, width, place);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }
};

}  // namespace cuda_simulator
