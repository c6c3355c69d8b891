// Memory in pages of 2 MB instead of 4 KB: large results are there after a tenth of the page
// faults' time, and scattered rows of a table cost fewer page walks. Wishes: where the system has
// no huge pages, nothing changes.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "../tensor.h"

namespace metarec_fast::cpu {

constexpr size_t kHugePage = size_t{1} << 21;

#ifdef MADV_HUGEPAGE
// The huge pages that lie in a tensor whole.
struct HugePages {
  explicit HugePages(const Tensor& tensor) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (address + kHugePage - 1) / kHugePage;
    const uintptr_t last = (address + tensor.numel() * tensor.element_size()) / kHugePage;
    begin = first * kHugePage;
    count = last > first ? static_cast<int64_t>(last - first) : 0;
  }

  void advise(int64_t first, int64_t pages, int advice) const {
    madvise(reinterpret_cast<void*>(begin + first * kHugePage), pages * kHugePage, advice);
  }

  uintptr_t begin;
  int64_t count;  // of pages
};
#endif

// Asks for huge pages, for memory that nobody has touched yet.
inline void prefer_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  const HugePages pages(tensor);
  if (pages.count > 0) pages.advise(0, pages.count, MADV_HUGEPAGE);
#endif
}

// Moves what the tensor holds to huge pages as long as that is as quick as copying should be: 0.3
// ms a page. Where a virtual machine has to get each from its host first it takes 25, so the rest
// is left to the system, which does it by and by.
inline void move_to_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr int kCollapse = 25;                            // MADV_COLLAPSE, Linux 6.1
  constexpr auto kLongest = std::chrono::milliseconds(1);  // a page
  constexpr int64_t kTogether = 4;
  const HugePages pages(tensor);
  if (pages.count == 0) return;
  using Clock = std::chrono::steady_clock;
  for (int64_t first = 0; first < pages.count; first += kTogether) {
    const Clock::time_point start = Clock::now();
    const int64_t here = std::min(kTogether, pages.count - first);
    pages.advise(first, here, kCollapse);
    if (Clock::now() - start > here * kLongest) break;
  }
  pages.advise(0, pages.count, MADV_HUGEPAGE);
#endif
}

}  // namespace metarec_fast::cpu
