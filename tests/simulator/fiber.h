// A stack of its own for every simulated thread, and what sanitizers must be told of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_simulator {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* fake_stack;    // AddressSanitizer's
  void* tsan_context;  // ThreadSanitizer's
};

// Remembers who enters fibers: called before the first one is made.
void enter_from_here();

// `entry` begins on `stack` when the fiber is first entered, and must not return. For
// ThreadSanitizer it goes on as what `number` was kContextSets blocks ago, because a context of its
// own for each fiber would take half a millisecond.
constexpr int kMaxFibers = 1024, kContextSets = 3;
void make_fiber(Fiber& fiber, char* stack, void (*entry)(), int number, int64_t block_number);
// Releases `token` (see below) in the name of a fiber that did not come to its end.
void abandon_fiber(Fiber& fiber, void* token);

// Runs the fiber until it leaves; `for_good` if it will not be entered again.
void enter(Fiber& fiber);
void leave(Fiber& fiber, bool for_good);
void entered_first();  // what `entry` calls first

// Orders memory for ThreadSanitizer, which knows of nothing else that does: what came before a
// release comes before what follows an acquire of the same token.
void release(void* token);
void acquire(void* token);

}  // namespace cuda_simulator
