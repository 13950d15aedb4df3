// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#pragma once

#include <vector>

#include "../sgd_step.h"

namespace regfused {

// What a step adds up to.
struct SgdTotals {
  double penalty = 0;
  int64_t zeros = 0;
  int64_t numel = 0;  // elements of the tensors that were stepped
};

class SgdDriver {
 public:
  std::vector<SgdTensor> tensors;
  std::vector<SgdHyper> groups;

  // To be called whenever the tensors or their sizes changed: cuts them into chunks.
  void cut(const SgdKernels* kernels);

  // First pass: the norm of h over all tensors with a gradient, accumulated but not finished.
  // The same bits for any number of threads.
  double norm(const SgdScalars& scalars);

  // After norm(): the first tensor whose contribution is not finite, or -1.
  int64_t first_nonfinite() const;

  // Second pass: the update. Cannot fail.
  SgdTotals step(const SgdScalars& scalars);

 private:
  template <class Pass>
  void run(Pass pass);

  const SgdKernels* kernels_ = nullptr;
  std::vector<SgdChunk> chunks_;
  std::vector<int64_t> work_;  // elements before each chunk, and in all
  std::vector<SgdPartial> partials_;
};

}  // namespace regfused
