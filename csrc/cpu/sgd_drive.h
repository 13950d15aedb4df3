// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#pragma once

#include <vector>

#include "../sgd_drive.h"
#include "chunks.h"
#include "slice_drive.h"

namespace regfused {

class SgdOnCpu : public SgdDevice {
 public:
  void cut(const SgdWork& work, int8_t index) override;
  void begin(const SgdWork&) override {}
  // The same bits for any number of threads.
  void measure(const SgdWork& work, const SgdScalars& scalars) override;
  double measured(const SgdScalars& scalars) override;
  std::pair<int64_t, int64_t> first_nonfinite() const override;
  // Cannot fail.
  void step(const SgdWork& work, const SgdScalars& scalars) override;
  SgdTotals totals() const override { return totals_; }

 private:
  template <class Pass>
  void run(const SgdWork& work, Pass pass);

  int64_t shrink_chunk(const SliceTensor& slices, const Chunk& chunk, int64_t zeros) const;
  void shrink_others(const SgdWork& work);

  SgdKernels kernels_ = {};
  SliceKernels slice_kernels_ = {};
  Chunks chunks_;
  std::vector<SgdPartial> partials_;
  // Tensors whose slices do not fit chunks: rows of SgdWork::tensors, in the order of others_.
  std::vector<size_t> other_rows_;
  SlicesOnCpu others_;
  SgdTotals totals_;
};

}  // namespace regfused
