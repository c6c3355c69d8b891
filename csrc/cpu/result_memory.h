// Memory for large results, kept from call to call.
//
// A training loop frees the gradient rows of one step just before it asks for those of the next.
// The C library gives so large a block back to the system, which then has to clear every page
// again: a quarter of the time of a large meta-step. Blocks that are kept here are marked as free
// to take (MADV_FREE): whenever the system is short of memory it does, and they cost nothing but a
// fault. Until then they count as resident: at most 8 blocks of 2 GiB together. A result in such
// memory cannot be resized in place.
#pragma once

#include "../tensor.h"

namespace metarec_fast::cpu {

// An uninitialised contiguous tensor; from kept memory if it is large, in huge pages where there
// are any.
Tensor empty_result(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes);

}  // namespace metarec_fast::cpu
