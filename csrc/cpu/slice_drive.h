// Shrinks slices of tensors by their norms, in parallel, on the CPU.
#pragma once

#include <functional>
#include <vector>

#include "../slice_step.h"
#include "chunks.h"

namespace regfused {

// Slices that fit a chunk are measured and scaled while they are in the cache of a core. Others take two passes, the
// first of which may be the one that makes the elements: over some tensors at a time, which all cores' cache holds
// where tensors are not too large. Either way the order of additions depends on the shape alone: the same bits for any
// number of threads.
class SlicesOnCpu {
 public:
  // How many elements of whole slices make a chunk, or 0 where slices do not lie together or do not fit.
  static int64_t chunk_of_slices(const SliceLayout& layout);

  void clear();
  // Plans for a tensor of this shape; the number that set() knows it by.
  size_t add(const SliceTensor& tensor);
  // The same tensor in another place, null to pass it by, or with another bound or metric.
  void set(size_t i, const SliceTensor& tensor);
  // Cannot fail.
  void shrink() { shrink({}); }
  // make(i, piece, elements) makes elements of the tensor that set() knows as i. They lie together, in one piece.
  using Make = std::function<void(size_t i, size_t piece, const Chunk& elements)>;
  // The same after `make` has made all elements of tensors whose slices do not fit a chunk: each piece is measured
  // while it is in the cache.
  void shrink(const Make& make);
  // Of these tensors.
  size_t pieces() const { return batches_.empty() ? 0 : batches_.back().first_piece + batches_.back().pieces.size(); }
  bool is_passed_by(size_t i) const { return cuts_[i].tensor.is_passed_by(); }

 private:
  struct Cut {
    SliceTensor tensor;
    bool by_segments;
    SliceSegments segments;
    SliceColumns columns;
    size_t partials, factors;  // where they begin, the latter in radii_, too
    int64_t plane;             // partial sums
    int64_t judging;           // additions for the factors of some slices, about
    bool open = false;         // some radii are still sought

    // Whether it has radii.
    bool is_searched() const { return tensor.metric && !tensor.is_passed_by() && plane > 0; }
  };

  // Tensors whose slices do not fit, some at a time.
  struct Batch {
    size_t first_cut = 0, end_cut = 0, first_piece = 0;
    int64_t numel = 0;
    Chunks pieces;  // a piece has begin / kPiece as its number
    Chunks slices;  // some together: their number is begin / judging
  };
  Batch& batch_for(int64_t numel);

  void shrink(Batch& batch, const Make& make);
  void make_piece(const Make& make, size_t number, const Cut& cut, const Chunk& piece);
  void measure(const Cut& cut, const Chunk& piece);
  void make_factors(const Cut& cut, const Chunk& chunk);
  void scale(const Cut& cut, const Chunk& piece);
  // The same in a metric, where radii take the place of factors and are sought.
  void begin_search();
  bool is_search_open(const Batch& batch);
  void sum(const Cut& cut, const Chunk& piece);
  void make_radii(const Cut& cut, const Chunk& chunk);
  void shrink_to_radii(const Cut& cut, const Chunk& piece);
  template <class F>
  void for_each(const Chunks& chunks, const F& f);
  template <class F>
  void for_slices(const Cut& cut, const Chunk& chunk, const F& f);
  template <class Combine>
  void add_up(const Cut& cut, const double* partials, int64_t begin, int64_t n, double* sums, const Combine& combine);

  SliceKernels kernels_ = {};
  std::vector<Cut> cuts_;
  Chunks whole_;  // of slices that fit
  std::vector<Batch> batches_;
  std::vector<double> partials_, factors_;
  std::vector<SliceRadius> radii_;
  std::vector<double> sums_;  // SliceSums::kCount planes for each tensor, where partials_ has one
};

}  // namespace regfused
