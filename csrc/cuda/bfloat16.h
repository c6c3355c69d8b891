// Numbers of a bfloat16 table, widened as they are read.
#pragma once

#include <cstdint>
#include <cstring>

#include "../host_device.h"

namespace metarec_fast::cuda {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float32

  HOST_DEVICE operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float result;
    std::memcpy(&result, &wide, sizeof(result));
    return result;
  }
};

}  // namespace metarec_fast::cuda
