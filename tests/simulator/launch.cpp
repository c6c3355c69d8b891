// Runs a grid, one block after the other, in the order that METAREC_SCHEDULE asks for.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "block.h"

namespace cuda_simulator {
namespace {

constexpr unsigned kMaxGridX = 2147483647u, kMaxGridYZ = 65535u, kMaxBlockZ = 64u;

char error[2048];
const char* kernel_name;
// A launch comes after what the host did before, and before what it does next.
char start_token[8], end_token[8];

// METAREC_SCHEDULE: "forward", "reverse" or "random:SEED", of threads and of blocks.
struct Schedule {
  bool reverse = false, random = false;
  uint64_t state = 0;

  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
} schedule;

void read_schedule() {
  const char* text = std::getenv("METAREC_SCHEDULE");
  schedule = {};
  if (!text || !*text || std::strcmp(text, "forward") == 0) return;
  schedule.reverse = std::strcmp(text, "reverse") == 0;
  schedule.random = std::sscanf(text, "random:%lu", &schedule.state) == 1;
  if (!schedule.reverse && !schedule.random)
    fail("METAREC_SCHEDULE: expected forward, reverse or random:SEED, got '%s'", text);
}

void next_order(int* order, int count) {
  for (int i = 0; i < count; ++i) order[i] = schedule.reverse ? count - 1 - i : i;
  if (!schedule.random) return;
  for (int i = count - 1; i > 0; --i) {
    const int other = static_cast<int>(schedule.next() % (i + 1)), swapped = order[i];
    order[i] = order[other];
    order[other] = swapped;
  }
}

void thread_main() {
  entered_first();
  acquire(start_token);
  block.body(block.argument);
  Thread& thread = *current;
  block.warps[thread.warp()].exited |= 1u << thread.lane();
  release(end_token);
  thread.finished = true;
  end_thread();
}

void start_threads() {
  for (Warp& warp : block.warps) warp.present = warp.exited = warp.num_groups = 0;
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.state = State::kReady;
    thread.finished = false;
    thread.number = i;
    const unsigned number = i, width = block.size.x, height = block.size.y;
    thread.index = {number % width, number / width % height, number / width / height};
    make_fiber(thread.fiber, block.memory->stacks[i], thread_main, i, block.number);
    block.warps[thread.warp()].present |= 1u << thread.lane();
  }
}

void end_threads() {
  for (int i = 0; i < block.num_threads; ++i)
    if (!block.threads[i].finished) abandon_fiber(block.threads[i].fiber, end_token);
}

void run_block_at(uint64_t number) {
  block.number = static_cast<int64_t>(number);
  const uint3 grid = block.grid;
  block.index = {static_cast<unsigned>(number % grid.x),
                 static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.num_shared_arrays = 0;
  block.static_bytes = 0;
  block.shared_end = block.dynamic_bytes;
  block.barriers_passed = 0;
  block.memory = fresh_memory();
  release(start_token);
  start_threads();
  run_block(next_order);
  end_threads();
  give_back(block.memory);
}

void run_blocks() {
  const uint64_t count = uint64_t{block.grid.x} * block.grid.y * block.grid.z;
  const uint64_t first = schedule.random ? schedule.next() % count : 0;
  for (uint64_t i = 0; i < count && !failed(); ++i)
    run_block_at(schedule.reverse ? count - 1 - i : (first + i) % count);
}

void check_sizes(uint3 grid, uint3 size, size_t shared_bytes) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kMaxThreads || size.z > kMaxBlockZ)
    fail("invalid block %u,%u,%u", size.x, size.y, size.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    fail("invalid grid %u,%u,%u", grid.x, grid.y, grid.z);
  if (shared_bytes > kSharedMemoryLimit)
    fail("%zu bytes of dynamic shared memory, where there are %zu", shared_bytes,
         kSharedMemoryLimit);
}

}  // namespace

void fail(const char* format, ...) {
  if (failed()) return;
  const int start = std::snprintf(error, sizeof error, "%s, block %u,%u,%u: ", kernel_name,
                                  block.index.x, block.index.y, block.index.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error + start, sizeof error - start, format, arguments);
  va_end(arguments);
}

bool failed() { return error[0] != 0; }

const char* run(const char* kernel, void (*body)(void*), void* argument, uint3 grid, uint3 size,
                size_t shared_bytes) {
  error[0] = 0;
  kernel_name = kernel;
  block.index = {0, 0, 0};
  check_sizes(grid, size, shared_bytes);
  read_schedule();
  if (failed()) return error;
  block.grid = grid;
  block.size = size;
  block.num_threads = static_cast<int>(size.x * size.y * size.z);
  block.dynamic_bytes = shared_bytes;
  block.body = body;
  block.argument = argument;
  enter_from_here();
  run_blocks();
  acquire(end_token);
  return failed() ? error : nullptr;
}

}  // namespace cuda_simulator
