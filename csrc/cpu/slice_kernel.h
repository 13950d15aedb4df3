// Norms of slices and their scaling, for one instruction set.
#pragma once

#include "../slice_step.h"
#include "lanes.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

// --- Long runs ------------------------------------------------------------------------------------

template <class S>
double sum_of_squares(const SliceTensor& tensor, int64_t begin, int64_t n) {
  Rows<S> rows(tensor.data, Chunk{0, static_cast<int32_t>(n), begin});
  NormLanes norm(NormType::two);
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* row = rows.row(i, n);
    prefetch(row);
    for_each_vector<S>([&](auto position, int at)
                           __attribute__((always_inline)) { norm.template add<position.value>(load(row + at)); });
  }
  return norm.total();
}

template <class S>
void scale(const SliceTensor& tensor, int64_t begin, int64_t n, double factor) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  if (factor == 1) return;
  Rows<S> rows(tensor.data, Chunk{0, static_cast<int32_t>(n), begin});
  const V factors = splat<V>(T(factor));
  for (int64_t i = 0; i < n; i += kLanes) {
    S* row = rows.row(i, n);
    prefetch(row);
    for_each_vector<S>([&](auto, int at)
                           __attribute__((always_inline)) { store(row + at, slice_scaled(load(row + at), factors)); });
    rows.write_back(i, n);
  }
}

// --- Short runs -----------------------------------------------------------------------------------

// What is known of each column of a tile, with room for the row that is filled up.
template <class T>
struct alignas(REGFUSED_VECTOR_BYTES) Columns {
  T at[kSliceColumns + kLanes];
};

// f(row, i) for each stretch of kLanes columns, from column i on, row by row.
template <class S, bool kWrites, class F>
REGFUSED_RULE void for_each_stretch(const SliceTensor& tensor, const SliceTile& tile, const F& f) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t begin = tile.begin + r * tile.stride, rest = tile.numel - begin;
    if (rest <= 0) break;
    const int64_t n = rest < tile.columns ? rest : tile.columns;
    Rows<S> rows(tensor.data, Chunk{0, static_cast<int32_t>(n), begin});
    for (int64_t i = 0; i < n; i += kLanes) {
      S* row = rows.row(i, n);
      prefetch(row);
      f(row, i);
      if constexpr (kWrites) rows.write_back(i, n);
    }
  }
}

REGFUSED_RULE void add_squares(double* to, Doubles x) { store(to, norm_accumulate(NormType::two, load(to), x)); }
REGFUSED_RULE void add_squares(double* to, Floats x) {
  add_squares(to, widen_low(x));
  add_squares(to + kDoubles, widen_high(x));
}

template <class S>
void measure_tile(const SliceTensor& tensor, const SliceTile& tile, double* partials) {
  Columns<double> sums;
  __builtin_memset(&sums, 0, sizeof sums);
  for_each_stretch<S, false>(tensor, tile, [&](const S* row, int64_t i) __attribute__((always_inline)) {
    for_each_vector<S>([&](auto, int at)
                           __attribute__((always_inline)) { add_squares(sums.at + i + at, load(row + at)); });
  });
  const int32_t runs = tile.runs();
  for (int32_t run = 0; run < runs; ++run) {
    double sum = 0;
    for (int32_t c = tile.begin_of(run); c < tile.begin_of(run + 1); ++c) sum += sums.at[c];
    partials[run] = sum;
  }
}

// factor_of(i): of run i of the tile.
template <class S, class FactorOf>
REGFUSED_RULE void scale_runs(const SliceTensor& tensor, const SliceTile& tile, const FactorOf& factor_of) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  Columns<T> factors;
  bool changes = false;
  const int32_t runs = tile.runs();
  for (int32_t run = 0; run < runs; ++run) {
    const double factor = factor_of(run);
    changes |= factor != 1;
    for (int32_t c = tile.begin_of(run); c < tile.begin_of(run + 1); ++c) factors.at[c] = T(factor);
  }
  for (int c = 0; c < kLanes; ++c) factors.at[tile.columns + c] = 1;
  if (!changes) return;
  for_each_stretch<S, true>(tensor, tile, [&](S* row, int64_t i) __attribute__((always_inline)) {
    for_each_vector<S>([&](auto, int at) __attribute__((always_inline)) {
      V factor;
      __builtin_memcpy(&factor, factors.at + i + at, sizeof factor);
      store(row + at, slice_scaled(load(row + at), factor));
    });
  });
}

template <class S>
void scale_tile(const SliceTensor& tensor, const SliceTile& tile, const double* factors) {
  int64_t slice = tile.first_run % tensor.layout.count - 1;
  scale_runs<S>(tensor, tile, [&](int32_t) __attribute__((always_inline)) {
    slice = slice + 1 == tensor.layout.count ? 0 : slice + 1;
    return factors[slice];
  });
}

// --- Both -----------------------------------------------------------------------------------------

REGFUSED_RULE double factor_of(const SliceTensor& tensor, double squares) {
  return slice_factor(tensor.rule, tensor.bound, norm_finish(NormType::two, squares));
}

template <class S>
void shrink(const SliceTensor& tensor, int64_t begin, int64_t n) {
  const int64_t inner = tensor.layout.inner;
  if (inner >= kLanes) {
    for (int64_t i = 0; i < n; i += inner)
      scale<S>(tensor, begin + i, inner, factor_of(tensor, sum_of_squares<S>(tensor, begin + i, inner)));
    return;
  }
  const int64_t together = kSliceColumns / inner * inner;
  for (int64_t i = 0; i < n; i += together) {
    SliceTile tile;
    tile.begin = begin + i;
    tile.rows = 1;
    tile.numel = begin + n;
    tile.inner = inner;
    tile.columns = static_cast<int32_t>(n - i < together ? n - i : together);
    double squares[kSliceColumns];
    measure_tile<S>(tensor, tile, squares);
    scale_runs<S>(tensor, tile,
                  [&](int32_t run) __attribute__((always_inline)) { return factor_of(tensor, squares[run]); });
  }
}

template <class S>
double measure_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment) {
  return sum_of_squares<S>(tensor, segment.begin, segment.size);
}

template <class S>
void scale_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment, double factor) {
  scale<S>(tensor, segment.begin, segment.size, factor);
}

// function<S>(tensor, ...) for the tensor's storage type.
#define REGFUSED_BY_DTYPE(function)                                          \
  [](const SliceTensor& tensor, auto... arguments) {                         \
    switch (tensor.dtype) {                                                  \
      case DType::float32: return function<float>(tensor, arguments...);     \
      case DType::float64: return function<double>(tensor, arguments...);    \
      case DType::bfloat16: return function<BFloat16>(tensor, arguments...); \
      case DType::float16: return function<Float16>(tensor, arguments...);   \
    }                                                                        \
    __builtin_unreachable();                                                 \
  }

constexpr SliceKernels kSliceKernels = {
    REGFUSED_BY_DTYPE(shrink),       REGFUSED_BY_DTYPE(measure_segment), REGFUSED_BY_DTYPE(scale_segment),
    REGFUSED_BY_DTYPE(measure_tile), REGFUSED_BY_DTYPE(scale_tile),
};
#undef REGFUSED_BY_DTYPE

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
