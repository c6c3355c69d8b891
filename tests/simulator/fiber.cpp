// Switches between stacks: the registers a function must keep are pushed on the one and popped from
// the other.
#include "fiber.h"

#ifdef SIMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMULATOR_THREAD
#include <sanitizer/tsan_interface.h>
#endif

#ifndef __x86_64__
#error "the simulator switches stacks on x86-64 only"
#endif

extern "C" void cuda_simulator_switch(void** save, void* to);
asm(R"(
  .text
  .globl cuda_simulator_switch
  .hidden cuda_simulator_switch
  .type cuda_simulator_switch, @function
cuda_simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_simulator_switch, . - cuda_simulator_switch
)");

namespace cuda_simulator {
namespace {

constexpr int kSavedRegisters = 6;

// Of the scheduler, which enters the fibers.
struct {
  void* stack_pointer;
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;
  void* tsan_context;
} home;

}  // namespace

void enter_from_here() {
#ifdef SIMULATOR_THREAD
  home.tsan_context = __tsan_get_current_fiber();
#endif
}

void make_fiber(Fiber& fiber, char* stack, void (*entry)(), [[maybe_unused]] int number,
                [[maybe_unused]] int64_t block_number) {
  fiber.stack = stack;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#ifdef SIMULATOR_THREAD
  static void* contexts[kContextSets][kMaxFibers];
  void*& context = contexts[block_number % kContextSets][number];
  if (!context) context = __tsan_create_fiber(0);
  fiber.tsan_context = context;
#endif
}

void abandon_fiber([[maybe_unused]] Fiber& fiber, [[maybe_unused]] void* token) {
#ifdef SIMULATOR_THREAD
  __tsan_switch_to_fiber(fiber.tsan_context, __tsan_switch_to_fiber_no_sync);
  release(token);
  __tsan_switch_to_fiber(home.tsan_context, __tsan_switch_to_fiber_no_sync);
#endif
}

void enter(Fiber& fiber) {
#ifdef SIMULATOR_ADDRESS
  __sanitizer_start_switch_fiber(&home.fake_stack, fiber.stack, kStackBytes);
#endif
#ifdef SIMULATOR_THREAD
  __tsan_switch_to_fiber(fiber.tsan_context, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_simulator_switch(&home.stack_pointer, fiber.stack_pointer);
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
#endif
}

void entered_first() {
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.stack_bytes);
#endif
}

void leave(Fiber& fiber, [[maybe_unused]] bool for_good) {
#ifdef SIMULATOR_ADDRESS
  void** keep = for_good ? nullptr : &fiber.fake_stack;
  __sanitizer_start_switch_fiber(keep, home.stack, home.stack_bytes);
#endif
#ifdef SIMULATOR_THREAD
  __tsan_switch_to_fiber(home.tsan_context, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_simulator_switch(&fiber.stack_pointer, home.stack_pointer);
#ifdef SIMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &home.stack, &home.stack_bytes);
#endif
}

void release([[maybe_unused]] void* token) {
#ifdef SIMULATOR_THREAD
  __tsan_release(token);
#endif
}

void acquire([[maybe_unused]] void* token) {
#ifdef SIMULATOR_THREAD
  __tsan_acquire(token);
#endif
}

}  // namespace cuda_simulator
