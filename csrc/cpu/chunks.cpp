// A flat list of chunks over many tensors, dealt out to threads.
#include "chunks.h"

#include <algorithm>

namespace regfused {

namespace {

// A small tensor costs about as much as this many elements before its first one.
constexpr int64_t kChunkCost = 512;

}  // namespace

void Chunks::clear() {
  chunks_.clear();
  work_before_.assign(1, 0);
}

void Chunks::add(int32_t tensor, int64_t numel, int64_t size) {
  for (int64_t begin = 0; begin < numel; begin += size) {
    const int64_t here = std::min(size, numel - begin);
    chunks_.push_back({tensor, static_cast<int32_t>(here), begin});
    work_before_.push_back(work_before_.back() + here + kChunkCost);
  }
}

int64_t Chunks::chunk_at(int64_t work) const {
  return std::lower_bound(work_before_.begin(), work_before_.end() - 1, work) - work_before_.begin();
}

}  // namespace regfused
