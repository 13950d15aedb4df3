// Shrinks slices of tensors by their norms on a CUDA device.
#include "slice_drive.h"

#include <algorithm>
#include <array>

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "stream.h"

namespace regfused {

namespace {

// Elements of a segment: enough accesses for each lane of a warp to hide their latency. Long runs have longer
// ones, as their partial sums are added up by one block of threads.
constexpr int64_t kSegment = 1024, kLargestSegment = 4096, kSegmentsOfRun = 1024;

// Rows of a tile, by the size of the tensor alone, not by the card: enough tiles to fill a large one, and not
// more partial sums than they need.
constexpr int64_t kTileRows = 16, kMostTileRows = 128, kTiles = 4096;

// Repetitions of all slices in a row are a multiple of this: so rows begin at multiples of 16 bytes.
constexpr int64_t kAligned = 8;

int64_t segment_for(int64_t inner) {
  int64_t size = kSegment;
  while (size < kLargestSegment && inner / size > kSegmentsOfRun) size *= 2;
  return size;
}

SliceColumns columns_for(const SliceLayout& layout, DType dtype) {
  int64_t rows = kTileRows;
  SliceColumns columns(layout, slice_width(dtype), rows, kAligned);
  for (; rows < kMostTileRows && columns.pieces() > kTiles; rows *= 2)
    columns = SliceColumns(layout, slice_width(dtype), rows * 2, kAligned);
  return columns;
}

int64_t partials_of(const SliceDeviceTensor& tensor) {
  return tensor.by_segments ? tensor.segments.partials() : tensor.columns.partials();
}

// Whether one warp has all of a slice, and so finds its radius alone.
bool is_alone(const SliceDeviceTensor& tensor) { return tensor.by_segments && tensor.segments.terms() == 1; }

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

void SlicesOnCuda::plan(const std::vector<SliceTensor>& tensors, bool metrics) {
  static_assert(sizeof(SliceRadius) == 2 * sizeof(double));
  const int64_t planes = metrics ? SliceSums::kCount : 1, of_slice = metrics ? 2 : 1;
  tensors_.clear();
  doubles_ = false;
  // Where each tensor's partial sums and factors begin in the memory.
  std::vector<std::array<int64_t, 2>> begins;
  int64_t used = 0;
  for (const SliceTensor& tensor : tensors) {
    SliceDeviceTensor here{};
    here.dtype = tensor.dtype;
    here.rule = tensor.rule;
    here.by_segments = tensor.layout.inner >= kLongRunOnCuda;
    if (here.by_segments)
      here.segments = SliceSegments(tensor.layout, segment_for(tensor.layout.inner));
    else
      here.columns = columns_for(tensor.layout, tensor.dtype);
    begins.push_back({used, 0});
    used += planes * partials_of(here);
    begins.back()[1] = used;
    used += of_slice * tensor.layout.count;
    doubles_ |= tensor.dtype == DType::float64;
    tensors_.push_back(here);
  }
  memory_ = at::empty({used}, at::TensorOptions().device(memory_of(device_)).dtype(at::kDouble));
  auto* memory = static_cast<double*>(memory_.data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors_[i].partials = memory + begins[i][0];
    tensors_[i].factors = memory + begins[i][1];
    set(i, tensors[i].data, {tensors[i].bound, 0}, {1, nullptr, false});
  }
}

void SlicesOnCuda::set(size_t i, void* data, const SliceBound& bound, const DeviceNumber& length) {
  tensors_[i].data = data;
  tensors_[i].bound = bound;
  tensors_[i].length = length;
  tensors_[i].second_moment = nullptr;
}

void SlicesOnCuda::set_metric(size_t i, const void* second_moment, const SliceDeviceMetric* metric) {
  tensors_[i].second_moment = second_moment;
  tensors_[i].metric = metric;
}

void SlicesOnCuda::shrink(const double* skip) {
  const size_t most = slice_tensors_of_launch();
  for (size_t begin = 0; begin < tensors_.size(); begin += most) {
    SliceJob job;
    job.skip = skip;
    job.tensor_count = static_cast<int32_t>(std::min(most, tensors_.size() - begin));
    SliceDeviceTensor* tensors = tensors_.data() + begin;
    for (int32_t t = 0; t < job.tensor_count; ++t) {
      SliceDeviceTensor& tensor = tensors[t];
      tensor.first_piece = job.pieces;
      tensor.first_maker = job.makers;
      job.pieces +=
          tensor.by_segments ? divided_up(tensor.segments.pieces(), kSegmentsOfBlock) : tensor.columns.pieces();
      const int64_t terms = tensor.by_segments ? tensor.segments.terms() : tensor.columns.terms();
      const int64_t count = tensor.by_segments ? tensor.segments.layout.count : tensor.columns.layout.count;
      job.makers += terms >= kManyTerms ? count : divided_up(count, kThreads);
    }
    const auto any = [&](auto condition) { return std::any_of(tensors, tensors + job.tensor_count, condition); };
    const bool in_metric = any([](const SliceDeviceTensor& t) { return t.second_moment != nullptr; });
    const bool plain = any([](const SliceDeviceTensor& t) { return t.second_moment == nullptr; });
    if (plain) launch(SlicePass::measure, job, tensors);
    if (in_metric) launch(SlicePass::sum, job, tensors);
    launch(SlicePass::factors, job, tensors);
    job.again = any([](const SliceDeviceTensor& t) { return t.data && t.second_moment && !is_alone(t); });
    for (int i = 0; job.again && i < kRadiiOnCuda; ++i) {
      launch(SlicePass::sum, job, tensors);
      launch(SlicePass::factors, job, tensors);
    }
    if (plain) launch(SlicePass::scale, job, tensors);
    if (in_metric) launch(SlicePass::shrink, job, tensors);
  }
}

void SlicesOnCuda::launch(SlicePass pass, const SliceJob& job, const SliceDeviceTensor* tensors) const {
  check_cuda(launch_slices(pass, job, tensors, doubles_, current_stream(device_)), "launch a kernel of slices");
}

void shrink_slices_on_cuda(c10::Device device, const std::vector<SliceTensor>& tensors) {
  const c10::DeviceGuard guard(memory_of(device));
  std::vector<SliceTensor> live;
  for (const SliceTensor& tensor : tensors)
    if (!tensor.is_passed_by()) live.push_back(tensor);
  SlicesOnCuda slices(device);
  slices.plan(live, false);
  slices.shrink(nullptr);
}

}  // namespace regfused
