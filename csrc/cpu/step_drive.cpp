// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#include "step_drive.h"

#include <cmath>

#include "isa.h"

namespace regfused {

void StepOnCpu::cut(const StepWork& work, int8_t index) {
  kernels_ = choose_kernels()->step;
  slice_kernels_ = choose_kernels()->slice;
  chunks_.clear();
  others_.clear();
  other_rows_.clear();
  for (size_t t = 0; t < work.tensors.size(); ++t) {
    const StepRow& tensor = work.tensors[t];
    if (tensor.device != index) continue;
    int64_t size = Chunks::kSize;
    if (const SgdHyper& hyper = work.groups[tensor.group]; hyper.group_l1 != 0) {
      if (const int64_t of_slices = SlicesOnCpu::chunk_of_slices(tensor.slices)) {
        size = of_slices;
      } else {
        others_.add(slices_of(tensor, hyper));
        other_rows_.push_back(t);
      }
    }
    chunks_.add(static_cast<int32_t>(t), tensor.numel, size);
  }
  partials_.assign(chunks_.size(), StepPartial{});
}

// pass(tensor, chunk, partial) for every chunk of a tensor with a gradient.
template <class Pass>
void StepOnCpu::run(const StepWork& work, Pass pass) {
  chunks_.for_each([&](size_t c) {
    partials_[c] = StepPartial{};
    const StepRow& tensor = work.tensors[chunks_[c].tensor];
    if (tensor.grad) pass(tensor, chunks_[c], partials_[c]);
  });
}

void StepOnCpu::measure(const StepWork& work, const StepScalars& scalars) {
  run(work, [&](const StepRow& tensor, const Chunk& chunk, StepPartial& partial) {
    kernels_.norm(tensor, chunk, work.groups[tensor.group], scalars, partial);
  });
}

double StepOnCpu::measured(const StepScalars& scalars) {
  double accumulated = 0;
  for (const StepPartial& partial : partials_) accumulated = norm_combine(scalars.norm_type, accumulated, partial.norm);
  return accumulated;
}

std::pair<int64_t, int64_t> StepOnCpu::first_nonfinite() const {
  for (size_t c = 0; c < chunks_.size(); ++c)
    if (!std::isfinite(partials_[c].norm)) return {chunks_[c].tensor, chunks_[c].tensor};
  return {-1, -1};
}

void StepOnCpu::step(const StepWork& work, const StepScalars& scalars) {
  run(work, [&](const StepRow& tensor, const Chunk& chunk, StepPartial& partial) {
    const SgdHyper& hyper = work.groups[tensor.group];
    kernels_.step(tensor, chunk, hyper, scalars, partial);
    if (hyper.group_l1 != 0) partial.zeros = shrink_chunk(slices_of(tensor, hyper), chunk, partial.zeros);
  });
  shrink_others(work);
  totals_ = StepTotals();
  totals_.zeros = static_cast<double>(others_.zeros());
  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (!work.tensors[chunks_[c].tensor].grad) continue;
    totals_.penalty += partials_[c].penalty;
    totals_.zeros += static_cast<double>(partials_[c].zeros);
    totals_.numel += chunks_[c].size;
  }
}

// The group lasso on a chunk of whole slices, while it is in the cache. The exact zeros that are to be counted
// for the chunk, given those there were: none where a later pass counts them.
int64_t StepOnCpu::shrink_chunk(const SliceTensor& slices, const Chunk& chunk, int64_t zeros) const {
  if (slices.is_passed_by()) return zeros;
  if (!SlicesOnCpu::chunk_of_slices(slices.layout)) return 0;
  return slice_kernels_.shrink(slices, chunk.begin, chunk.size);
}

void StepOnCpu::shrink_others(const StepWork& work) {
  for (size_t i = 0; i < other_rows_.size(); ++i) {
    const StepRow& tensor = work.tensors[other_rows_[i]];
    const SliceTensor slices = slices_of(tensor, work.groups[tensor.group]);
    others_.set(i, slices.data, slices.bound);
  }
  others_.shrink();
}

}  // namespace regfused
