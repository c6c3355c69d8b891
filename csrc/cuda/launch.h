// From an operator to its kernels: device and stream of its tensors, and where it is registered.
#pragma once

#include "../tensor.h"
#include "dialect.h"

#ifdef METAREC_SIMULATED
// Registered for the CPU, whose memory the simulator works in.
#define METAREC_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(METAREC_NAMESPACE, CPU, m)
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define METAREC_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(METAREC_NAMESPACE, CUDA, m)
#endif

namespace metarec_fast::cuda {

// While it lives, the device of `tensor` is current; `stream` is the one its work belongs on.
#ifdef METAREC_SIMULATED
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
struct OnDevice {
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};
#endif

template <typename scalar_t>
const scalar_t* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

// Throws what a launch had to complain of.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error == nullptr ? "" : error);
}

}  // namespace metarec_fast::cuda
