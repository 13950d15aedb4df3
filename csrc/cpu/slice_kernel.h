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

// x^2, and x^2 times another number.
REGFUSED_RULE void add_products(double* squares, double* products, Doubles x, Doubles other) {
  const Doubles square = x * x;
  store(squares, load(squares) + square);
  store(products, load(products) + square * other);
}
REGFUSED_RULE void add_products(double* squares, double* products, Floats x, Floats other) {
  add_products(squares, products, widen_low(x), widen_low(other));
  add_products(squares + kDoubles, products + kDoubles, widen_high(x), widen_high(other));
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

// --- In a metric ----------------------------------------------------------------------------------

// SliceSums in fixed lanes: x*x, and x*x times another number.
struct SliceLanes {
  Doubles squares[kLanes / kDoubles] = {};
  Doubles products[kLanes / kDoubles] = {};

  template <int I>
  REGFUSED_RULE void add(Floats x, Floats other) {
    add<2 * I>(widen_low(x), widen_low(other));
    add<2 * I + 1>(widen_high(x), widen_high(other));
  }
  template <int I>
  REGFUSED_RULE void add(Doubles x, Doubles other) {
    const Doubles square = x * x;
    squares[I] += square;
    products[I] += square * other;
  }
  REGFUSED_RULE SliceSums total() const { return {total_of(squares), total_of(products), 0}; }

 private:
  REGFUSED_RULE static double total_of(const Doubles (&lanes)[kLanes / kDoubles]) {
    NormLanes sum(NormType::one);
    __builtin_memcpy(sum.lanes, lanes, sizeof lanes);
    return sum.total();
  }
};

// The same in float, for some rows, which is faster.
struct FloatSliceLanes {
  // Rows after which the sums go to doubles: so few that rounding does not count.
  static constexpr int64_t kRows = 8;
  Floats squares[kLanes / kFloats] = {};
  Floats products[kLanes / kFloats] = {};

  template <int I>
  REGFUSED_RULE void add(Floats x, Floats other) {
    const Floats square = x * x;
    squares[I] += square;
    products[I] += square * other;
  }
  REGFUSED_RULE void move_to(SliceLanes& sums) {
    for (int i = 0; i < kLanes / kFloats; ++i) {
      sums.squares[2 * i] += widen_low(squares[i]);
      sums.squares[2 * i + 1] += widen_high(squares[i]);
      sums.products[2 * i] += widen_low(products[i]);
      sums.products[2 * i + 1] += widen_high(products[i]);
      squares[i] = products[i] = Floats{};
    }
  }
  // Whether no sum has overflowed, and no term was lost that would count.
  REGFUSED_RULE static bool is_exact(const SliceSums& sums) {
    return sums.squares >= 1e-20 && sums.squares <= 1e30 && sums.second <= 1e30;
  }
};

template <class V>
REGFUSED_RULE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class T, class V>
REGFUSED_RULE double largest_lane(V lanes) {
  T largest = 0;
  for (size_t j = 0; j < sizeof(V) / sizeof(T); ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  return double(largest);
}

// Both arrays of some elements of a slice, row after row: q of the tensor, v of its metric.
template <class S>
struct MetricRows {
  Rows<S> of_q, of_v;
  const int64_t n;

  REGFUSED_RULE MetricRows(const SliceTensor& tensor, int64_t begin, int64_t n)
      : of_q(tensor.data, Chunk{0, static_cast<int32_t>(n), begin}),
        of_v(const_cast<void*>(tensor.metric.second_moment), Chunk{0, static_cast<int32_t>(n), begin}),
        n(n) {}

  // f(position, q + at, v + at, i + at) for each vector, after_row(i) for each row.
  template <bool kWrites, class F>
  REGFUSED_RULE void for_each(const F& f) {
    for_each<kWrites>(f, [](int64_t) __attribute__((always_inline)) {});
  }
  template <bool kWrites, class F, class AfterRow>
  REGFUSED_RULE void for_each(const F& f, const AfterRow& after_row) {
    for (int64_t i = 0; i < n; i += kLanes) {
      S* q = of_q.row(i, n);
      const S* v = of_v.row(i, n);
      prefetch(q);
      prefetch(v);
      for_each_vector<S>([&](auto position, int at)
                             __attribute__((always_inline)) { f(position, q + at, v + at, i + at); });
      after_row(i);
      if constexpr (kWrites) of_q.write_back(i, n);
    }
  }
};

// thresholds: room for t of each element, in whole rows, where a slice lies in a chunk: there they are made once. Or
// null.
template <class S>
SliceSums sums_at_beginning(const SliceTensor& tensor, int64_t begin, int64_t n, typename Storage<S>::T* thresholds) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceThreshold<T> threshold_of(tensor.metric, tensor.bound);
  SliceLanes lanes;
  V largest{};
  const auto sums = [&]() __attribute__((always_inline)) {
    SliceSums sums = lanes.total();
    sums.largest = largest_lane<T>(largest);
    return sums;
  };
  if constexpr (sizeof(T) == 4) {
    FloatSliceLanes some;
    MetricRows<S>(tensor, begin, n)
        .template for_each<false>(
            [&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
              const V threshold = threshold_of(load(v));
              if (thresholds) store(thresholds + i, threshold);
              largest = larger(threshold, largest);
              some.template add<position.value>(load(q), threshold);
            },
            [&](int64_t i) __attribute__((always_inline)) {
              if (i / kLanes % FloatSliceLanes::kRows == FloatSliceLanes::kRows - 1) some.move_to(lanes);
            });
    some.move_to(lanes);
    if (const SliceSums found = sums(); FloatSliceLanes::is_exact(found)) return found;
    lanes = SliceLanes();
  }
  MetricRows<S>(tensor, begin, n)
      .template for_each<false>([&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V threshold = threshold_of(load(v));
        if (thresholds) store(thresholds + i, threshold);
        largest = larger(threshold, largest);
        lanes.template add<position.value>(load(q), threshold);
      });
  return sums();
}

template <class S>
SliceSums sums_at(const SliceTensor& tensor, int64_t begin, int64_t n, double radius,
                  const typename Storage<S>::T* thresholds) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceThreshold<T> threshold_of(tensor.metric, tensor.bound);
  const T r = T(radius);
  SliceLanes lanes;
  MetricRows<S>(tensor, begin, n)
      .template for_each<false>([&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V slope = slice_slope<T>(thresholds ? load(thresholds + i) : threshold_of(load(v)), r);
        lanes.template add<position.value>(load(q) * slope, slope);
      });
  return lanes.total();
}

template <class S>
void shrink_to(const SliceTensor& tensor, int64_t begin, int64_t n, double radius,
               const typename Storage<S>::T* thresholds) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  if (radius > largest_number<double>()) return;
  const SliceThreshold<T> threshold_of(tensor.metric, tensor.bound);
  const T r = T(radius);
  MetricRows<S>(tensor, begin, n)
      .template for_each<true>([&](auto, S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V threshold = thresholds ? load(thresholds + i) : threshold_of(load(v));
        store(q, slice_shrunk(load(q), threshold, r));
      });
}

template <class S>
void shrink_in_metric(const SliceTensor& tensor, int64_t begin, int64_t n) {
  using T = typename Storage<S>::T;
  alignas(REGFUSED_VECTOR_BYTES) T thresholds[kMostInChunk + kLanes];
  SliceRadius radius = next_radius({}, sums_at_beginning<S>(tensor, begin, n, thresholds), radius_precision<T>());
  for (int i = 1; i < kMostRadii && radius.open; ++i)
    radius = next_radius(radius, sums_at<S>(tensor, begin, n, radius.radius, thresholds), radius_precision<T>());
  shrink_to<S>(tensor, begin, n, radius.radius, thresholds);
}

template <class S>
void sum_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment, const SliceRadius& radius,
                 double* sums, int64_t plane) {
  const SliceSums found = radius.is_beginning()
                              ? sums_at_beginning<S>(tensor, segment.begin, segment.size, nullptr)
                              : sums_at<S>(tensor, segment.begin, segment.size, radius.radius, nullptr);
  sums[0] = found.squares;
  sums[plane] = found.second;
  sums[2 * plane] = found.largest;
}

template <class S>
void shrink_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment, const SliceRadius& radius) {
  shrink_to<S>(tensor, segment.begin, segment.size, radius.radius, nullptr);
}

// The radius of each column of a tile, from radius_of(i) of its run i.
template <class T, class RadiusOf>
REGFUSED_RULE void spread_radii(const SliceTile& tile, Columns<T>& radii, const RadiusOf& radius_of) {
  const int32_t runs = tile.runs();
  for (int32_t run = 0; run < runs; ++run)
    for (int32_t c = tile.begin_of(run); c < tile.begin_of(run + 1); ++c) radii.at[c] = T(radius_of(run).radius);
  for (int c = 0; c < kLanes; ++c) radii.at[tile.columns + c] = 0;
}

// The sums of each run of a tile, at the radii of its columns or at the beginning.
template <class S>
void sum_columns(const SliceTensor& tensor, const SliceTile& tile, const Columns<typename Storage<S>::T>* radii,
                 double* sums, int64_t plane) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceThreshold<T> threshold_of(tensor.metric, tensor.bound);
  Columns<double> squares, second;
  Columns<T> largest;
  __builtin_memset(&squares, 0, sizeof squares);
  __builtin_memset(&second, 0, sizeof second);
  __builtin_memset(&largest, 0, sizeof largest);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t begin = tile.begin + r * tile.stride, rest = tile.numel - begin;
    if (rest <= 0) break;
    MetricRows<S>(tensor, begin, rest < tile.columns ? rest : tile.columns)
        .template for_each<false>([&](auto, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
          const V threshold = threshold_of(load(v)), of_q = load(q);
          if (radii) {
            const V slope = slice_slope<T>(threshold, load(radii->at + i));
            add_products(squares.at + i, second.at + i, of_q * slope, slope);
          } else {
            add_products(squares.at + i, second.at + i, of_q, threshold);
            store(largest.at + i, larger(threshold, load(largest.at + i)));
          }
        });
  }
  const int32_t runs = tile.runs();
  for (int32_t run = 0; run < runs; ++run) {
    SliceSums of_run;
    for (int32_t c = tile.begin_of(run); c < tile.begin_of(run + 1); ++c) {
      of_run.squares += squares.at[c];
      of_run.second += second.at[c];
      of_run.largest = larger(double(largest.at[c]), of_run.largest);
    }
    sums[run] = of_run.squares;
    sums[run + plane] = of_run.second;
    sums[run + 2 * plane] = of_run.largest;
  }
}

// radius_of(i): of run i of the tile.
template <class S, class RadiusOf>
REGFUSED_RULE void shrink_columns(const SliceTensor& tensor, const SliceTile& tile, const RadiusOf& radius_of) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceThreshold<T> threshold_of(tensor.metric, tensor.bound);
  Columns<T> radii;
  spread_radii(tile, radii, radius_of);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t begin = tile.begin + r * tile.stride, rest = tile.numel - begin;
    if (rest <= 0) break;
    MetricRows<S>(tensor, begin, rest < tile.columns ? rest : tile.columns)
        .template for_each<true>([&](auto, S* q, const S* v, int64_t i) __attribute__((always_inline)) {
          const V of_q = load(q), radius = load(radii.at + i);
          const V shrunk = slice_shrunk(of_q, threshold_of(load(v)), radius);
          store(q, radius > largest_number<T>() ? of_q : shrunk);
        });
  }
}

// Whole short slices side by side: a tile of one row.
template <class S>
void shrink_row_in_metric(const SliceTensor& tensor, const SliceTile& tile) {
  using T = typename Storage<S>::T;
  SliceRadius radii[kSliceColumns];
  double sums[SliceSums::kCount * kSliceColumns];
  const int32_t runs = tile.runs();
  const auto radius_of = [&](int32_t run) { return radii[run]; };
  bool open = true;
  for (int i = 0; i < kMostRadii && open; ++i) {
    Columns<T> at;
    if (i > 0) spread_radii(tile, at, radius_of);
    sum_columns<S>(tensor, tile, i > 0 ? &at : nullptr, sums, kSliceColumns);
    open = false;
    for (int32_t run = 0; run < runs; ++run) {
      if (!radii[run].open) continue;
      radii[run] = next_radius(radii[run], {sums[run], sums[run + kSliceColumns], sums[run + 2 * kSliceColumns]},
                               radius_precision<T>());
      open |= radii[run].open;
    }
  }
  shrink_columns<S>(tensor, tile, radius_of);
}

// radii: of all slices.
template <class S>
void sum_tile(const SliceTensor& tensor, const SliceTile& tile, const SliceRadius* radii, double* sums, int64_t plane) {
  const int64_t count = tensor.layout.count, first = tile.first_run % count;
  const auto radius_of = [&](int32_t run) -> const SliceRadius& { return radii[(first + run) % count]; };
  const int32_t runs = tile.runs();
  bool open = false;
  for (int32_t run = 0; run < runs; ++run) open |= radius_of(run).open;
  if (!open) return;
  Columns<typename Storage<S>::T> at;
  const bool beginning = radius_of(0).is_beginning();
  if (!beginning) spread_radii(tile, at, radius_of);
  sum_columns<S>(tensor, tile, beginning ? nullptr : &at, sums, plane);
}

template <class S>
void shrink_tile(const SliceTensor& tensor, const SliceTile& tile, const SliceRadius* radii) {
  const int64_t count = tensor.layout.count, first = tile.first_run % count;
  shrink_columns<S>(tensor, tile, [&](int32_t run) { return radii[(first + run) % count]; });
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
      if (tensor.metric)
        shrink_in_metric<S>(tensor, begin + i, inner);
      else
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
    if (tensor.metric) {
      shrink_row_in_metric<S>(tensor, tile);
      continue;
    }
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
    REGFUSED_BY_DTYPE(shrink),         REGFUSED_BY_DTYPE(measure_segment), REGFUSED_BY_DTYPE(scale_segment),
    REGFUSED_BY_DTYPE(measure_tile),   REGFUSED_BY_DTYPE(scale_tile),      REGFUSED_BY_DTYPE(sum_segment),
    REGFUSED_BY_DTYPE(shrink_segment), REGFUSED_BY_DTYPE(sum_tile),        REGFUSED_BY_DTYPE(shrink_tile),
};
#undef REGFUSED_BY_DTYPE

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
