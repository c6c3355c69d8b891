// cusim.hpp - run CUDA-dialect kernels on the host: one fiber per CUDA thread (tests only).
// Included instead of cuda_runtime.h when a .cu file is compiled by g++ (see cuda_dialect.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cmath>
#include <cstring>
#include <cuda_fp16.h>   // host-usable from g++; also brings float4, uint3, __global__ (empty) ...
#include <cuda_bf16.h>
#include <type_traits>

// ---- runtime interface (cusim.cpp; that TU is never built with -fsanitize=thread) ----
extern "C" {
struct cusim_dim3 { unsigned x, y, z; };
typedef void (*cusim_body)(void*);
const cusim_dim3* cusim_tid(); const cusim_dim3* cusim_bid();
const cusim_dim3* cusim_bdim(); const cusim_dim3* cusim_gdim();
void* cusim_shared(const void* key, size_t bytes, size_t align);     // static shared array
void* cusim_dyn_shared();
void cusim_syncthreads(const char* file, int line);
// warp collective: deposits val, waits for every lane of mask, returns this lane's result
uint64_t cusim_collective(int op, unsigned mask, uint64_t val, int arg, int width, const char* file, int line);
void cusim_fail(const char* file, int line, const char* msg);
int  cusim_run(cusim_body, void* arg, cusim_dim3 g, cusim_dim3 b, size_t smem, const char* name); // 0 = ok
const char* cusim_error();
void cusim_set_schedule(int mode, unsigned seed);                     // 0 fwd, 1 reverse, 2 random
void cusim_set_max_smem(size_t bytes);                                // = cudaFuncSetAttribute opt-in
struct cusim_async { void* d; const void* s; size_t n; int batch; };
cusim_async* cusim_async_slot(); int cusim_async_commit(); int cusim_async_take(int keep, cusim_async* out);
}
enum { CUSIM_SYNCWARP, CUSIM_SHFL, CUSIM_SHFL_XOR, CUSIM_SHFL_UP, CUSIM_SHFL_DOWN, CUSIM_BALLOT, CUSIM_ADD_U32, CUSIM_MAX_U32, CUSIM_MIN_U32 };

// ---- dialect ----
#undef __shared__
#define __shared__ CUSIM_error_use_CUDA_SHARED_instead
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#define threadIdx (*cusim_tid())
#define blockIdx  (*cusim_bid())
#define blockDim  (*cusim_bdim())
#define gridDim   (*cusim_gdim())
static constexpr int warpSize = 32;
#define CUDA_SHARED(T, name, n) static const char name##_key_ = 0; T* const name = static_cast<T*>(cusim_shared(&name##_key_, sizeof(T) * (n), alignof(T) < 16 ? 16 : alignof(T)))
#define CUDA_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(cusim_dyn_shared())
#define __syncthreads() cusim_syncthreads(__FILE__, __LINE__)
inline void cusim_syncwarp_(const char* f, int l, unsigned m = 0xffffffffu) { cusim_collective(CUSIM_SYNCWARP, m, 0, 0, 32, f, l); }
#define __syncwarp(...) cusim_syncwarp_(__FILE__, __LINE__ __VA_OPT__(,) __VA_ARGS__)
template <class T> inline T cusim_shfl_(int op, unsigned m, T v, int a, int w, const char* f, int l) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffle type");
  uint64_t x = 0; __builtin_memcpy(&x, &v, sizeof(T));
  x = cusim_collective(op, m, x, a, w, f, l);
  __builtin_memcpy(&v, &x, sizeof(T)); return v;
}
struct cusim_shfler { int op; const char* f; int l;
  template <class T> T operator()(unsigned m, T v, int a, int w = 32) const { return cusim_shfl_(op, m, v, a, w, f, l); } };
#define __shfl_sync      cusim_shfler{CUSIM_SHFL, __FILE__, __LINE__}
#define __shfl_xor_sync  cusim_shfler{CUSIM_SHFL_XOR, __FILE__, __LINE__}
#define __shfl_up_sync   cusim_shfler{CUSIM_SHFL_UP, __FILE__, __LINE__}
#define __shfl_down_sync cusim_shfler{CUSIM_SHFL_DOWN, __FILE__, __LINE__}
#define __ballot_sync(m, p) unsigned(cusim_collective(CUSIM_BALLOT, m, !!(p), 0, 32, __FILE__, __LINE__))
#define __any_sync(m, p) int(__ballot_sync(m, p) != 0)
#define __all_sync(m, p) int(__ballot_sync(m, p) == unsigned(m))
#define __reduce_add_sync(m, v) unsigned(cusim_collective(CUSIM_ADD_U32, m, unsigned(v), 0, 32, __FILE__, __LINE__))
#define __reduce_max_sync(m, v) unsigned(cusim_collective(CUSIM_MAX_U32, m, unsigned(v), 0, 32, __FILE__, __LINE__))
#define __activemask() (cusim_fail(__FILE__, __LINE__, "__activemask() is not a convergence guarantee"), 0u)
#define __trap() cusim_fail(__FILE__, __LINE__, "__trap()")
#define __threadfence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return x ? __builtin_ctz(x) + 1 : 0; }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
// atomics: relaxed, as on the device, so that ThreadSanitizer sees no ordering from them
template <class T, class U> inline T cusim_rmw(T* p, U f) {
  using B = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  B* b = reinterpret_cast<B*>(p); B o = __atomic_load_n(b, __ATOMIC_RELAXED), n; T ov, nv;
  do { __builtin_memcpy(&ov, &o, sizeof(T)); nv = f(ov); __builtin_memcpy(&n, &nv, sizeof(T)); }
  while (!__atomic_compare_exchange_n(b, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return ov;
}
template <class T> inline T atomicAdd(T* p, std::type_identity_t<T> v) { return cusim_rmw(p, [v](T o) { return o + v; }); }
template <class T> inline T atomicMax(T* p, std::type_identity_t<T> v) { return cusim_rmw(p, [v](T o) { return o > v ? o : v; }); }
template <class T> inline T atomicMin(T* p, std::type_identity_t<T> v) { return cusim_rmw(p, [v](T o) { return o < v ? o : v; }); }
template <class T> inline T atomicExch(T* p, std::type_identity_t<T> v) { return cusim_rmw(p, [v](T) { return v; }); }
template <class T> inline T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) { return cusim_rmw(p, [c, v](T o) { return o == c ? v : o; }); }
// cp.async: the copy happens no earlier than the wait, so a missing wait reads poison
inline void __pipeline_memcpy_async(void* d, const void* s, size_t n) {
  if ((n != 4 && n != 8 && n != 16) || (uintptr_t(d) | uintptr_t(s)) % n) cusim_fail(__FILE__, __LINE__, "cp.async size/alignment");
  cusim_async* a = cusim_async_slot(); a->d = d; a->s = s; a->n = n;
}
inline void __pipeline_commit() { cusim_async_commit(); }
inline void __pipeline_wait_prior(int keep) {
  cusim_async a;
  while (cusim_async_take(keep, &a)) for (size_t i = 0; i < a.n / 4; ++i) static_cast<uint32_t*>(a.d)[i] = static_cast<const uint32_t*>(a.s)[i];
}
// ---- host side ----
inline float __uint_as_float(unsigned x) { float r; __builtin_memcpy(&r, &x, 4); return r; }
namespace metarec_fast::cuda {
template <class... P, class... A>
inline const char* launch(const char* name, void (*k)(P...), dim3 g, dim3 b, size_t smem, cudaStream_t, A... a) {
  auto f = [&] { k(a...); };
  using F = decltype(f);
  if (smem > (48 << 10)) cusim_set_max_smem(smem);
  int rc = cusim_run([](void* q) { (*static_cast<F*>(q))(); }, &f, {g.x, g.y, g.z}, {b.x, b.y, b.z}, smem, name);
  return rc ? cusim_error() : nullptr;
}
// Few blocks, so that each has several tasks to do.
template <class K> inline int64_t resident_blocks(K, int, size_t) { return 3; }
inline int64_t shared_memory_limit() { return 227 << 10; }
}  // namespace metarec_fast::cuda
