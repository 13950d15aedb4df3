// How work is dealt out to the blocks of a kernel. No torch and no CUDA in here.
#pragma once

#include <algorithm>
#include <cstdint>

namespace regfused {

// A model is cut into about this many chunks, so that a million elements fill a large card and the partial norms of
// any model are summed up at once by a block. Many small tensors make more.
constexpr int64_t kChunks = 2048;
constexpr int64_t kSmallestChunk = 1024;  // an access of 16 bytes for each thread of a block
constexpr int64_t kLargestChunk = 32768;  // larger ones gain nothing: what a chunk costs is long hidden

// Chunks are dealt out in spans of consecutive ones, each of which makes one partial norm: at most about this many, as
// every block of a second pass adds them all up.
constexpr int64_t kSpans = 4096;
inline int64_t span_for(int64_t chunks) { return std::max<int64_t>((chunks + kSpans - 1) / kSpans, 1); }

// A power of two, by the size of the model alone, not by the card: the same bits on all cards.
inline int64_t chunk_for(int64_t numel) {
  int64_t chunk = kSmallestChunk;
  while (chunk < kLargestChunk && chunk * kChunks < numel) chunk *= 2;
  return chunk;
}

// A grid that leaves every block the same number of spans, or one less.
inline int blocks_for(int64_t spans, int resident) {
  resident = std::max(resident, 1);
  const int64_t rounds = std::max<int64_t>((spans + resident - 1) / resident, 1);
  return static_cast<int>(std::max<int64_t>((spans + rounds - 1) / rounds, 1));
}

}  // namespace regfused
