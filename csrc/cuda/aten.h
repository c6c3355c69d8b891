// PyTorch's own operators that ours call, on the device of their tensors.
#pragma once

#include <utility>

#include "../tensor.h"

namespace metarec_fast::cuda {

// Sorted along the last dimension, and where everything was; equal keys stay in their order.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& keys, bool descending = false) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(descending)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// sums[i] = numbers[0] + … + numbers[i],  int64 [n].
inline Tensor cumulative_sum(const Tensor& numbers) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(numbers), from(int64_t{0}), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An int64 scalar, on the host: waits for the device.
inline int64_t read_scalar(const Tensor& scalar) {
  int64_t result = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(scalar.get(), &result));
  return result;
}

}  // namespace metarec_fast::cuda
