// What the host tells the kernels that pass over a list of tensors on a CUDA device. No torch and no CUDA in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../foreach.h"
#include "limits.h"
#include "number.h"

namespace regfused {

// A tensor of the list, cut into chunks; `first_chunk` of them belong to tensors before it.
struct ForeachRow {
  void* data;
  void* out;
  int64_t numel;
  int32_t first_chunk;
  DType dtype;
};

// One pass over the tensors that fit the arguments of a kernel. Pointers are to the memory of the device.
//
// Where a pass adds up, chunks are dealt out in spans of `span` consecutive ones, each of which one block adds up to
// one partial result, whatever the grid: the same bits on every grid.
struct ForeachJob {
  int64_t chunk_size = 1;
  int32_t rows = 0;
  int32_t chunk_count = 0;
  int32_t span = 1;
  int32_t span_count = 0;

  double* partials = nullptr;  // written, one for each span
  NormType norm_type = NormType::two;
  double l1 = 0, l2 = 0;

  const double* gathered = nullptr;  // partial norms that the norm to be clipped by adds up to
  int32_t gathered_count = 0;
  double max_norm = 0;
  double* norm = nullptr;  // written, by one block; null: not wanted
  DeviceNumber gain;       // of the penalty's gradient
};

enum class ForeachPass { norm, penalty, clip, penalty_gradient };

template <size_t kBytes>
struct ForeachArguments {
  static constexpr int kRows = int((kBytes - sizeof(ForeachJob)) / sizeof(ForeachRow));
  ForeachJob job;
  ForeachRow rows[kRows];
};
static_assert(sizeof(ForeachArguments<kSmallArguments>) <= kSmallArguments);
static_assert(sizeof(ForeachArguments<kLargeArguments>) <= kLargeArguments);

}  // namespace regfused
