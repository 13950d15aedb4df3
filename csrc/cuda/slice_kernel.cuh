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

  // The last tensor whose first piece (or maker) is not after this one.
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

// f.template operator()<N>(c) so that the threads of the block cover the columns of a tile once, N at a time. `apart`:
// another array that is accessed has another alignment.
template <class S, class F>
__device__ __forceinline__ void for_each_column(const S* data, const SliceTile& tile, bool apart, const F& f) {
  constexpr int N = kPerAccess<S>;
  if (apart || is_apart(data, tile))
    for (int c = int(threadIdx.x); c < tile.columns; c += kThreads) f.template operator()<1>(c);
  else
    for (int c = int(threadIdx.x) * N; c < tile.columns; c += kThreads * N) f.template operator()<N>(c);
}

// The slice of a column of a tile, and those of the next ones.
struct SliceOfColumn {
  int64_t slice, count;
  int in_run, inner;

  __device__ __forceinline__ SliceOfColumn(const SliceTile& tile, int64_t count, int c)
      : slice((tile.first_run % count + (tile.offset + c) / int(tile.inner)) % count),
        count(count),
        in_run((tile.offset + c) % int(tile.inner)),
        inner(int(tile.inner)) {}
  __device__ __forceinline__ void next() {
    if (++in_run < inner) return;
    in_run = 0;
    if (++slice == count) slice = 0;
  }
};

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
  for_each_column(data, tile, false, [&]<int N>(int c) {
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
  S* data = in_global_memory<S>(tensor.data);
  for_each_column(data, tile, false, [&]<int N>(int c) {
    T factors[N];
    bool changes = false;
    SliceOfColumn at(tile, tensor.columns.layout.count, c);
#pragma unroll
    for (int j = 0; j < N; ++j, at.next()) {
      factors[j] = T(tensor.factors[at.slice]);
      changes |= factors[j] != 1;
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

// --- In a metric: long runs -----------------------------------------------------------------------

__device__ __forceinline__ SliceRadius* radii_of(const SliceDeviceTensor& tensor) {
  return reinterpret_cast<SliceRadius*>(tensor.factors);
}
__device__ __forceinline__ bool is_neutral_in_metric(const SliceDeviceTensor& tensor) {
  return is_neutral(SliceRule::group_lasso, tensor.metric->bound);
}

// What the passes over a tensor in a metric work on. The step has left the numbers in the memory of the device.
template <class S>
struct MetricTensor {
  S* q;
  const S* v;
  SliceWeight<Arithmetic<S>> weight_of;
  SliceRadius* radii;  // one for each slice

  __device__ __forceinline__ explicit MetricTensor(const SliceDeviceTensor& tensor)
      : q(in_global_memory<S>(tensor.data)),
        v(in_global_memory<S>(const_cast<void*>(tensor.second_moment))),
        weight_of({tensor.second_moment, tensor.metric->root, tensor.metric->floor}, tensor.metric->bound),
        radii(radii_of(tensor)) {}
};

template <class A>
struct MetricSums {
  A squares = 0, second = 0, third = 0, largest = 0;

  // q of an element, and its threshold.
  template <class T>
  __device__ __forceinline__ void add_at_beginning(T q, T threshold) {
    add(A(q), A(threshold));
    third += A(q) * A(q) * A(threshold) * A(threshold);
    if (q != 0) largest = A(threshold) > largest ? A(threshold) : largest;
  }
  template <class T>
  __device__ __forceinline__ void add(T q, T threshold, T radius) {
    const T slope = slice_slope<T>(threshold, radius);
    add(A(q * slope), A(slope));
  }
  __device__ __forceinline__ void add(A x, A other) {
    squares += x * x;
    second += x * x * other;
  }
  __device__ __forceinline__ bool is_exact() const { return regfused::is_exact(squares) && regfused::is_exact(second); }
};

// f.template operator()<N>(of_q, of_v, q) for the elements of a segment that are this lane's, N at a time.
template <class S, class F>
__device__ __forceinline__ void for_each_of_lane(const MetricTensor<S>& of, const SliceSegments::Segment& segment,
                                                 const F& f) {
  S* q = of.q + segment.begin;
  const S* v = of.v + segment.begin;
  const bool apart = !same_alignment<S>(q, v);
  for_each_access_of(lane_of_thread(), kWarp, q, int(segment.size), apart, [&]<int N>(int i) {
    Pack<S, N> of_q, of_v;
    of_q.load(q + i);
    of_v.load(v + i);
    f.template operator()<N>(of_q, of_v, q + i);
  });
}

template <class A, class S>
__device__ __forceinline__ MetricSums<A> metric_sums_of_lane(const MetricTensor<S>& of,
                                                             const SliceSegments::Segment& segment,
                                                             const SliceRadius& radius) {
  using T = Arithmetic<S>;
  MetricSums<A> sums;
  const bool beginning = radius.is_beginning();
  const T r = T(radius.radius);
  for_each_of_lane(of, segment, [&]<int N>(const Pack<S, N>& of_q, const Pack<S, N>& of_v, S*) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T threshold = of.weight_of.threshold(of.weight_of(widen(of_v.at[j])));
      if (beginning)
        sums.add_at_beginning(widen(of_q.at[j]), threshold);
      else
        sums.add(widen(of_q.at[j]), threshold, r);
    }
  });
  return sums;
}

// Of a segment, in all lanes.
template <class S>
__device__ __forceinline__ SliceSums metric_sums(const MetricTensor<S>& of, const SliceSegments::Segment& segment,
                                                 const SliceRadius& radius) {
  const auto fast = metric_sums_of_lane<Arithmetic<S>, S>(of, segment, radius);
  SliceSums sums{double(fast.squares), double(fast.second), double(fast.third), double(fast.largest)};
  if (!fast.is_exact()) {
    const auto exact = metric_sums_of_lane<double, S>(of, segment, radius);
    sums = {exact.squares, exact.second, exact.third, exact.largest};
  }
  sums.squares = __shfl_sync(0xffffffffu, warp_sum(sums.squares), 0);
  sums.second = __shfl_sync(0xffffffffu, warp_sum(sums.second), 0);
  sums.third = __shfl_sync(0xffffffffu, warp_sum(sums.third), 0);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, sums.largest, distance);
    sums.largest = other > sums.largest ? other : sums.largest;
  }
  sums.largest = __shfl_sync(0xffffffffu, sums.largest, 0);
  return sums;
}

template <class S>
__device__ __forceinline__ void sum_segment(const SliceDeviceTensor& tensor, int64_t piece, bool again) {
  using T = Arithmetic<S>;
  const int64_t index = piece * kSegmentsOfBlock + warp_of_thread();
  if (index >= tensor.segments.pieces()) return;
  const SliceSegments::Segment segment = tensor.segments.segment(index);
  const MetricTensor<S> of(tensor);
  SliceRadius radius;
  if (again) radius = of.radii[segment.slice];
  if (!radius.open) return;
  SliceSums sums = metric_sums(of, segment, radius);
  if (tensor.segments.terms() == 1) {  // the whole slice is here
    radius = next_radius(radius, sums, radius_precision<T>());
    for (int i = 1; i < kMostRadii && radius.open; ++i) {
      sums = metric_sums(of, segment, radius);
      radius = next_radius(radius, sums, radius_precision<T>());
    }
    radius.open = false;
    if (lane_of_thread() == 0) of.radii[segment.slice] = radius;
  } else if (lane_of_thread() == 0) {
    const int64_t plane = tensor.segments.partials();
    tensor.partials[index] = sums.squares;
    tensor.partials[index + plane] = sums.second;
    tensor.partials[index + 2 * plane] = sums.third;
    tensor.partials[index + 3 * plane] = sums.largest;
  }
}

template <class S>
__device__ __forceinline__ void shrink_segment(const SliceDeviceTensor& tensor, int64_t piece) {
  using T = Arithmetic<S>;
  const int64_t index = piece * kSegmentsOfBlock + warp_of_thread();
  if (index >= tensor.segments.pieces()) return;
  const SliceSegments::Segment segment = tensor.segments.segment(index);
  const MetricTensor<S> of(tensor);
  const double radius = of.radii[segment.slice].radius;
  const T pull = of.weight_of.pull(radius);
  if (pull == 0) return;
  for_each_of_lane(of, segment, [&]<int N>(Pack<S, N>& of_q, const Pack<S, N>& of_v, S* to) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      narrow(slice_shrunk(widen(of_q.at[j]), of.weight_of(widen(of_v.at[j])), pull), of_q.at[j]);
    of_q.store(to);
  });
}

// --- In a metric: short runs ----------------------------------------------------------------------

// Of the columns of a tile, in the type of arithmetic.
template <class T>
struct MetricColumns {
  static constexpr int kCount = kMostSliceColumns / (sizeof(T) / 4);
  T squares[kCount], second[kCount], third[kCount], largest[kCount];
};

// f.template operator()<N>(of_q, of_v, q, left) row by row of N columns of a tile, from column c on.
template <class S, int N, class F>
__device__ __forceinline__ void for_each_row(const MetricTensor<S>& of, const SliceTile& tile, int c, const F& f) {
  S* q = of.q + tile.begin + c;
  const S* v = of.v + tile.begin + c;
  int64_t left = tile.numel - tile.begin - c;
#pragma unroll 1
  for (int r = 0; r < tile.rows && left > 0; ++r) {
    Pack<S, N> of_q = {}, of_v = {};
    load_some(of_q, q, left);
    load_some(of_v, v, left);
    f(of_q, of_v, q, left);
    q += tile.stride;
    v += tile.stride;
    left -= tile.stride;
  }
}

template <class S, class F>
__device__ __forceinline__ void for_each_column(const MetricTensor<S>& of, const SliceTile& tile, const F& f) {
  for_each_column(of.q, tile, !same_alignment<S>(of.q, of.v), f);
}

template <class S>
__device__ __forceinline__ void sum_tile(const SliceDeviceTensor& tensor, int64_t piece, bool again,
                                         MetricColumns<Arithmetic<S>>& columns) {
  using T = Arithmetic<S>;
  const SliceTile tile = tensor.columns.tile(piece);
  if (tile.begin >= tile.numel) return;  // beyond the short last row
  const MetricTensor<S> of(tensor);
  for_each_column(of, tile, [&]<int N>(int c) {
    MetricSums<T> sums[N];
    T radius[N];
    bool open = !again;
    SliceOfColumn at(tile, tensor.columns.layout.count, c);
#pragma unroll
    for (int j = 0; j < N; ++j, at.next()) {
      radius[j] = again ? T(of.radii[at.slice].radius) : T(-1);
      if (again) open |= of.radii[at.slice].open;
    }
    if (open)
      for_each_row<S, N>(of, tile, c, [&](const Pack<S, N>& of_q, const Pack<S, N>& of_v, S*, int64_t) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const T threshold = of.weight_of.threshold(of.weight_of(widen(of_v.at[j])));
          if (again)
            sums[j].add(widen(of_q.at[j]), threshold, radius[j]);
          else
            sums[j].add_at_beginning(widen(of_q.at[j]), threshold);
        }
      });
#pragma unroll
    for (int j = 0; j < N; ++j) {
      columns.squares[c + j] = sums[j].squares;
      columns.second[c + j] = sums[j].second;
      columns.third[c + j] = sums[j].third;
      columns.largest[c + j] = sums[j].largest;
    }
  });
  __syncthreads();
  double* partials = tensor.partials + tensor.columns.first_partial(piece, tile);
  const int64_t plane = tensor.columns.partials();
  const int runs = tile.runs();
  for (int run = int(threadIdx.x); run < runs; run += kThreads) {
    const int end = tile.begin_of(run + 1);
    SliceSums sums;
    for (int c = tile.begin_of(run); c < end; ++c) {
      sums.squares += columns.squares[c];
      sums.second += columns.second[c];
      sums.third += columns.third[c];
      sums.largest = columns.largest[c] > sums.largest ? columns.largest[c] : sums.largest;
    }
    partials[run] = sums.squares;
    partials[run + plane] = sums.second;
    partials[run + 2 * plane] = sums.third;
    partials[run + 3 * plane] = sums.largest;
  }
  __syncthreads();  // the columns are free again
}

template <class S>
__device__ __forceinline__ void shrink_tile(const SliceDeviceTensor& tensor, int64_t piece) {
  using T = Arithmetic<S>;
  const SliceTile tile = tensor.columns.tile(piece);
  if (tile.begin >= tile.numel) return;  // beyond the short last row
  const MetricTensor<S> of(tensor);
  for_each_column(of, tile, [&]<int N>(int c) {
    T pull[N];
    SliceOfColumn at(tile, tensor.columns.layout.count, c);
#pragma unroll
    for (int j = 0; j < N; ++j, at.next()) pull[j] = of.weight_of.pull(of.radii[at.slice].radius);
    for_each_row<S, N>(of, tile, c, [&](Pack<S, N>& of_q, const Pack<S, N>& of_v, S* to, int64_t left) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (pull[j] != 0) narrow(slice_shrunk(widen(of_q.at[j]), of.weight_of(widen(of_v.at[j])), pull[j]), of_q.at[j]);
      store_some(of_q, to, left);
    });
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
    if (!tensor.data || tensor.second_moment) continue;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        measure_segment<S>(tensor, i - tensor.first_piece);
      else
        measure_tile<S>(tensor, i - tensor.first_piece, shared.columns);
    });
  }
}

// The same for tensors in a metric.
template <bool kDoubles>
__device__ __forceinline__ void slice_sum(const SliceTensors& tensors) {
  union Shared {
    MetricColumns<float> floats;
    MetricColumns<double> doubles;
  };
  REGFUSED_SHARED(Shared, shared);
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.pieces; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_piece, i);
    if (!tensor.data || !tensor.second_moment || is_neutral_in_metric(tensor)) continue;
    const int64_t piece = i - tensor.first_piece;
    const bool again = tensors.job.again;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        sum_segment<S>(tensor, piece, again);
      else if constexpr (sizeof(S) == 8)
        sum_tile<S>(tensor, piece, again, shared.doubles);
      else
        sum_tile<S>(tensor, piece, again, shared.floats);
    });
  }
}

// The sum, or the maximum, of the terms of a slice in a plane of partial sums; thread 0's where there are many.
template <class Pieces, class Combine>
__device__ __forceinline__ double combine_terms(const Pieces& pieces, const double* partials, int64_t slice, bool many,
                                                double (&of_warps)[kWarps], const Combine& combine) {
  double all = 0;
  if (slice < pieces.layout.count)
    for (int64_t t = many ? threadIdx.x : 0; t < pieces.terms(); t += many ? kThreads : 1)
      all = combine(all, pieces.term(partials, slice, t));
  if (many) {
    all = block_combine(all, of_warps, combine);
    __syncthreads();  // of_warps is free again
  }
  return all;
}

template <class Pieces>
__device__ __forceinline__ void make_radii(const SliceDeviceTensor& tensor, const Pieces& pieces, int64_t maker,
                                           bool again, double (&of_warps)[kWarps]) {
  const bool many = pieces.terms() >= kManyTerms;
  const int64_t slice = many ? maker : maker * kThreads + threadIdx.x, plane = pieces.partials();
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return b > a ? b : a; };
  SliceSums sums;
  sums.squares = combine_terms(pieces, tensor.partials, slice, many, of_warps, add);
  sums.second = combine_terms(pieces, tensor.partials + plane, slice, many, of_warps, add);
  // A run that lies in two tiles has the sum of two maxima here: a search that may go on for longer, and no other end.
  sums.third = combine_terms(pieces, tensor.partials + 2 * plane, slice, many, of_warps, add);
  sums.largest = combine_terms(pieces, tensor.partials + 3 * plane, slice, many, of_warps, larger);
  if (slice >= pieces.layout.count || (many && threadIdx.x != 0)) return;
  SliceRadius* radii = radii_of(tensor);
  SliceRadius radius;
  if (again) radius = radii[slice];
  const RadiusPrecision precision =
      tensor.dtype == DType::float64 ? radius_precision<double>() : radius_precision<float>();
  if (radius.open) radii[slice] = next_radius(radius, sums, precision);
}

template <class Pieces>
__device__ __forceinline__ void make_factors(const SliceDeviceTensor& tensor, const Pieces& pieces, int64_t maker,
                                             double (&of_warps)[kWarps]) {
  const bool many = pieces.terms() >= kManyTerms;
  const int64_t slice = many ? maker : maker * kThreads + threadIdx.x;
  const double squares =
      combine_terms(pieces, tensor.partials, slice, many, of_warps, [](double a, double b) { return a + b; });
  if (slice < pieces.layout.count && (!many || threadIdx.x == 0))
    tensor.factors[slice] =
        slice_factor(tensor.rule, tensor.bound.at(tensor.length.get()), norm_finish(NormType::two, squares));
}

__device__ __forceinline__ void slice_factors(const SliceTensors& tensors) {
  struct Shared {
    double of_warps[kWarps];
  };
  REGFUSED_SHARED(Shared, shared);
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.makers; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_maker, i);
    if (!tensor.data) continue;
    const int64_t maker = i - tensor.first_maker;
    const bool again = tensors.job.again;
    if (!tensor.second_moment) {
      if (again) continue;
      tensor.by_segments ? make_factors(tensor, tensor.segments, maker, shared.of_warps)
                         : make_factors(tensor, tensor.columns, maker, shared.of_warps);
    } else if (is_neutral_in_metric(tensor)) {
      continue;
    } else if (!tensor.by_segments) {
      make_radii(tensor, tensor.columns, maker, again, shared.of_warps);
    } else if (tensor.segments.terms() > 1) {
      make_radii(tensor, tensor.segments, maker, again, shared.of_warps);
    }
  }
}

template <bool kDoubles>
__device__ __forceinline__ void slice_scale(const SliceTensors& tensors) {
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.pieces; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_piece, i);
    if (!tensor.data || tensor.second_moment) continue;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        scale_segment<S>(tensor, i - tensor.first_piece);
      else
        scale_tile<S>(tensor, i - tensor.first_piece);
    });
  }
}

// The same for tensors in a metric.
template <bool kDoubles>
__device__ __forceinline__ void slice_shrink(const SliceTensors& tensors) {
  if (tensors.is_skipped()) return;
  for (int64_t i = blockIdx.x; i < tensors.job.pieces; i += gridDim.x) {
    const SliceDeviceTensor& tensor = tensors.of(&SliceDeviceTensor::first_piece, i);
    if (!tensor.data || !tensor.second_moment || is_neutral_in_metric(tensor)) continue;
    by_dtype<kDoubles>(tensor.dtype, [&]<class S>() {
      if (tensor.by_segments)
        shrink_segment<S>(tensor, i - tensor.first_piece);
      else
        shrink_tile<S>(tensor, i - tensor.first_piece);
    });
  }
}

}  // namespace regfused
