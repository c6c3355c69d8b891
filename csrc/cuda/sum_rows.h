// Sums rows of equal ids: the same bits every time, unless atomics are allowed (atomic_sums.h), and
// nothing waits for the device.
#pragma once

#include "../tensor.h"

namespace metarec_fast::cuda {

// [num_rows, D] with  result[i] = Σ rows[e] over the entries e with ids[e] = i.  Also for rows [n].
// All ids lie in [0, num_rows).
Tensor sum_rows(const Tensor& ids, const Tensor& rows, int64_t num_rows);

}  // namespace metarec_fast::cuda
