// The bridge to PyTorch's stable C++ API: the names kernels use, and nothing else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>

namespace metarec_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch::stable::contiguous() always enters the dispatcher; this does not when
// there is nothing to copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised contiguous tensor on the device of `like`; torch::stable::new_empty() would look
// the operator up by name and box its arguments.
inline Tensor empty(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides.data(), dtype_code, type, index, &handle));
  return Tensor(handle);
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
