// Functions that kernels on both devices share.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(METAREC_SIMULATED)
#define HOST_DEVICE inline
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
