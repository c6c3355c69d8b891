// What a simulated thread asks of the scheduler: who it is, shared memory, barriers, and what the
// lanes of a warp compute together.
//
// Only declarations: under ThreadSanitizer kernels are instrumented and the scheduler is not, so no
// function may be compiled into both.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace cuda_simulator {

// Of one block, in bytes; and what it may have without asking for more.
constexpr size_t kSharedMemoryLimit = 227 << 10;
constexpr size_t kSharedMemoryWithoutAsking = 48 << 10;

// Where in the source a thread is.
struct Place {
  const char* file;
  int line;
};

const uint3& thread_index();
const uint3& block_index();
const uint3& block_size();
const uint3& grid_size();

// The shared array that `key` stands for, the same for all threads of the block.
void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();

// Waits for the whole block; how many of its threads gave a predicate that holds.
int block_barrier(bool predicate, Place place);

enum class Collective {
  kSyncwarp,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAdd,
  kMax,
  kMin
};

// Waits for the lanes of `mask`; what this lane is given of their values.
uint64_t warp_collective(Collective op, unsigned mask, uint64_t value, int argument, int width,
                         Place place);

void memory_fence();

// Ends the kernel with a message.
[[noreturn]] void stop(Place place, const char* message);

// Runs `body` once per thread, block after block; what was wrong, or nullptr.
const char* run(const char* kernel, void (*body)(void*), void* argument, uint3 grid, uint3 block,
                size_t shared_bytes);

}  // namespace cuda_simulator
