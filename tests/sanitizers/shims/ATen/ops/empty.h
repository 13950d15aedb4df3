// Stands in for torch's allocation of tensors: doubles alone.
#pragma once

#include <ATen/core/Tensor.h>

namespace at {

using IntArrayRef = std::initializer_list<int64_t>;

enum ScalarType { kDouble };

struct TensorOptions {
  TensorOptions dtype(ScalarType) const { return *this; }
};

inline Tensor empty(IntArrayRef shape, TensorOptions) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return Tensor(numel);
}

}  // namespace at
