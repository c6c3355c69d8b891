// CUDA for g++: what kernels say in it, done on the CPU by one fiber per CUDA thread.
#pragma once

#include <cuda_bf16.h>  // also brings float4, dim3, an empty __global__ …
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "scheduler.h"
#include "simulated_math.h"
#include "simulated_memory.h"
#include "simulated_threads.h"

namespace metarec_fast::cuda {

// What was wrong, or nullptr.
template <typename... Parameters>
const char* launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t,
                   std::type_identity_t<Parameters>... arguments) {
  auto body = [&] { kernel(arguments...); };
  using Body = decltype(body);
  return cuda_simulator::run(
      name, [](void* argument) { (*static_cast<Body*>(argument))(); }, &body,
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes);
}

// Few blocks, so that each has several tasks to do.
template <typename Kernel>
int64_t resident_blocks(Kernel, int, size_t) {
  return 3;
}

inline int64_t shared_memory_limit() { return cuda_simulator::kSharedMemoryLimit; }

}  // namespace metarec_fast::cuda
