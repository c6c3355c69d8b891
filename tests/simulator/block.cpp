// Runs the threads of a block in turns: each until it has to wait for others.
#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_simulator {

Block block;
Thread* current = nullptr;

namespace {

const char* waits_at(const Thread& thread) {
  return thread.state == State::kAtBarrier ? "__syncthreads" : name_of(thread.request.op);
}

// Names two threads in this state, and counts the others.
int describe(char* text, size_t space, bool exited) {
  int written = 0, count = 0;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if ((thread.state == State::kDone) != exited || ++count > 2) continue;
    if (exited)
      written += std::snprintf(text + written, space - written, " thread %d has exited;", i);
    else
      written +=
          std::snprintf(text + written, space - written, " thread %d waits at %s %s:%d mask %08x;",
                        i, waits_at(thread), thread.request.place.file, thread.request.place.line,
                        thread.request.mask);
  }
  if (count > 2) written += std::snprintf(text + written, space - written, " (%d such)", count);
  return written;
}

void report_deadlock() {
  char text[1200];
  const int written = describe(text, sizeof text / 2, /*exited=*/false);
  describe(text + written, sizeof text / 2, /*exited=*/true);
  fail("deadlock:%s", text);
}

// Lets everyone go on if all are at the same barrier.
void resolve_barrier() {
  const Thread* first = nullptr;
  int waiting = 0, predicates = 0;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::kDone) continue;
    if (thread.state != State::kAtBarrier) return;
    if (!first) first = &thread;
    const Place &one = first->request.place, &other = thread.request.place;
    if (one.line != other.line || std::strcmp(one.file, other.file) != 0)
      return fail("divergent __syncthreads: thread %d at %s:%d, thread %d at %s:%d", first->number,
                  one.file, one.line, i, other.file, other.line);
    ++waiting;
    predicates += thread.request.predicate;
  }
  if (waiting == 0) return;
  if (waiting < block.num_threads)
    return fail("__syncthreads at %s:%d reached by %d threads after %d have exited",
                first->request.place.file, first->request.place.line, waiting,
                block.num_threads - waiting);
  ++block.barriers_passed;
  for (int i = 0; i < block.num_threads; ++i) {
    block.threads[i].answer = predicates;
    block.threads[i].state = State::kReady;
  }
}

int count(State state) {
  int found = 0;
  for (int i = 0; i < block.num_threads; ++i) found += block.threads[i].state == state;
  return found;
}

}  // namespace

void end_thread() {
  current->state = State::kDone;
  leave(current->fiber, /*for_good=*/true);
  std::abort();  // nobody comes back
}

void stop(Place place, const char* message) {
  fail("%s:%d: %s", place.file, place.line, message);
  end_thread();
}

void wait_as(State state) {
  current->state = state;
  leave(current->fiber, /*for_good=*/false);
}

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return block.index; }
const uint3& block_size() { return block.size; }
const uint3& grid_size() { return block.grid; }

void run_block(void (*next_order)(int* order, int count)) {
  static int order[kMaxThreads];
  for (;;) {
    next_order(order, block.num_threads);
    bool anyone_ran = false;
    for (int i = 0; i < block.num_threads; ++i) {
      Thread& thread = block.threads[order[i]];
      if (thread.state != State::kReady) continue;
      anyone_ran = true;
      current = &thread;
      enter(thread.fiber);
      current = nullptr;
      if (thread.state == State::kAtWarp && !failed()) join_group(thread);
      if (failed()) return;
    }
    if (count(State::kDone) == block.num_threads) return;
    resolve_barrier();
    if (!anyone_ran && !failed() && count(State::kReady) == 0) report_deadlock();
    if (failed()) return;
  }
}

}  // namespace cuda_simulator
