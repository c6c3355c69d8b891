// The bridge to PyTorch's stable C++ API: the names kernels use, and nothing else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>

// Where operators are registered: those on the simulator of CUDA threads under names of their own.
#ifdef METAREC_SIMULATED
#define METAREC_NAMESPACE metarec_fast_simulated
#else
#define METAREC_NAMESPACE metarec_fast
#endif

namespace metarec_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How many numbers there are, none in a tensor that is not there.
inline int64_t numel(const OptionalTensor& tensor) { return tensor ? tensor->numel() : 0; }

// torch::stable::contiguous() always enters the dispatcher; this does not when
// there is nothing to copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// What the C interface wants to know of a contiguous tensor that is to be made.
struct TensorLayout {
  int64_t dim, numel = 1;
  std::array<int64_t, 4> strides;
  int32_t dtype, device_type, device_index;

  TensorLayout(const Tensor& like, ScalarType dtype_in, std::initializer_list<int64_t> sizes)
      : dim(static_cast<int64_t>(sizes.size())),
        dtype(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype_in))) {
    for (int64_t i = dim - 1; i >= 0; --i) {
      strides[i] = numel;
      numel *= sizes.begin()[i];
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  }
};

// An uninitialised contiguous tensor on the device of `like`; torch::stable::new_empty() would look
// the operator up by name and box its arguments.
inline Tensor empty(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const TensorLayout layout(like, dtype, sizes);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(layout.dim, sizes.begin(), layout.strides.data(), layout.dtype,
                               layout.device_type, layout.device_index, &handle));
  return Tensor(handle);
}

// What an operator without arguments answers.
inline bool ask(const char* op) {
  std::array<StableIValue, 1> stack{};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// Calls body(scalar_t{}) with the C++ type that `dtype` names.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, op, ": expected dtype float32 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace metarec_fast
