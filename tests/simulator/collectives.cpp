// Barriers and warp collectives: who waits for whom, and what each is given when all have come.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace cuda_simulator {
namespace {

bool same_place(const Place& one, const Place& other) {
  return one.line == other.line && std::strcmp(one.file, other.file) == 0;
}

Thread& lane_of(int warp, int lane) { return block.threads[warp * kWarpSize + lane]; }

template <typename Body>
void for_each_lane(int warp, unsigned mask, Body body) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) body(lane_of(warp, lane));
}

// The lane that a shuffle reads from; a lane reads itself where the other is out of its segment.
int shuffle_source(const Thread& thread) {
  const Request& request = thread.request;
  const int lane = thread.lane(), width = request.width, first = lane / width * width;
  int source = lane;
  switch (request.op) {
    case Collective::kShuffle:
      return first + (request.argument % width + width) % width;
    case Collective::kShuffleXor:
      source = lane ^ request.argument;
      return source / width * width > first ? lane : source;
    case Collective::kShuffleUp:
      source = lane - request.argument;
      return source < first ? lane : source;
    default:
      source = lane + request.argument;
      return source >= first + width ? lane : source;
  }
}

bool is_shuffle(Collective op) {
  return op >= Collective::kShuffle && op <= Collective::kShuffleDown;
}

void answer_shuffle(Thread& thread) {
  const int source = shuffle_source(thread);
  const Request& request = thread.request;
  if (source < 0 || source >= kWarpSize || !(request.mask >> source & 1))
    return fail("%s at %s:%d: lane %d reads lane %d, which is not in mask %08x",
                name_of(request.op), request.place.file, request.place.line, thread.lane(), source,
                request.mask);
  thread.answer = lane_of(thread.warp(), source).request.value;
}

uint64_t reduce(int warp, const Request& request) {
  uint64_t result = request.op == Collective::kMin ? ~uint64_t{0} : 0;
  for_each_lane(warp, request.mask, [&](const Thread& thread) {
    const uint64_t value = thread.request.value;
    switch (request.op) {
      case Collective::kBallot:
        result |= value << thread.lane();
        break;
      case Collective::kAdd:
        result = static_cast<uint32_t>(result + value);
        break;
      case Collective::kMax:
        result = std::max(result, value);
        break;
      default:
        result = std::min(result, value);
    }
  });
  return result;
}

void check_mask(const Thread& thread, const Warp& warp) {
  const Request& request = thread.request;
  const char* what = nullptr;
  unsigned lanes = 0;
  if ((lanes = request.mask & ~warp.present))
    what = "the block does not have";
  else if ((lanes = request.mask & warp.exited))
    what = "has exited";
  if (what)
    fail("%s at %s:%d: mask %08x names lane %d, which %s", name_of(request.op), request.place.file,
         request.place.line, request.mask, __builtin_ctz(lanes), what);
}

void check_same_collective(const Thread& one, const Thread& other) {
  const Request &mine = one.request, &theirs = other.request;
  if (mine.op != theirs.op || !same_place(mine.place, theirs.place))
    fail("divergent collective: lane %d is at %s %s:%d, lane %d at %s %s:%d (same mask %08x)",
         one.lane(), name_of(mine.op), mine.place.file, mine.place.line, other.lane(),
         name_of(theirs.op), theirs.place.file, theirs.place.line, mine.mask);
}

}  // namespace

const char* name_of(Collective op) {
  constexpr const char* kNames[] = {"__syncwarp",        "__shfl_sync",       "__shfl_xor_sync",
                                    "__shfl_up_sync",    "__shfl_down_sync",  "__ballot_sync",
                                    "__reduce_add_sync", "__reduce_max_sync", "__reduce_min_sync"};
  return kNames[static_cast<int>(op)];
}

Group& group_of(const Thread& thread) {
  Warp& warp = block.warps[thread.warp()];
  const unsigned mask = thread.request.mask;
  for (int i = 0; i < warp.num_groups; ++i)
    if (warp.groups[i].mask == mask) return warp.groups[i];
  if (warp.num_groups == kMaxGroups) {
    fail("more than %d different masks in one warp", kMaxGroups);
    end_thread();
  }
  Group& made = warp.groups[warp.num_groups++];
  made = {mask, 0, 0};
  return made;
}

void join_group(Thread& thread) {
  check_mask(thread, block.warps[thread.warp()]);
  if (failed()) return;
  Group& group = group_of(thread);
  group.arrived |= 1u << thread.lane();
  if (group.arrived != group.mask) return;
  group.arrived = 0;
  const Request& request = thread.request;
  for_each_lane(thread.warp(), group.mask, [&](Thread& other) {
    check_same_collective(thread, other);
    other.state = State::kReady;
  });
  if (failed()) return;
  if (request.op == Collective::kSyncwarp) {
    ++group.syncs;
  } else if (is_shuffle(request.op)) {
    for_each_lane(thread.warp(), group.mask, answer_shuffle);
  } else {
    const uint64_t answer = reduce(thread.warp(), request);
    for_each_lane(thread.warp(), group.mask, [&](Thread& other) { other.answer = answer; });
  }
}

uint64_t warp_collective(Collective op, unsigned mask, uint64_t value, int argument, int width,
                         Place place) {
  Thread& thread = *current;
  thread.request = {op, mask, value, argument, width, false, place};
  if (!(mask >> thread.lane() & 1)) {
    fail("%s at %s:%d: lane %d calls with mask %08x, which leaves it out", name_of(op), place.file,
         place.line, thread.lane(), mask);
    end_thread();
  }
  if (op != Collective::kSyncwarp) {  // shuffles and votes order no memory
    wait_as(State::kAtWarp);
    return thread.answer;
  }
  const Group& group = group_of(thread);
  const int number = static_cast<int>(&group - block.warps[thread.warp()].groups);
  void* token = block.memory->warp_tokens[thread.warp()][number][group.syncs % 2];
  release(token);
  wait_as(State::kAtWarp);
  acquire(token);
  return 0;
}

int block_barrier(bool predicate, Place place) {
  Thread& thread = *current;
  thread.request = {};
  thread.request.predicate = predicate;
  thread.request.place = place;
  void* token = block.memory->barrier_tokens[block.barriers_passed % 2];
  release(token);
  wait_as(State::kAtBarrier);
  acquire(token);
  return static_cast<int>(thread.answer);
}

}  // namespace cuda_simulator
