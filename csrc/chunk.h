// Tensors of any size as one flat list of chunks. No torch in here.
#pragma once

#include <cstdint>

namespace regfused {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

// Consecutive elements of one tensor.
struct Chunk {
  int32_t tensor;  // an index of the list that was cut
  int32_t size;
  int64_t begin;
};

}  // namespace regfused
