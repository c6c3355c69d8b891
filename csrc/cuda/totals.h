// Sums over tasks and over teams, in double precision and always in the same order.
#pragma once

#include "dialect.h"
#include "problem.h"

namespace metarec_fast::cuda {

// Where numbers of a record go: each to its place, or `folded`, all of them into one.
template <typename scalar_t>
struct RecordPart {
  int at, count;
  bool folded;
  scalar_t* out;
};

template <typename scalar_t>
struct RecordParts {
  static constexpr int kMost = 12;
  RecordPart<scalar_t> parts[kMost];
  int num_parts = 0;

  void add(int at, int64_t count, bool folded, scalar_t* out) {
    parts[num_parts++] = {at, static_cast<int>(count), folded, out};
  }
};

// out ← Σ over the records [num_records, record_size].
template <typename scalar_t>
const char* sum_records(const scalar_t* records, int64_t num_records, int record_size,
                        const RecordParts<scalar_t>& parts, cudaStream_t stream);

// The same where records are long: threads side by side read numbers side by side. Nothing folded.
template <typename scalar_t>
const char* sum_long_records(const scalar_t* records, int64_t num_records, int record_size,
                             const RecordParts<scalar_t>& parts, cudaStream_t stream);

// normalisers[0] ← 1/Σ ω over all tasks, or with `entered` over those with entries;
// normalisers[1] ← the same over those with entries.
template <typename scalar_t>
const char* sum_task_weights(const scalar_t* task_weights, const int64_t* offsets,
                             int64_t num_tasks, bool entered, scalar_t* normalisers,
                             cudaStream_t stream);

}  // namespace metarec_fast::cuda
