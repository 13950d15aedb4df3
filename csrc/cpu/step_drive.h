// Runs the two passes of a step over a flat list of chunks, in parallel, on the CPU.
#pragma once

#include <vector>

#include "../step_device.h"
#include "chunks.h"
#include "slice_drive.h"

namespace regfused {

class StepOnCpu : public StepDevice {
 public:
  void cut(const StepWork& work, int8_t index) override;
  void begin(const StepWork&) override {}
  // The same bits for any number of threads.
  void measure(const StepWork& work, const StepScalars& scalars) override;
  double measured(const StepScalars& scalars) override;
  std::pair<int64_t, int64_t> first_nonfinite() const override;
  // Cannot fail.
  void step(const StepWork& work, const StepScalars& scalars) override;
  double penalty() const override { return penalty_; }

 private:
  template <class Pass>
  void run(const StepWork& work, Pass pass);

  void step_chunk(const StepWork& work, const StepScalars& scalars, const StepRow& row, const Chunk& chunk,
                  StepPartial& partial) const;
  static SliceTensor sliced(const StepWork& work, const StepRow& row);
  void shrink_chunk(const SliceTensor& slices, const Chunk& chunk) const;
  void set_others(const StepWork& work);

  StepKernels kernels_ = {};
  SliceKernels slice_kernels_ = {};
  Chunks chunks_;
  std::vector<StepPartial> partials_;
  // Rows whose slices do not fit chunks: indices of StepWork::rows, in the order of others_.
  std::vector<size_t> other_rows_;
  SlicesOnCpu others_;
  std::vector<double> other_penalties_;  // by piece
  std::vector<char> by_pieces_;          // whether a row is stepped by the pieces of others_
  double penalty_ = 0;
};

}  // namespace regfused
