// The memory of a block: where it comes from, and shared arrays in it.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "block.h"

#ifdef SIMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace cuda_simulator {
namespace {

constexpr size_t kBetweenArrays = 64;               // bytes that belong to no array
constexpr size_t kDynamicWithoutAsking = 32 << 10;  // as csrc/cuda/dialect.h has it

char fence_token[8];

size_t bytes_for(int num_threads) {
  return offsetof(BlockMemory, stacks) + num_threads * kStackBytes;
}

BlockMemory* map_memory(size_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) std::abort();
  return static_cast<BlockMemory*>(mapped);
}

}  // namespace

BlockMemory* fresh_memory() {
#ifdef SIMULATOR_THREAD
  BlockMemory* memory = map_memory(bytes_for(block.num_threads));
#else
  static BlockMemory* const memory = map_memory(bytes_for(kMaxThreads));
  ASAN_UNPOISON_MEMORY_REGION(memory->stacks, block.num_threads * kStackBytes);
  ASAN_UNPOISON_MEMORY_REGION(memory->shared, kSharedMemoryLimit);
#endif
  std::memset(memory->shared, 0xff, kSharedMemoryLimit);
  ASAN_POISON_MEMORY_REGION(memory->shared + block.dynamic_bytes,
                            kSharedMemoryLimit - block.dynamic_bytes);
  return memory;
}

void give_back([[maybe_unused]] BlockMemory* memory) {
#ifdef SIMULATOR_THREAD
  munmap(memory, bytes_for(block.num_threads));
#endif
}

void* static_shared(const void* key, size_t bytes) {
  for (int i = 0; i < block.num_shared_arrays; ++i)
    if (block.shared_arrays[i].key == key) return block.shared_arrays[i].data;
  const size_t start = (block.shared_end + kBetweenArrays + 15) / 16 * 16;
  block.static_bytes += bytes;
  // What asks for more of it asks for dynamic memory alone.
  const bool asked = block.dynamic_bytes > kDynamicWithoutAsking;
  const size_t limit = asked ? kSharedMemoryLimit : kSharedMemoryWithoutAsking;
  if (block.static_bytes > kSharedMemoryWithoutAsking ||
      block.static_bytes + block.dynamic_bytes > limit || start + bytes > kSharedMemoryLimit ||
      block.num_shared_arrays == kMaxSharedArrays) {
    fail("shared memory: %zu bytes of arrays and %zu dynamic ones are too much", block.static_bytes,
         block.dynamic_bytes);
    end_thread();
  }
  char* data = block.memory->shared + start;
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  block.shared_end = start + bytes;
  block.shared_arrays[block.num_shared_arrays++] = {key, data};
  return data;
}

void* dynamic_shared() { return block.memory->shared; }

void memory_fence() {
  acquire(fence_token);
  release(fence_token);
}

}  // namespace cuda_simulator
