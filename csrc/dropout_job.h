// What the kernels of dropout are told, on every device. No torch in here.
#pragma once

#include <cstdint>

#include "chunk.h"

namespace regfused {

// y = x * factor over `numel` elements that lie behind one another: see dropout_rule.h.
struct DropoutJob {
  const void* input = nullptr;
  void* output = nullptr;         // may be the input
  const int64_t* seed = nullptr;  // the key of the generator, in the memory of the device
  int64_t numel = 0;
  double p = 0;
  DType dtype = DType::float32;
};

// Works on a chunk of the arrays, which begins with a row of dropout_rule.h; on the CPU.
using DropoutKernel = void (*)(const DropoutJob& job, const Chunk& chunk);

}  // namespace regfused
