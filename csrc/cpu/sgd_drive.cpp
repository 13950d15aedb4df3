// Runs the two passes of an SGD step over a flat list of chunks, in parallel, on the CPU.
#include "sgd_drive.h"

#include <algorithm>
#include <cmath>

#include <pthread.h>

#include "parallel.h"

namespace regfused {

namespace {

// Below this many elements a step runs on the calling thread: waking others costs more.
constexpr int64_t kSerial = 65536;

// A small tensor costs about as much as this many elements before its first one.
constexpr int64_t kChunkCost = 512;

bool forked = false;
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

void SgdDriver::cut(const SgdKernels* kernels) {
  kernels_ = kernels;
  chunks_.clear();
  work_.assign(1, 0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      const int64_t size = std::min(kChunk, tensors[t].numel - begin);
      chunks_.push_back({static_cast<int32_t>(t), static_cast<int32_t>(size), begin});
      work_.push_back(work_.back() + size + kChunkCost);
    }
  }
  chunks_.shrink_to_fit();
  work_.shrink_to_fit();
  partials_.assign(chunks_.size(), SgdPartial{});
}

// pass(tensor, chunk, partial) for every chunk of a tensor with a gradient. Threads take runs of
// chunks of equal work; which thread takes which chunk changes nothing in the result.
template <class Pass>
void SgdDriver::run(Pass pass) {
  const auto chunks = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      partials_[c] = SgdPartial{};
      const SgdTensor& tensor = tensors[chunks_[c].tensor];
      if (tensor.grad) pass(tensor, chunks_[c], partials_[c]);
    }
  };
  const int64_t work = work_.back();
  if (work <= kSerial) return chunks(0, static_cast<int64_t>(chunks_.size()));
  const auto chunk_at = [&](int64_t at) {
    return std::lower_bound(work_.begin(), work_.end() - 1, at) - work_.begin();
  };
  parallel(work, kSerial / 2, [&](int64_t begin, int64_t end) { chunks(chunk_at(begin), chunk_at(end)); });
}

double SgdDriver::norm(const SgdScalars& scalars) {
  run([&](const SgdTensor& tensor, const SgdChunk& chunk, SgdPartial& partial) {
    kernels_->norm(tensor, chunk, groups[tensor.group], scalars, partial);
  });
  double accumulated = 0;
  for (const SgdPartial& partial : partials_) accumulated = norm_combine(scalars.norm_type, accumulated, partial.norm);
  return accumulated;
}

int64_t SgdDriver::first_nonfinite() const {
  for (size_t c = 0; c < chunks_.size(); ++c)
    if (!std::isfinite(partials_[c].norm)) return chunks_[c].tensor;
  return -1;
}

SgdTotals SgdDriver::step(const SgdScalars& scalars) {
  run([&](const SgdTensor& tensor, const SgdChunk& chunk, SgdPartial& partial) {
    kernels_->step(tensor, chunk, groups[tensor.group], scalars, partial);
  });
  SgdTotals totals;
  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (!tensors[chunks_[c].tensor].grad) continue;
    totals.penalty += partials_[c].penalty;
    totals.zeros += partials_[c].zeros;
    totals.numel += chunks_[c].size;
  }
  return totals;
}

}  // namespace regfused
