// Sizes that host and device agree on. No torch and no CUDA in here.
#pragma once

#include <cstddef>

namespace regfused {

// Threads of a block, in every kernel: a norm is added up in an order that depends on it.
constexpr int kThreads = 256;

// How many bytes of arguments a kernel can have: everywhere, and with toolkit and driver 12.1 or newer.
constexpr size_t kSmallArguments = 4096;
constexpr size_t kLargeArguments = 32764;

}  // namespace regfused
