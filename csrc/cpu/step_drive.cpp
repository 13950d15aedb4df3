// Runs the two passes of a step over a flat list of chunks, in parallel, on the CPU.
#include "step_drive.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "isa.h"

namespace regfused {

void StepOnCpu::cut(const StepWork& work, int8_t index) {
  kernels_ = choose_kernels()->step;
  slice_kernels_ = choose_kernels()->slice;
  chunks_.clear();
  others_.clear();
  other_rows_.clear();
  for (size_t t = 0; t < work.rows.size(); ++t) {
    const StepRow& row = work.rows[t];
    if (row.device != index) continue;
    int64_t size = Chunks::kSize;
    if (const StepHyper& hyper = work.groups[row.group]; hyper.group_l1 != 0) {
      if (const int64_t of_slices = SlicesOnCpu::chunk_of_slices(row.slices)) {
        size = of_slices;
      } else {
        others_.add(slices_of(row, hyper, {}));
        other_rows_.push_back(t);
      }
    }
    chunks_.add(static_cast<int32_t>(t), row.numel, size);
  }
  partials_.assign(chunks_.size(), StepPartial{});
  other_penalties_.assign(others_.pieces(), 0);
  by_pieces_.assign(work.rows.size(), false);
}

// pass(row, chunk, partial) for every chunk of a row with a gradient.
template <class Pass>
void StepOnCpu::run(const StepWork& work, Pass pass) {
  chunks_.for_each([&](size_t c) {
    partials_[c] = StepPartial{};
    const StepRow& row = work.rows[chunks_[c].tensor];
    if (row.grad) pass(row, chunks_[c], partials_[c]);
  });
}

void StepOnCpu::measure(const StepWork& work, const StepScalars& scalars) {
  run(work, [&](const StepRow& row, const Chunk& chunk, StepPartial& partial) {
    kernels_.norm(row, chunk, work.groups[row.group], scalars, partial);
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
  set_others(work);
  run(work, [&](const StepRow& row, const Chunk& chunk, StepPartial& partial) {
    if (by_pieces_[chunk.tensor]) return;
    step_chunk(work, scalars, row, chunk, partial);
    if (work.groups[row.group].group_l1 != 0) shrink_chunk(sliced(work, row), chunk);
  });
  std::fill(other_penalties_.begin(), other_penalties_.end(), 0.0);
  const auto step_piece = [&](size_t i, size_t piece, const Chunk& chunk) {
    StepPartial partial;
    step_chunk(work, scalars, work.rows[other_rows_[i]], chunk, partial);
    other_penalties_[piece] += partial.penalty;
  };
  others_.shrink(std::cref(step_piece));
  penalty_ = 0;
  for (const StepPartial& partial : partials_) penalty_ += partial.penalty;
  for (const double penalty : other_penalties_) penalty_ += penalty;
}

void StepOnCpu::step_chunk(const StepWork& work, const StepScalars& scalars, const StepRow& row, const Chunk& chunk,
                           StepPartial& partial) const {
  const auto kernel = kernels_.step[static_cast<int>(work.rule)];
  kernel(row, chunk, work.groups[row.group], work.times[row.time], scalars, partial);
  if (scalars.write_unscaled_grad) kernels_.unscale(row, chunk, scalars);
}

SliceTensor StepOnCpu::sliced(const StepWork& work, const StepRow& row) {
  const StepHyper& hyper = work.groups[row.group];
  const StepLength length = info_of(work.rule).length(hyper, work.times[row.time], row.slot_set);
  return slices_of(row, hyper, length);
}

// The group lasso on a chunk of whole slices, while it is in the cache.
void StepOnCpu::shrink_chunk(const SliceTensor& slices, const Chunk& chunk) const {
  if (!slices.is_passed_by() && SlicesOnCpu::chunk_of_slices(slices.layout))
    slice_kernels_.shrink(slices, chunk.begin, chunk.size);
}

void StepOnCpu::set_others(const StepWork& work) {
  for (size_t i = 0; i < other_rows_.size(); ++i) {
    const StepRow& row = work.rows[other_rows_[i]];
    others_.set(i, row.grad ? sliced(work, row) : SliceTensor{});
    by_pieces_[other_rows_[i]] = !others_.is_passed_by(i);
  }
}

}  // namespace regfused
