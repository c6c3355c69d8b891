// Items that users are not to get.
#pragma once

#include "dialect.h"

namespace metarec_fast::cuda {

// Items that a user is not to get, as numbers  t N + item,  ascending; none if keys is nullptr.
struct Excluded {
  const int64_t* keys;     // [E]
  const int64_t* offsets;  // [T + 1]

  __device__ bool contains(int64_t task, int64_t key) const {
    if (keys == nullptr) return false;
    int64_t begin = offsets[task], end = offsets[task + 1];
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (keys[middle] == key) return true;
      if (keys[middle] < key)
        begin = middle + 1;
      else
        end = middle;
    }
    return false;
  }
};

// Which task owns an entry: the last that begins at it or before.
__device__ inline int64_t task_of(const int64_t* offsets, int64_t num_tasks, int64_t entry) {
  int64_t task = 0, end = num_tasks;
  while (end - task > 1) {
    const int64_t middle = task + (end - task) / 2;
    (offsets[middle] <= entry ? task : end) = middle;
  }
  return task;
}

}  // namespace metarec_fast::cuda
