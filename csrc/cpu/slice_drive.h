// Shrinks slices of tensors by their norms, in parallel, on the CPU.
#pragma once

#include <vector>

#include "../slice_step.h"
#include "chunks.h"

namespace regfused {

// Slices that fit a chunk are measured and scaled while they are in the cache. Others take two passes
// over memory. Either way the order of additions depends on the shape alone: the same bits for any
// number of threads.
class SlicesOnCpu {
 public:
  // How many elements of whole slices make a chunk, or 0 where slices do not lie together or do not fit.
  static int64_t chunk_of_slices(const SliceLayout& layout);

  void clear();
  // Plans for a tensor of this shape; the number that set() knows it by.
  size_t add(const SliceTensor& tensor);
  // The same tensor in another place or with another bound.
  void set(size_t i, void* data, double bound);
  // Cannot fail.
  void shrink();

 private:
  struct Cut {
    SliceTensor tensor;
    bool by_segments;
    SliceSegments segments;
    SliceColumns columns;
    size_t partials, factors;  // where they begin
    int64_t judging;           // additions for the factors of some slices, about
  };

  void measure(const Cut& cut, const Chunk& piece);
  void judge(const Cut& cut, const Chunk& chunk);
  void scale(const Cut& cut, const Chunk& piece);
  template <class F>
  void for_each(const Chunks& chunks, const F& f);

  SliceKernels kernels_ = {};
  std::vector<Cut> cuts_;
  Chunks whole_;   // of slices that fit
  Chunks pieces_;  // of others: a piece has begin / kPiece as its number
  Chunks slices_;  // of others, some together: their number is begin / judging
  std::vector<double> partials_, factors_;
};

}  // namespace regfused
