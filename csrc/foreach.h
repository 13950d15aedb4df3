// Passes over a list of tensors: what a kernel is told. No torch in here.
#pragma once

#include "chunk.h"
#include "rule/norm_rule.h"

namespace regfused {

struct ForeachTensor {
  void* data = nullptr;
  void* out = nullptr;  // where a pass writes that does not work in place; as large as the tensor
  int64_t numel = 0;
  DType dtype = DType::float32;
};

// The passes over one chunk, compiled once per instruction set.
struct ForeachKernels {
  // Accumulated, not finished.
  double (*norm)(const ForeachTensor&, const Chunk&, NormType);
  // data = factor * data.
  void (*scale)(const ForeachTensor&, const Chunk&, double factor);
  // l1*sum|p| + l2*sum(p^2).
  double (*penalty)(const ForeachTensor&, const Chunk&, double l1, double l2);
  // out = gain * (l1*sign(p) + 2*l2*p).
  void (*penalty_gradient)(const ForeachTensor&, const Chunk&, double l1, double l2, double gain);
};

}  // namespace regfused
