// What the host tells the kernels that shrink slices on a CUDA device. No torch and no CUDA in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../slice_step.h"
#include "limits.h"
#include "number.h"

namespace regfused {

// A run at least this long is a warp's, cut into segments, which lie in one block of threads some at a time.
// Shorter ones are worked on side by side, column by column.
constexpr int64_t kLongRunOnCuda = 32;
constexpr int kSegmentsOfBlock = kThreads / 32;

// Columns of a tile: an access of 16 bytes for each thread.
constexpr int32_t slice_width(DType dtype) { return dtype == DType::float64 ? 9 : dtype == DType::float32 ? 10 : 11; }
constexpr int kMostSliceColumns = 1 << slice_width(DType::float16);

// With as many partial sums or more a slice has a block of threads that adds them up; with fewer a thread.
constexpr int64_t kManyTerms = 64;

// How often a radius is improved after the beginning, at most, where a slice is more than one segment: each time is two
// launches. Slices whose radius is found pass them by.
constexpr int kRadiiOnCuda = 8;

// What a step leaves for the group lasso of a parameter, in the memory of the device.
struct SliceDeviceMetric {
  double root, floor;  // of its SliceMetric
  double bound;
};

// Pointers are to the memory of the device.
struct SliceDeviceTensor {
  void* data;                       // null: passed by
  double* partials;                 // in a metric SliceSums::kCount planes of them
  double* factors;                  // one for each slice; in a metric a SliceRadius
  const void* second_moment;        // of a metric; null: one length for all elements
  const SliceDeviceMetric* metric;  //
  SliceBound bound;
  DeviceNumber length;               // of the step
  int64_t first_piece, first_maker;  // blocks of threads of the tensors before, in all
  SliceSegments segments;
  SliceColumns columns;
  DType dtype;
  SliceRule rule;
  bool by_segments;
};

struct SliceJob {
  const double* skip = nullptr;  // other than 0: nothing is to be done
  int64_t pieces = 0;            // of all tensors: blocks of threads that measure or scale
  int64_t makers = 0;            // the same for those that make factors
  int32_t tensor_count = 0;
  bool again = false;  // radii are improved
};

template <size_t kBytes>
struct SliceArguments {
  static constexpr size_t kTensors = (kBytes - sizeof(SliceJob)) / sizeof(SliceDeviceTensor);
  SliceJob job;
  alignas(8) unsigned char tensors[kTensors * sizeof(SliceDeviceTensor)];
};
static_assert(sizeof(SliceArguments<kSmallArguments>) <= kSmallArguments);
static_assert(sizeof(SliceArguments<kLargeArguments>) <= kLargeArguments);

}  // namespace regfused
