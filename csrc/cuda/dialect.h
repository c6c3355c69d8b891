// CUDA as the kernels write it: nvcc's, or that of the simulator in which the tests run the same
// sources without a GPU (tests/simulator).
#pragma once

#ifdef METAREC_SIMULATED
#include "cuda_simulator.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define CUDA_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define CUDA_DYNAMIC_SHARED(T, name)         \
  extern __shared__ float4 name##_storage[]; \
  T* const name = reinterpret_cast<T*>(name##_storage)

namespace metarec_fast::cuda {

// What is wrong, or nullptr.
inline const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Dynamic and static together may be 48 KB without asking; no kernel has 16 KB of static arrays.
constexpr size_t kSharedMemoryWithoutAsking = 32 << 10;

template <typename... Parameters>
const char* launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t stream,
                   std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > kSharedMemoryWithoutAsking)
    if (const char* error = message(cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))))
      return error;
  void* pointers[] = {&arguments...};
  return message(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                  shared_bytes, stream));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// How many blocks of a kernel run at once on the whole device.
template <typename Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared_bytes) {
  if (shared_bytes > kSharedMemoryWithoutAsking)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  return int64_t{blocks > 0 ? blocks : 1} * device_attribute(cudaDevAttrMultiProcessorCount);
}

// Of one block, in bytes.
inline int64_t shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace metarec_fast::cuda
#endif

#include "row_layout.h"

namespace metarec_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

inline unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace metarec_fast::cuda
