// Norms of slices and their scaling on a CUDA device: partial sums, a factor for each slice, the product.
#pragma once

#include <cfloat>
#include <cmath>

#include "../rule/norm_rule.h"
#include "block.cuh"
#include "memory.cuh"
#include "slice_job.h"

namespace regfused {

static_assert(kSegmentsOfBlock == kWarps);

// The tensors of a job, and whose piece is whose.
struct SliceTensors {
  const SliceJob& job;
  const SliceDeviceTensor* at;

  __device__ __forceinline__ SliceTensors(const SliceJob& job, const unsigned char* behind_the_job)
      : job(job), at(reinterpret_cast<const SliceDeviceTensor*>(behind_the_job)) {}

  __device__ __forceinline__ bool is_skipped() const { return job.skip && *job.skip != 0; }

  // The last tensor whose first piece (or judge) is not after this one.
  __device__ __forceinline__ const SliceDeviceTensor& of(int64_t SliceDeviceTensor::* first, int64_t i) const {
    int begin = 0, end = job.tensor_count;
    while (end - begin > 1) {
      const int middle = (begin + end) / 2;
      (at[middle].*first <= i ? begin : end) = middle;
    }
    return at[begin];
  }
};

__device__ __forceinline__ int warp_of_thread() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_of_thread() { return int(threadIdx.x) % kWarp; }

// The sum over a warp; lane 0's.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// Whether a sum of squares in float is as good as one in double: it has not overflowed, and no square was
// lost that would count.
__device__ __forceinline__ bool is_exact(float sum) { return (sum >= 1e-30f && sum <= FLT_MAX) || sum != sum; }
__device__ __forceinline__ bool is_exact(double) { return true; }

// --- Long runs: a segment is a warp's -------------------------------------------------------------

template <class A, class S>
__device__ __forceinline__ A squares_of_lane(const S* data, int n) {
  A sum = 0;
  for_each_access_of(lane_of_thread(), kWarp, data, n, false, [&]<int N>(int i) {
    Pack<S, N> pack;
    pack.load(data + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum = norm_accumulate(NormType::two, sum, A(widen(pack.at[j])));
  });
  return sum;
}

template <class S>
__device__ __forceinline__ void measure_segment(const SliceDeviceTensor& tensor, int64_t piece) {
  const int64_t index = piece * kSegmentsOfBlock + warp_of_thread();
  if (index >= tensor.segments.pieces()) return;
  const SliceSegments::Segment segment = tensor.segments.segment(index);
  const S* data = in_global_memory<S>(tensor.data) + segment.begin;
  const Arithmetic<S> fast = squares_of_lane<Arithmetic<S>, S>(data, int(segment.size));
  double sum = is_exact(fast) ? double(fast) : squares_of_lane<double, S>(data, int(segment.size));
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) tensor.partials[index] = sum;
}

template <class S>
__device__ __forceinline__ void scale_segment(const SliceDeviceTensor& tensor, int64_t piece) {
  using T = Arithmetic<S>;
  const int64_t index = piece * kSegmentsOfBlock + warp_of_thread();
  if (index >= tensor.segments.pieces()) return;
  const SliceSegments::Segment segment = tensor.segments.segment(index);
  const double factor = tensor.factors[segment.slice];
  if (factor == 1) return;
  S* data = in_global_memory<S>(tensor.data) + segment.begin;
  for_each_access_of(lane_of_thread(), kWarp, data, int(segment.size), false, [&]<int N>(int i) {
    Pack<S, N> pack;
    pack.load(data + i);
#pragma unroll
    for (int j = 0; j < N; ++j) narrow(slice_scaled(widen(pack.at[j]), T(factor)), pack.at[j]);
    pack.store(data + i);
  });
}

// --- Short runs: a column is a thread's -----------------------------------------------------------

// Whether accesses of 16 bytes would cross rows, or not lie at a multiple of their size.
template <class S>
__device__ __forceinline__ bool is_apart(const S* data, const SliceTile& tile) {
  return elements_before_aligned(data + tile.begin, kPerAccess<S>) != 0 ||
         (tile.stride % kPerAccess<S> != 0 && tile.stride < tile.numel);
}

// f.template operator()<N>(c) so that the threads of the block cover the columns of a tile once, N at a time.
template <class S, class F>
__device__ __forceinline__ void for_each_column(const S* data, const SliceTile& tile, const F& f) {
  constexpr int N = kPerAccess<S>;
  if (is_apart(data, tile))
    for (int c = int(threadIdx.x); c < tile.columns; c += kThreads) f.template operator()<1>(c);
  else
    for (int c = int(threadIdx.x) * N; c < tile.columns; c += kThreads * N) f.template operator()<N>(c);
}

// N elements of a row, of which there may be fewer left at the end of the tensor: then the others are as they were.
template <class S, int N>
__device__ __forceinline__ void load_some(Pack<S, N>& pack, const S* from, int64_t left) {
  if (left >= N) return pack.load(from);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j < left) pack.at[j] = from[j];
}
template <class S, int N>
__device__ __forceinline__ void store_some(const Pack<S, N>& pack, S* to, int64_t left) {
  if (left >= N) return pack.store(to);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j < left) to[j] = pack.at[j];
}

// Of N columns, as many at a time as one access has. False where a sum in A is not to be trusted.
template <class A, class S, int N>
__device__ __forceinline__ bool column_squares(const S* data, const SliceTile& tile, int c, double* to) {
  A sums[N] = {};
  data += tile.begin + c;
  int64_t left = tile.numel - tile.begin - c;
  for (int r = 0; r < tile.rows && left > 0; ++r) {
    Pack<S, N> pack = {};
    load_some(pack, data, left);
    data += tile.stride;
    left -= tile.stride;
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] = norm_accumulate(NormType::two, sums[j], A(widen(pack.at[j])));
  }
  bool exact = true;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    exact &= is_exact(sums[j]);
    to[c + j] = sums[j];
  }
  return exact;
}

template <class S>
__device__ __forceinline__ void measure_tile(const SliceDeviceTensor& tensor, int64_t piece, double* columns) {
  const SliceTile tile = tensor.columns.tile(piece);
  if (tile.begin >= tile.numel) return;  // beyond the short last row
  const S* data = in_global_memory<S>(tensor.data);
  for_each_column(data, tile, [&]<int N>(int c) {
    if (!column_squares<Arithmetic<S>, S, N>(data, tile, c, columns))
      column_squares<double, S, N>(data, tile, c, columns);
  });
  __syncthreads();
  double* partials = tensor.partials + tensor.columns.first_partial(piece, tile);
  const int runs = tile.runs();
  for (int run = int(threadIdx.x); run < runs; run += kThreads) {
    const int end = tile.begin_of(run + 1);
    double sum = 0;
    for (int c = tile.begin_of(run); c < end; ++c) sum += columns[c];
    partials[run] = sum;
  }
  __syncthreads();  // the columns are free again
}

template <class S>
__device__ __forceinline__ void scale_tile(const SliceDeviceTensor& tensor, int64_t piece) {
  using T = Arithmetic<S>;
  const SliceTile tile = tensor.columns.tile(piece);
  if (tile.begin >= tile.numel) return;  // beyond the short last row
  const int64_t count = tensor.columns.layout.count, first_slice = tile.first_run % count;
  S* data = in_global_memory<S>(tensor.data);
  for_each_column(data, tile, [&]<int N>(int c) {
    T factors[N];
    bool changes = false;
    int in_run = (tile.offset + c) % int(tile.inner);
    int64_t slice = first_slice + (tile.offset + c) / int(tile.inner);
    if (slice >= count) slice %= count;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = T(tensor.factors[slice]);
      changes |= factors[j] != 1;
      if (++in_run == int(tile.inner)) {
        in_run = 0;
        if (++slice == count) slice = 0;
      }
    }
    if (!changes) return;
    S* row = data + tile.begin + c;
    int64_t left = tile.numel - tile.begin - c;
    // One row at a time: the registers are all in use.
#pragma unroll 1
    for (int r = 0; r < tile.rows && left > 0; ++r) {
      Pack<S, N> pack = {};
      load_some(pack, row, left);
#pragma unroll
      for (int j = 0; j < N; ++j) narrow(slice_scaled(widen(pack.at[j]), factors[j]), pack.at[j]);
      store_some(pack, row, left);
      row += tile.stride;
      left -= tile.stride;
    }
  });
}

// --- The three passes -----------------------------------------------------------------------------

template <bool kDoubles>
__device__ __forceinline__ void slice_measure(const SliceTensors& tensors) {
  struct Shared {
    double columns[kMostSliceColumns];
  };
  REGFUSED_SHARED(Shared, shared);
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.pieces; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_piece, i);
    if (!tensor.data) continue;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        measure_segment<S>(tensor, i - tensor.first_piece);
      else
        measure_tile<S>(tensor, i - tensor.first_piece, shared.columns);
    });
  }
}

template <class Pieces>
__device__ __forceinline__ void judge_slices(const SliceDeviceTensor& tensor, const Pieces& pieces, int64_t judge,
                                             double (&of_warps)[kWarps]) {
  const int64_t terms = pieces.terms();
  const bool many = terms >= kManyTerms;
  const int64_t slice = many ? judge : judge * kThreads + threadIdx.x;
  double squares = 0;
  if (slice < pieces.layout.count)
    for (int64_t t = many ? threadIdx.x : 0; t < terms; t += many ? kThreads : 1)
      squares += pieces.term(tensor.partials, slice, t);
  if (many) {
    squares = block_combine(squares, of_warps, [](double a, double b) { return a + b; });
    __syncthreads();  // of_warps is free again
  }
  if (slice < pieces.layout.count && (!many || threadIdx.x == 0))
    tensor.factors[slice] =
        slice_factor(tensor.rule, tensor.bound.at(tensor.length.get()), norm_finish(NormType::two, squares));
}

__device__ __forceinline__ void slice_judge(const SliceTensors& tensors) {
  struct Shared {
    double of_warps[kWarps];
  };
  REGFUSED_SHARED(Shared, shared);
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.judges; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_judge, i);
    if (!tensor.data) continue;
    if (tensor.by_segments)
      judge_slices(tensor, tensor.segments, i - tensor.first_judge, shared.of_warps);
    else
      judge_slices(tensor, tensor.columns, i - tensor.first_judge, shared.of_warps);
  }
}

template <bool kDoubles>
__device__ __forceinline__ void slice_scale(const SliceTensors& tensors) {
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.pieces; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_piece, i);
    if (!tensor.data) continue;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        scale_segment<S>(tensor, i - tensor.first_piece);
      else
        scale_tile<S>(tensor, i - tensor.first_piece);
    });
  }
}

}  // namespace regfused
