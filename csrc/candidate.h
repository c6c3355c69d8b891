// How items compete for a place among the best of a user: by score, and among equals by id. Host
// and device.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace metarec_fast {

template <typename scalar_t>
constexpr scalar_t kLowest = -std::numeric_limits<scalar_t>::infinity();

constexpr int64_t kNoItem = std::numeric_limits<int64_t>::max();  // with kLowest: after all items

template <typename scalar_t>
struct Candidate {
  scalar_t score;
  int64_t item;

  HOST_DEVICE bool better_than(const Candidate& other) const {
    return score > other.score || (score == other.score && item < other.item);
  }
};

// A score that is no number counts as −inf.
template <typename scalar_t>
HOST_DEVICE scalar_t as_number(scalar_t score) {
  return score == score ? score : kLowest<scalar_t>;
}

}  // namespace metarec_fast
