// Step sizes of an MLP tower, and the sums of their gradients: one for each step k and each tensor
// W_1, b_1, …, W_L, b_L, or one for all steps (step_stride 0) or tensors (tensor_stride 0).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace metarec_fast {

template <typename Number>
struct TowerRates {
  Number* values;
  int64_t step_stride, tensor_stride;

  HOST_DEVICE Number& weight(int64_t k, int64_t l) const {
    return values[k * step_stride + 2 * (l - 1) * tensor_stride];
  }
  HOST_DEVICE Number& bias(int64_t k, int64_t l) const {
    return values[k * step_stride + (2 * l - 1) * tensor_stride];
  }
};

}  // namespace metarec_fast
