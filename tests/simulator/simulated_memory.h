// Shared memory, loads and stores past the caches, atomics.
#pragma once

#include <cstring>
#include <type_traits>

#include "scheduler.h"

#undef __shared__
#define __shared__ write_CUDA_SHARED_instead

#define CUDA_SHARED(T, name, count) \
  static_assert(alignof(T) <= 16);  \
  static const char name##_key = 0; \
  T* const name = static_cast<T*>(cuda_simulator::static_shared(&name##_key, sizeof(T) * (count)))
#define CUDA_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(cuda_simulator::dynamic_shared())

inline void __threadfence() { cuda_simulator::memory_fence(); }
inline void __threadfence_block() { cuda_simulator::memory_fence(); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldca(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <typename T>
void __stcg(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <typename T>
void __stwt(T* to, std::type_identity_t<T> value) {
  *to = value;
}

namespace cuda_simulator {

// *cell ← change(*cell), what was there before. Relaxed, as on the device, so that ThreadSanitizer
// takes no order from it.
template <typename T, typename Change>
T exchange(T* cell, Change change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits* const bits = reinterpret_cast<Bits*>(cell);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  T old;
  do {
    std::memcpy(&old, &before, sizeof(T));
    const T changed = change(old);
    std::memcpy(&after, &changed, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_simulator

template <typename T>
T atomicAdd(T* cell, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* cell, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* cell, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* cell, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* cell, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* cell, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_simulator::exchange(cell, [&](T old) { return old == expected ? value : old; });
}
