// Large pages for large arrays.
#include "pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace regfused {

void write_in_large_pages(void* array, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kAlwaysMapped = size_t(32) << 20;  // by glibc: DEFAULT_MMAP_THRESHOLD_MAX
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kAlwaysMapped) return;
  const auto begin = (reinterpret_cast<uintptr_t>(array) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(array) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

}  // namespace regfused
