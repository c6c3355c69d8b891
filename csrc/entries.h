// Entries of a batch as kernels on both devices see them: plain pointers, and where the gradients
// of their items go.
#pragma once

#include <cstdint>

#include "losses.h"

namespace metarec_fast {

// Entries of T tasks, one after the other.
template <typename scalar_t>
struct EntryData {
  const int64_t* items;
  const int64_t* offsets;
  const int64_t* negatives;  // [n, num_negatives]
  int64_t num_negatives;
  const scalar_t* log_q;  // [n, 1 + num_negatives], or nullptr

  HOST_DEVICE int64_t begin(int64_t task) const { return offsets[task]; }
  HOST_DEVICE int64_t size(int64_t task) const { return offsets[task + 1] - offsets[task]; }
  HOST_DEVICE int64_t candidates() const { return 1 + num_negatives; }  // of an entry
  // Candidate 0 of an entry is its item, the others are its negatives.
  HOST_DEVICE int64_t candidate(int64_t entry, int64_t j) const {
    return j == 0 ? items[entry] : negatives[entry * num_negatives + j - 1];
  }
  // Rows that a task adapts on, of an entry: one, a difference for each negative, or all
  // candidates.
  HOST_DEVICE int64_t group(Loss loss) const {
    if (loss == Loss::kBpr) return num_negatives;
    return loss == Loss::kSoftmax ? candidates() : 1;
  }
};

// Item gradients have a row for each support item, then each support negative, query item and query
// negative. Where the support gets none (first order), its rows are left out.
struct ItemRows {
  int64_t support_entries, support_negatives, query_entries, query_negatives;  // negatives: each
  bool support;

  HOST_DEVICE int64_t query_begin() const {
    return support ? support_entries * (1 + support_negatives) : 0;
  }
  HOST_DEVICE int64_t size() const { return query_begin() + query_entries * (1 + query_negatives); }

  // Where candidate j of an entry has its row.
  HOST_DEVICE int64_t of_support(int64_t entry, int64_t j) const {
    return j == 0 ? entry : support_entries + entry * support_negatives + j - 1;
  }
  HOST_DEVICE int64_t of_query(int64_t entry, int64_t j) const {
    return query_begin() + (j == 0 ? entry : query_entries + entry * query_negatives + j - 1);
  }
};

}  // namespace metarec_fast
