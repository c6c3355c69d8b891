// A block at work: its threads and warps, what they wait for, and its memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fiber.h"
#include "scheduler.h"

namespace cuda_simulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = kMaxFibers;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMaxGroups = 64;
constexpr int kMaxSharedArrays = 64;

enum class State { kReady, kAtWarp, kAtBarrier, kDone };

// What a thread waits in, while it waits.
struct Request {
  Collective op;
  unsigned mask;
  uint64_t value;
  int argument, width;
  bool predicate;
  Place place;
};

struct Thread {
  Fiber fiber;
  State state;
  bool finished;  // and did not have to be stopped
  uint3 index;
  int number;  // in the block
  Request request;
  uint64_t answer;

  int lane() const { return number % kWarpSize; }
  int warp() const { return number / kWarpSize; }
};

// Lanes that work together under one mask.
struct Group {
  unsigned mask, arrived;
  unsigned syncs;  // how many __syncwarp they have passed
};

struct Warp {
  unsigned present, exited;  // lanes
  Group groups[kMaxGroups];
  int num_groups;
};

struct SharedArray {
  const void* key;
  void* data;
};

// One mapping. ThreadSanitizer remembers of an address who used it and what it ordered, until it is
// unmapped: there, every block has a mapping of its own, elsewhere one serves them all.
struct BlockMemory {
  char barrier_tokens[2][8];
  char warp_tokens[kMaxWarps][kMaxGroups][2][8];
  alignas(4096) char shared[kSharedMemoryLimit];
  alignas(4096) char stacks[kMaxThreads][kStackBytes];
};

struct Block {
  uint3 index, size, grid;
  int64_t number;  // of the launch
  Thread threads[kMaxThreads];
  int num_threads;
  Warp warps[kMaxWarps];
  unsigned barriers_passed;
  SharedArray shared_arrays[kMaxSharedArrays];
  int num_shared_arrays;
  size_t dynamic_bytes, static_bytes, shared_end;
  BlockMemory* memory;
  void (*body)(void*);
  void* argument;
};

extern Block block;
extern Thread* current;  // who runs, nullptr in the scheduler

// Keeps the first thing that was wrong.
[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
bool failed();

[[noreturn]] void end_thread();
void wait_as(State state);  // lets others run until the current thread is ready again

// Memory in which nobody has written yet: shared memory is NaN, and -1 in integers.
BlockMemory* fresh_memory();
void give_back(BlockMemory* memory);

// The group of the lanes that wait under the same mask as the current one.
Group& group_of(const Thread& thread);
// `thread` has come to a collective: if it was the last, all of its group are ready.
void join_group(Thread& thread);
const char* name_of(Collective op);

// Runs all threads of the block to their end, in the order given.
void run_block(void (*next_order)(int* order, int count));

}  // namespace cuda_simulator
