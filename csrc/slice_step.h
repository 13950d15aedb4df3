// What a pass over slices is made of, and what a kernel is told. No torch in here: drivers and kernels
// share it.
#pragma once

#include "slice_cut.h"

namespace regfused {

struct SliceTensor {
  void* data = nullptr;  // nullptr: passed by
  DType dtype = DType::float32;
  SliceRule rule = SliceRule::max_norm;
  SliceLayout layout;
  double bound = 0;
  SliceMetric metric;  // of a group lasso

  bool is_passed_by() const { return !data || layout.numel() == 0 || is_neutral(rule, bound); }
};

// A tile has no more columns on the CPU: what is known of each fits the L1 cache.
constexpr int32_t kSliceWidth = 10;
constexpr int64_t kSliceColumns = int64_t(1) << kSliceWidth;

// No slice that lies in a chunk has more elements.
constexpr int64_t kMostInChunk = 16384;

// The kernels of one instruction set on the CPU.
struct SliceKernels {
  // Whole slices that lie one after another, n elements from `begin` on: norm, factor and scale. In a metric, too.
  void (*shrink)(const SliceTensor&, int64_t begin, int64_t n);
  double (*measure_segment)(const SliceTensor&, const SliceSegments::Segment&);
  void (*scale_segment)(const SliceTensor&, const SliceSegments::Segment&, double factor);
  // A partial sum for each run of the tile.
  void (*measure_tile)(const SliceTensor&, const SliceTile&, double* partials);
  // factors: one for each slice.
  void (*scale_tile)(const SliceTensor&, const SliceTile&, const double* factors);

  // The same in a metric. A partial sum is SliceSums::kCount numbers, `plane` doubles apart; a tile's radii are those
  // of all slices.
  void (*sum_segment)(const SliceTensor&, const SliceSegments::Segment&, const SliceRadius&, double* sums,
                      int64_t plane);
  void (*shrink_segment)(const SliceTensor&, const SliceSegments::Segment&, const SliceRadius&);
  void (*sum_tile)(const SliceTensor&, const SliceTile&, const SliceRadius* radii, double* sums, int64_t plane);
  void (*shrink_tile)(const SliceTensor&, const SliceTile&, const SliceRadius* radii);
};

}  // namespace regfused
