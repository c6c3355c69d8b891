// Makes of a kernel what can be called past the dispatcher.
#pragma once

#include <array>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../direct_call.h"
#include "../tensor.h"

// Exports the kernel as metarec_fast_<name>.
#define METAREC_DIRECT_CALL(name, kernel)                                             \
  extern "C" __attribute__((visibility("default"))) int64_t metarec_fast_##name(      \
      const metarec_fast::DirectArgument* arguments, int64_t count, void** results) { \
    return metarec_fast::cpu::call_directly(&kernel, arguments, count, results);      \
  }

namespace metarec_fast::cpu {

// Of a tensor with other memory, on another device or in another layout, only the dispatcher knows
// what to do with it.
inline void check_is_plain(const Tensor& tensor) {
  int32_t device = -1, layout = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(device == aoti_torch_device_type_cpu() && layout == aoti_torch_layout_strided(),
                  "expected a strided tensor on the CPU");
}

// An argument as a parameter of type T; `tensor` is what it holds.
template <typename T>
decltype(auto) as_parameter(const DirectArgument& argument, const OptionalTensor& tensor) {
  using Kind = DirectArgument::Kind;
  const auto expect = [&](Kind kind) {
    STD_TORCH_CHECK(argument.kind == kind, "an argument is of another type than the operator's");
  };
  if constexpr (std::is_same_v<T, OptionalTensor>) {
    if (!tensor) expect(Kind::kNone);
    return (tensor);
  } else if constexpr (std::is_same_v<T, Tensor>) {
    expect(Kind::kTensor);
    return (*tensor);
  } else if constexpr (std::is_same_v<T, std::string>) {
    expect(Kind::kText);
    return std::string(argument.text);
  } else if constexpr (std::is_same_v<T, double>) {
    expect(Kind::kReal);
    return double{argument.real};
  } else if constexpr (std::is_same_v<T, bool>) {
    expect(Kind::kTruth);
    return bool{argument.truth};
  } else {
    static_assert(std::is_same_v<T, int64_t>);
    expect(Kind::kInteger);
    return int64_t{argument.integer};
  }
}

// A result's handle, which whoever gets it owns.
inline void* give_away(const OptionalTensor& result) {
  AtenTensorHandle handle = nullptr;
  if (result) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result->get(), &handle));
  return handle;
}

template <typename... Results, typename... Parameters>
int64_t call_directly(std::tuple<Results...> (*kernel)(Parameters...),
                      const DirectArgument* arguments, int64_t count, void** results) {
  static_assert(sizeof...(Results) <= kMostResults && sizeof...(Parameters) <= kMostArguments);
  try {
    std::array<OptionalTensor, kMostArguments> tensors;
    for (int64_t i = 0; i < count; ++i)
      if (arguments[i].kind == DirectArgument::Kind::kTensor)
        tensors[i].emplace(static_cast<AtenTensorHandle>(arguments[i].tensor));
    STD_TORCH_CHECK(count == sizeof...(Parameters), "not as many arguments as the operator's");
    for (const OptionalTensor& tensor : tensors)
      if (tensor) check_is_plain(*tensor);

    const auto found = [&]<size_t... i>(std::index_sequence<i...>) {
      return kernel(as_parameter<std::remove_cvref_t<Parameters>>(arguments[i], tensors[i])...);
    }(std::index_sequence_for<Parameters...>{});
    return std::apply(
        [&](const auto&... each) {
          int64_t given = 0;
          ((results[given++] = give_away(each)), ...);
          return given;
        },
        found);
  } catch (const std::exception&) {
    return -1;
  }
}

}  // namespace metarec_fast::cpu
