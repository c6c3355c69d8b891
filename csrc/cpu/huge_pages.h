// Memory in pages of 2 MB instead of 4 KB: large results are there after a tenth of the page
// faults' time, and scattered rows of a table cost fewer page walks. Wishes: where the system has
// no huge pages, nothing changes.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "../tensor.h"

namespace metarec_fast::cpu {

// Asks for huge pages where all of one lies in the tensor. Cheap, for memory that nobody has
// touched yet; with `collapse` what it holds already moves at once, which copies it.
inline void prefer_huge_pages(const Tensor& tensor, bool collapse = false) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + tensor.numel() * tensor.element_size()) / kHugePage * kHugePage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  if (collapse) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

}  // namespace metarec_fast::cpu
