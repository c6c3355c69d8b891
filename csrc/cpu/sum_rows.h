// Sums rows of equal ids, always in the order of the entries: the same bits for any number of
// threads.
#pragma once

#include "../tensor.h"

namespace metarec_fast::cpu {

// [num_rows, D] with  result[i] = Σ rows[e] over the entries e with ids[e] = i.  Also for rows [n].
Tensor sum_rows(const Tensor& ids, const Tensor& rows, int64_t num_rows);

}  // namespace metarec_fast::cpu
