// A flat list of chunks over many tensors, dealt out to threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../chunk.h"
#include "parallel.h"

namespace regfused {

class Chunks {
 public:
  // Elements of one chunk. Fixed: partial norms, and so every bit of the result, do not depend on
  // the number of threads. 16 K elements keep three fp32 arrays of a chunk inside a 256 KB cache.
  static constexpr int64_t kSize = 16384;

  void clear();
  // The next tensor, of this many elements, in chunks of `size`.
  void add(int32_t tensor, int64_t numel, int64_t size = kSize);

  size_t size() const { return chunks_.size(); }
  const Chunk& operator[](size_t c) const { return chunks_[c]; }

  // f(c) for every chunk. Threads take runs of chunks of equal work; which thread takes which chunk
  // changes nothing in the result.
  template <class F>
  void for_each(const F& f) const;

 private:
  // The first chunk that begins with or after this much work.
  int64_t chunk_at(int64_t work) const;

  std::vector<Chunk> chunks_;
  std::vector<int64_t> work_before_ = {0};  // each chunk, in elements, and in all
};

template <class F>
void Chunks::for_each(const F& f) const {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(static_cast<size_t>(c));
  };
  const int64_t work = work_before_.back();
  if (work <= kSerialElements) return run(0, static_cast<int64_t>(chunks_.size()));
  parallel(work, kSerialElements / 2, [&](int64_t begin, int64_t end) { run(chunk_at(begin), chunk_at(end)); });
}

}  // namespace regfused
