// Arithmetic that CUDA has by names of its own. Fast intrinsics are exact here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }

// On the device min and max need no namespace.
#define CUDA_SIMULATOR_MIN_MAX(T)                  \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_SIMULATOR_MIN_MAX(int)
CUDA_SIMULATOR_MIN_MAX(unsigned)
CUDA_SIMULATOR_MIN_MAX(long)
CUDA_SIMULATOR_MIN_MAX(unsigned long)
CUDA_SIMULATOR_MIN_MAX(long long)
CUDA_SIMULATOR_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

namespace cuda_simulator {

template <typename To, typename From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cuda_simulator

inline float __uint_as_float(unsigned x) { return cuda_simulator::same_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_simulator::same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_simulator::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_simulator::same_bits<int>(x); }
inline double __longlong_as_double(long long x) { return cuda_simulator::same_bits<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_simulator::same_bits<long long>(x); }
