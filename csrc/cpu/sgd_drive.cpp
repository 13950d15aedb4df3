// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#include "sgd_drive.h"

#include <algorithm>
#include <cmath>

#include <pthread.h>

#include "isa.h"
#include "parallel.h"

namespace regfused {

namespace {

// Elements of one chunk. Fixed: partial norms, and so every bit of the result, do not depend on
// the number of threads. 16 K elements keep three fp32 arrays of a chunk inside a 256 KB cache.
constexpr int64_t kChunk = 16384;

// Below this many elements a step runs on the calling thread: waking others costs more.
constexpr int64_t kSerial = 65536;

// A small tensor costs about as much as this many elements before its first one.
constexpr int64_t kChunkCost = 512;

bool forked = false;
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

void SgdOnCpu::cut(const SgdWork& work, int8_t index) {
  kernels_ = choose_sgd_kernels();
  chunks_.clear();
  work_before_.assign(1, 0);
  for (size_t t = 0; t < work.tensors.size(); ++t) {
    const SgdTensor& tensor = work.tensors[t];
    if (tensor.device != index) continue;
    for (int64_t begin = 0; begin < tensor.numel; begin += kChunk) {
      const int64_t size = std::min(kChunk, tensor.numel - begin);
      chunks_.push_back({static_cast<int32_t>(t), static_cast<int32_t>(size), begin});
      work_before_.push_back(work_before_.back() + size + kChunkCost);
    }
  }
  chunks_.shrink_to_fit();
  work_before_.shrink_to_fit();
  partials_.assign(chunks_.size(), SgdPartial{});
}

// pass(tensor, chunk, partial) for every chunk of a tensor with a gradient. Threads take runs of
// chunks of equal work; which thread takes which chunk changes nothing in the result.
template <class Pass>
void SgdOnCpu::run(const SgdWork& all, Pass pass) {
  const auto chunks = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      partials_[c] = SgdPartial{};
      const SgdTensor& tensor = all.tensors[chunks_[c].tensor];
      if (tensor.grad) pass(tensor, chunks_[c], partials_[c]);
    }
  };
  const int64_t work = work_before_.back();
  if (work <= kSerial) return chunks(0, static_cast<int64_t>(chunks_.size()));
  const auto chunk_at = [&](int64_t at) {
    return std::lower_bound(work_before_.begin(), work_before_.end() - 1, at) - work_before_.begin();
  };
  parallel(work, kSerial / 2, [&](int64_t begin, int64_t end) { chunks(chunk_at(begin), chunk_at(end)); });
}

void SgdOnCpu::measure(const SgdWork& work, const SgdScalars& scalars) {
  run(work, [&](const SgdTensor& tensor, const SgdChunk& chunk, SgdPartial& partial) {
    kernels_->norm(tensor, chunk, work.groups[tensor.group], scalars, partial);
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
  run(work, [&](const SgdTensor& tensor, const SgdChunk& chunk, SgdPartial& partial) {
    kernels_->step(tensor, chunk, work.groups[tensor.group], scalars, partial);
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
