// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#include "sgd_drive.h"

#include <cmath>

#include "isa.h"

namespace regfused {

void SgdOnCpu::cut(const SgdWork& work, int8_t index) {
  kernels_ = choose_kernels()->sgd;
  chunks_.clear();
  for (size_t t = 0; t < work.tensors.size(); ++t)
    if (work.tensors[t].device == index) chunks_.add(static_cast<int32_t>(t), work.tensors[t].numel);
  partials_.assign(chunks_.size(), SgdPartial{});
}

// pass(tensor, chunk, partial) for every chunk of a tensor with a gradient.
template <class Pass>
void SgdOnCpu::run(const SgdWork& work, Pass pass) {
  chunks_.for_each([&](size_t c) {
    partials_[c] = SgdPartial{};
    const SgdTensor& tensor = work.tensors[chunks_[c].tensor];
    if (tensor.grad) pass(tensor, chunks_[c], partials_[c]);
  });
}

void SgdOnCpu::measure(const SgdWork& work, const SgdScalars& scalars) {
  run(work, [&](const SgdTensor& tensor, const Chunk& chunk, SgdPartial& partial) {
    kernels_.norm(tensor, chunk, work.groups[tensor.group], scalars, partial);
  });
}

double SgdOnCpu::measured(const SgdScalars& scalars) {
  double accumulated = 0;
  for (const SgdPartial& partial : partials_) accumulated = norm_combine(scalars.norm_type, accumulated, partial.norm);
  return accumulated;
}

std::pair<int64_t, int64_t> SgdOnCpu::first_nonfinite() const {
  for (size_t c = 0; c < chunks_.size(); ++c)
    if (!std::isfinite(partials_[c].norm)) return {chunks_[c].tensor, chunks_[c].tensor};
  return {-1, -1};
}

void SgdOnCpu::step(const SgdWork& work, const SgdScalars& scalars) {
  run(work, [&](const SgdTensor& tensor, const Chunk& chunk, SgdPartial& partial) {
    kernels_.step(tensor, chunk, work.groups[tensor.group], scalars, partial);
  });
  totals_ = SgdTotals();
  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (!work.tensors[chunks_[c].tensor].grad) continue;
    totals_.penalty += partials_[c].penalty;
    totals_.zeros += static_cast<double>(partials_[c].zeros);
    totals_.numel += chunks_[c].size;
  }
}

}  // namespace regfused
