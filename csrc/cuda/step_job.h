// What the host tells the kernels of a step on a CUDA device. No torch and no CUDA in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../step.h"
#include "limits.h"
#include "number.h"
#include "slice_job.h"

namespace regfused {

// What of a parameter stays the same from step to step; a table in the memory of the device.
struct StepDeviceRow {
  void* param;
  void* slots[kMostSlots];
  void* steps;  // a rule that counts: how many there were before this one, a float or a double
  int32_t group;
  DType dtype;
  DType steps_dtype;
  uint8_t slot_set;  // which slots there are: bit by bit

  bool operator==(const StepDeviceRow&) const = default;
};

// What may differ in each step, group by group and row by row: the inputs of a step. They go along with the arguments
// of the kernels: nothing to upload, and right in a CUDA graph.
struct StepDeviceGroup {
  StepHyper hyper;
  DeviceNumber lr;  // counts instead of hyper.lr

  REGFUSED_RULE StepHyper read() const {
    StepHyper now = hyper;
    now.lr = lr.get();
    return now;
  }
};

// The address of a gradient, 0 for none. Elements are two bytes or more, so the lowest bit is free:
// it says whether this is the first gradient of the parameter.
struct StepGrad {
  char* tagged = nullptr;

  StepGrad() = default;
  StepGrad(void* grad, bool first) : tagged(static_cast<char*>(grad) + (first ? 1 : 0)) {}

  REGFUSED_RULE bool is_none() const { return tagged == nullptr; }
  REGFUSED_RULE bool first() const { return reinterpret_cast<uintptr_t>(tagged) & 1; }
  REGFUSED_RULE void* grad() const { return tagged - first(); }
};

// Behind the numbers of a StepRecord: whether the last step was skipped, for kernels that follow; and how many blocks
// of the running kernel are done, an unsigned integer that is 0 between kernels.
constexpr int kStepSkipped = kRecordSize;
constexpr int kBlocksDone = kRecordSize + 1;
constexpr int kDeviceRecordSize = kRecordSize + 2;

// One step over the tensors of one device. Pointers are to the memory of the device.
//
// Chunks are dealt out in spans of `span` consecutive ones. A span is worked on by one block and
// adds up to one partial norm, whatever the grid: the norm has the same bits on every grid.
struct StepJob {
  const StepDeviceRow* rows = nullptr;
  const Chunk* chunks = nullptr;
  int32_t row_count = 0;
  int32_t chunk_count = 0;
  int32_t span = 1;
  int32_t span_count = 0;
  int32_t group_count = 0;

  int32_t gathered_count = 0;
  double* partials = nullptr;        // one for each span: what the norm kernel found
  const double* gathered = nullptr;  // partials of all devices; null: the step needs no norm, or the host has judged it
  double* penalties = nullptr;       // one for each span
  double* record = nullptr;          // kDeviceRecordSize
  SliceDeviceMetric* metrics = nullptr;  // one for each row: what the group lasso after the step is taken in

  // StepDeviceGroup[group_count], then a StepGrad for each row. Null: they stand behind the job, in the arguments.
  const unsigned char* inputs = nullptr;

  DeviceNumber grad_scale;
  DeviceNumber found_inf;  // other than 0: the step is skipped
  double clip_coef = 1;    // where the host has judged
  double max_norm = 0;
  NormType norm_type = NormType::two;
  bool judges = false;  // the device does, not the host
  bool clips = false;
  bool skip_nonfinite = false;
  bool counts_skips = false;
  bool write_unscaled_grad = false;
};

template <size_t kBytes>
struct StepArguments {
  static constexpr size_t kRoom = (kBytes - sizeof(StepJob)) / 16 * 16;
  StepJob job;
  alignas(8) unsigned char inputs[kRoom];
};
static_assert(sizeof(StepArguments<kSmallArguments>) <= kSmallArguments);
static_assert(sizeof(StepArguments<kLargeArguments>) <= kLargeArguments);

}  // namespace regfused
