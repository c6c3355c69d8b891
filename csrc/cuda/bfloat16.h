// Numbers of a bfloat16 table, widened as they are read.
#pragma once

#include "dialect.h"

namespace metarec_fast::cuda {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float32

  __device__ operator float() const { return __uint_as_float(uint32_t{bits} << 16); }
};

}  // namespace metarec_fast::cuda
