// Counter-based random numbers, the same as in metarec_fast/_random.py, which documents them.
#pragma once

#include <cstdint>

namespace metarec {

// What a stream of random numbers is for; the last counter below the epoch.
enum class Purpose : uint64_t { kOrder, kSupport, kQuery, kRows, kNegatives };

// The index-th output of SplitMix64 seeded with `key`.
inline uint64_t random_at(uint64_t key, uint64_t index) {
  uint64_t bits = key + (index + 1) * 0x9E3779B97F4A7C15u;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

inline uint64_t random_at(uint64_t key, Purpose purpose) {
  return random_at(key, static_cast<uint64_t>(purpose));
}

// An integer in [0, bound), bound < 2^32.
inline int64_t below(uint64_t bits, int64_t bound) {
  return static_cast<int64_t>(((bits >> 32) * static_cast<uint64_t>(bound)) >> 32);
}

}  // namespace metarec
