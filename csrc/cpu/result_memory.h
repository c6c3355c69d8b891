// Memory for large results, kept from call to call.
//
// A training loop frees the gradient rows of one step just before it asks for those of the next.
// The C library gives a large block back to the system, which then has to clear every page again: a
// quarter of the time of a large meta-step. And whenever it hands out a KB or takes back 64, it may
// sort all its small blocks anew: a tenth of a small one. Of what is kept here, large blocks are
// marked as free to take (MADV_FREE) but for the last 64 MB in use: whenever the system is short of
// memory it does, and they cost nothing but a fault. Until then they count as resident: at most 16
// blocks of 2 GiB together. A result in such memory cannot be resized in place.
#pragma once

#include "../tensor.h"

namespace metarec_fast::cpu {

// An uninitialised contiguous tensor of float32, float64 or int64; from kept memory unless it is
// small, in huge pages where there are any and it is large.
Tensor empty_result(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes);

}  // namespace metarec_fast::cpu
