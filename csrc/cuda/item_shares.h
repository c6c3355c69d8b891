// 1 / Σ ω over the tasks that hold an item: what Reptile counts each of its support entries by.
#pragma once

#include "../arguments.h"
#include "launch.h"

namespace metarec_fast::cuda {

// Of every support entry's item, [n]; ω ≥ 0, one each where there are no `task_weights`.
Tensor item_shares(const RaggedItems& support, const OptionalTensor& task_weights, ScalarType dtype,
                   cudaStream_t stream);

}  // namespace metarec_fast::cuda
