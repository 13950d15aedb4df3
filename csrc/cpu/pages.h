// Large pages for large arrays.
#pragma once

#include <cstddef>

namespace regfused {

// Tells the system that all of an array will be written soon: from then on a page of it that was never touched
// is a large one, where the system has them for whoever asks (transparent_hugepage = madvise). The first touch
// of small ones takes several times longer than what is written there. Does nothing to arrays that malloc may
// have from the memory that it keeps.
void write_in_large_pages(void* array, size_t bytes);

}  // namespace regfused
