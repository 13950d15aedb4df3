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

// --- In a metric ----------------------------------------------------------------------------------

// SliceSums in fixed lanes: x^2, x^2*y, and, at the beginning, x^2*y^2.
struct SliceLanes {
  Doubles squares[kLanes / kDoubles] = {};
  Doubles second[kLanes / kDoubles] = {};
  Doubles third[kLanes / kDoubles] = {};

  template <int I, bool kThird>
  REGFUSED_RULE void add(Floats x, Floats y) {
    add<2 * I, kThird>(widen_low(x), widen_low(y));
    add<2 * I + 1, kThird>(widen_high(x), widen_high(y));
  }
  template <int I, bool kThird>
  REGFUSED_RULE void add(Doubles x, Doubles y) {
    const Doubles square = x * x, product = square * y;
    squares[I] += square;
    second[I] += product;
    if constexpr (kThird) third[I] += product * y;
  }
  REGFUSED_RULE SliceSums total() const { return {total_of(squares), total_of(second), total_of(third), 0}; }

 private:
  REGFUSED_RULE static double total_of(const Doubles (&lanes)[kLanes / kDoubles]) {
    NormLanes sum(NormType::one);
    __builtin_memcpy(sum.lanes, lanes, sizeof lanes);
    return sum.total();
  }
};

// At the beginning sums of some elements may be made in float, which is faster: r is as exact as the data then, and w,
// which hardly depends on it, more so. q is taken this many times larger: squares that are lost then are of a slice
// that is zero, since no threshold is below 1e-18.
constexpr float kFloatScale = 1 << 20;
REGFUSED_RULE SliceSums of_float(const SliceSums& sums) {
  constexpr double kBack = 1 / (double(kFloatScale) * kFloatScale);
  return {sums.squares * kBack, sums.second * kBack, sums.third * kBack, sums.largest};
}
// Whether no sum has overflowed.
REGFUSED_RULE bool is_exact(const SliceSums& sums) {
  constexpr double kMost = largest_number<float>();
  return sums.squares <= kMost && sums.second <= kMost && sums.third <= kMost;
}

struct FloatSliceLanes {
  // Rows after which the sums go to doubles.
  static constexpr int64_t kRows = 8;
  Floats squares[kLanes / kFloats] = {};
  Floats second[kLanes / kFloats] = {};
  Floats third[kLanes / kFloats] = {};

  template <int I>
  REGFUSED_RULE void add(Floats q, Floats threshold) {
    const Floats x = q * kFloatScale, square = x * x, product = square * threshold;
    squares[I] += square;
    second[I] += product;
    third[I] += product * threshold;
  }
  REGFUSED_RULE void move_to(SliceLanes& sums) {
    // Not a loop: what it goes over would be in memory all the time.
    for_each_vector<float>([&](auto position, int) __attribute__((always_inline)) {
      constexpr int i = position.value;
      move(squares[i], sums.squares + 2 * i);
      move(second[i], sums.second + 2 * i);
      move(third[i], sums.third + 2 * i);
    });
  }

 private:
  REGFUSED_RULE static void move(Floats& from, Doubles* to) {
    to[0] += widen_low(from);
    to[1] += widen_high(from);
    from = Floats{};
  }
};

template <class V>
REGFUSED_RULE V larger(V a, V b) {
  return a > b ? a : b;
}
// The larger threshold, where q is not 0.
template <class V>
REGFUSED_RULE V larger_threshold(V q, V threshold, V largest) {
  return larger(q == 0 ? V{} : threshold, largest);
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

  // f(position, q + at, v + at, i + at) for each vector of each row from i on, after_row(i) after it.
  template <bool kWrites, class F>
  REGFUSED_RULE void for_each(const F& f) {
    for_each<kWrites>(f, [](int64_t) __attribute__((always_inline)) {});
  }
  template <bool kWrites, class F, class AfterRow>
  REGFUSED_RULE void for_each(const F& f, const AfterRow& after_row) {
    for_each<kWrites>(f, after_row, [](int64_t) __attribute__((always_inline)) { return true; });
  }
  // Rows that are not wanted(i) are passed by.
  template <bool kWrites, class F, class AfterRow, class Wanted>
  REGFUSED_RULE void for_each(const F& f, const AfterRow& after_row, const Wanted& wanted) {
    for (int64_t i = 0; i < n; i += kLanes) {
      if (!wanted(i)) continue;
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

// weights: room for D of each element, in whole rows, where a slice lies in a chunk: there they are made once. Or null.
template <class S>
SliceSums sums_at_beginning(const SliceTensor& tensor, int64_t begin, int64_t n, typename Storage<S>::T* weights) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  SliceLanes lanes;
  V largest{};
  if constexpr (sizeof(T) == 4) {
    FloatSliceLanes some;
    MetricRows<S>(tensor, begin, n)
        .template for_each<false>(
            [&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
              const V weight = weight_of(load(v)), threshold = weight_of.threshold(weight), of_q = load(q);
              if (weights) store(weights + i, weight);
              largest = larger_threshold(of_q, threshold, largest);
              some.template add<position.value>(of_q, threshold);
            },
            [&](int64_t i) __attribute__((always_inline)) {
              if (i / kLanes % FloatSliceLanes::kRows == FloatSliceLanes::kRows - 1) some.move_to(lanes);
            });
    some.move_to(lanes);
    SliceSums found = lanes.total();
    found.largest = largest_lane<T>(largest);
    if (is_exact(found)) return of_float(found);
    lanes = SliceLanes();
  }
  MetricRows<S>(tensor, begin, n)
      .template for_each<false>([&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V weight = weight_of(load(v)), threshold = weight_of.threshold(weight), of_q = load(q);
        if (weights) store(weights + i, weight);
        largest = larger_threshold(of_q, threshold, largest);
        lanes.template add<position.value, true>(of_q, threshold);
      });
  SliceSums sums = lanes.total();
  sums.largest = largest_lane<T>(largest);
  return sums;
}

template <class S>
SliceSums sums_at(const SliceTensor& tensor, int64_t begin, int64_t n, double radius,
                  const typename Storage<S>::T* weights) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  const T r = T(radius);
  SliceLanes lanes;
  MetricRows<S>(tensor, begin, n)
      .template for_each<false>([&](auto position, const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V weight = weights ? load(weights + i) : weight_of(load(v));
        const V slope = slice_slope<T>(weight_of.threshold(weight), r);
        lanes.template add<position.value, false>(load(q) * slope, slope);
      });
  return lanes.total();
}

template <class S>
void shrink_to(const SliceTensor& tensor, int64_t begin, int64_t n, double radius,
               const typename Storage<S>::T* weights) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  const T pull = weight_of.pull(radius);
  if (pull == 0) return;
  MetricRows<S>(tensor, begin, n)
      .template for_each<true>([&](auto, S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V weight = weights ? load(weights + i) : weight_of(load(v));
        store(q, slice_shrunk(load(q), weight, pull));
      });
}

template <class S>
void shrink_in_metric(const SliceTensor& tensor, int64_t begin, int64_t n) {
  using T = typename Storage<S>::T;
  alignas(REGFUSED_VECTOR_BYTES) T weights[kMostInChunk + kLanes];
  SliceRadius radius = next_radius({}, sums_at_beginning<S>(tensor, begin, n, weights), radius_precision<T>());
  for (int i = 1; i < kMostRadii && radius.open; ++i)
    radius = next_radius(radius, sums_at<S>(tensor, begin, n, radius.radius, weights), radius_precision<T>());
  shrink_to<S>(tensor, begin, n, radius.radius, weights);
}

// The numbers of a partial sum lie apart.
REGFUSED_RULE void put(const SliceSums& sums, double* to, int64_t plane) {
  to[0] = sums.squares;
  to[plane] = sums.second;
  to[2 * plane] = sums.third;
  to[3 * plane] = sums.largest;
}

REGFUSED_RULE SliceSums taken(const double* from, int64_t plane) {
  return {from[0], from[plane], from[2 * plane], from[3 * plane]};
}

template <class S>
void sum_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment, const SliceRadius& radius,
                 double* sums, int64_t plane) {
  const SliceSums found = radius.is_beginning()
                              ? sums_at_beginning<S>(tensor, segment.begin, segment.size, nullptr)
                              : sums_at<S>(tensor, segment.begin, segment.size, radius.radius, nullptr);
  put(found, sums, plane);
}

template <class S>
void shrink_segment(const SliceTensor& tensor, const SliceSegments::Segment& segment, const SliceRadius& radius) {
  shrink_to<S>(tensor, segment.begin, segment.size, radius.radius, nullptr);
}

// number(radius) for each column of a tile, from radius_of(i) of its run i, which is asked in turn; and which stretches
// of kLanes columns have a radius that is still sought.
template <class T>
struct ColumnRadii {
  Columns<T> numbers;
  bool open[kSliceColumns / kLanes + 1] = {};

  template <class RadiusOf, class Number>
  REGFUSED_RULE ColumnRadii(const SliceTile& tile, RadiusOf radius_of, const Number& number) {
    const int32_t runs = tile.runs();
    for (int32_t run = 0, c = 0; run < runs; ++run) {
      const SliceRadius& radius = radius_of(run);
      const T of_run = number(radius.radius);
      for (const int32_t end = tile.begin_of(run + 1); c < end; ++c) {
        numbers.at[c] = of_run;
        open[c / kLanes] |= radius.open;
      }
    }
    for (int c = 0; c < kLanes; ++c) numbers.at[tile.columns + c] = 0;
  }
};

// SliceSums of each column of a tile, in the type A.
template <class A, class T>
struct ColumnSums {
  Columns<A> squares, second, third;
  Columns<T> largest;

  ColumnSums() {
    __builtin_memset(&squares, 0, sizeof squares);
    __builtin_memset(&second, 0, sizeof second);
    __builtin_memset(&third, 0, sizeof third);
    __builtin_memset(&largest, 0, sizeof largest);
  }
  // x^2 and x^2*y from column i on, and at the beginning x^2*y^2.
  template <bool kThird, class V>
  REGFUSED_RULE void add(int64_t i, V x, V y) {
    if constexpr (sizeof(A) != sizeof(T) && std::is_same_v<V, Floats>) {
      add<kThird>(i, widen_low(x), widen_low(y));
      add<kThird>(i + kDoubles, widen_high(x), widen_high(y));
    } else {
      const V square = x * x, product = square * y;
      store(squares.at + i, load(squares.at + i) + square);
      store(second.at + i, load(second.at + i) + product);
      if constexpr (kThird) store(third.at + i, load(third.at + i) + product * y);
    }
  }
  REGFUSED_RULE SliceSums of_run(const SliceTile& tile, int32_t run) const {
    SliceSums sums;
    for (int32_t c = tile.begin_of(run); c < tile.begin_of(run + 1); ++c) {
      sums.squares += squares.at[c];
      sums.second += second.at[c];
      sums.third += third.at[c];
      sums.largest = larger(double(largest.at[c]), sums.largest);
    }
    return sums;
  }
};

// f(q, v, i) for each vector of a tile, from column i on, row by row. wanted(i): whether a stretch of columns is.
template <class S, bool kWrites, class F, class Wanted>
REGFUSED_RULE void for_each_in_metric(const SliceTensor& tensor, const SliceTile& tile, const F& f,
                                      const Wanted& wanted) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t begin = tile.begin + r * tile.stride, rest = tile.numel - begin;
    if (rest <= 0) break;
    MetricRows<S>(tensor, begin, rest < tile.columns ? rest : tile.columns)
        .template for_each<kWrites>([&](auto, auto* q, const S* v, int64_t i)
                                        __attribute__((always_inline)) { f(q, v, i); },
                                    [](int64_t) __attribute__((always_inline)) {}, wanted);
  }
}

// The sums of each run of a tile at the beginning, in the type A.
template <class S, class A>
ColumnSums<A, typename Storage<S>::T> sums_of_columns(const SliceTensor& tensor, const SliceTile& tile) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  const T scale = sizeof(A) == 4 ? kFloatScale : 1;
  ColumnSums<A, T> sums;
  for_each_in_metric<S, false>(
      tensor, tile,
      [&](const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V threshold = weight_of.threshold(weight_of(load(v))), of_q = load(q);
        T* largest = sums.largest.at + i;
        store(largest, larger_threshold(of_q, threshold, load(largest)));
        sums.template add<true>(i, of_q * scale, threshold);
      },
      [](int64_t) __attribute__((always_inline)) { return true; });
  return sums;
}

template <class S>
void sum_columns_at_beginning(const SliceTensor& tensor, const SliceTile& tile, double* to, int64_t plane) {
  const int32_t runs = tile.runs();
  if constexpr (sizeof(typename Storage<S>::T) == 4) {
    const auto sums = sums_of_columns<S, float>(tensor, tile);
    bool exact = true;
    for (int32_t run = 0; run < runs; ++run) {
      const SliceSums of_run = sums.of_run(tile, run);
      exact &= is_exact(of_run);
      put(of_float(of_run), to + run, plane);
    }
    if (exact) return;
  }
  const auto sums = sums_of_columns<S, double>(tensor, tile);
  for (int32_t run = 0; run < runs; ++run) put(sums.of_run(tile, run), to + run, plane);
}

// The sums of each run of a tile at the radii of its columns; those of radii that have been found are not made.
template <class S, class RadiusOf>
void sum_columns(const SliceTensor& tensor, const SliceTile& tile, const RadiusOf& radius_of, double* to,
                 int64_t plane) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  const ColumnRadii<T> radii(tile, radius_of, [](double radius) { return T(radius); });
  ColumnSums<double, T> sums;
  for_each_in_metric<S, false>(
      tensor, tile,
      [&](const S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V slope = slice_slope<T>(weight_of.threshold(weight_of(load(v))), load(radii.numbers.at + i));
        sums.template add<false>(i, load(q) * slope, slope);
      },
      [&](int64_t i) __attribute__((always_inline)) { return radii.open[i / kLanes]; });
  const int32_t runs = tile.runs();
  for (int32_t run = 0; run < runs; ++run) put(sums.of_run(tile, run), to + run, plane);
}

template <class S, class RadiusOf>
REGFUSED_RULE void shrink_columns(const SliceTensor& tensor, const SliceTile& tile, const RadiusOf& radius_of) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SliceWeight<T> weight_of(tensor.metric, tensor.bound);
  const ColumnRadii<T> pulls(tile, radius_of, [&](double radius) { return weight_of.pull(radius); });
  for_each_in_metric<S, true>(
      tensor, tile,
      [&](S* q, const S* v, int64_t i) __attribute__((always_inline)) {
        const V of_q = load(q), pull = load(pulls.numbers.at + i);
        const V shrunk = slice_shrunk(of_q, weight_of(load(v)), pull);
        store(q, pull == 0 ? of_q : shrunk);
      },
      [](int64_t) __attribute__((always_inline)) { return true; });
}

// Whole short slices side by side: a tile of one row.
template <class S>
void shrink_row_in_metric(const SliceTensor& tensor, const SliceTile& tile) {
  using T = typename Storage<S>::T;
  SliceRadius radii[kSliceColumns];
  double sums[SliceSums::kCount * kSliceColumns];
  const int32_t runs = tile.runs();
  const auto radius_of = [&](int32_t run) -> const SliceRadius& { return radii[run]; };
  bool open = true;
  for (int i = 0; i < kMostRadii && open; ++i) {
    if (i == 0)
      sum_columns_at_beginning<S>(tensor, tile, sums, kSliceColumns);
    else
      sum_columns<S>(tensor, tile, radius_of, sums, kSliceColumns);
    open = false;
    for (int32_t run = 0; run < runs; ++run) {
      if (!radii[run].open) continue;
      radii[run] = next_radius(radii[run], taken(sums + run, kSliceColumns), radius_precision<T>());
      open |= radii[run].open;
    }
  }
  shrink_columns<S>(tensor, tile, radius_of);
}

// Of the runs of a tile, asked in turn from the first on: the radii of their slices.
struct RadiiInTurn {
  const SliceRadius* radii;  // of all slices
  int64_t slice, count;

  REGFUSED_RULE RadiiInTurn(const SliceTensor& tensor, const SliceTile& tile, const SliceRadius* radii)
      : radii(radii), slice(tile.first_run % tensor.layout.count), count(tensor.layout.count) {}
  REGFUSED_RULE const SliceRadius& operator()(int32_t) {
    const SliceRadius& radius = radii[slice];
    slice = slice + 1 == count ? 0 : slice + 1;
    return radius;
  }
};

template <class S>
void sum_tile(const SliceTensor& tensor, const SliceTile& tile, const SliceRadius* radii, double* sums, int64_t plane) {
  RadiiInTurn radius_of(tensor, tile, radii);
  if (radii[radius_of.slice].is_beginning()) return sum_columns_at_beginning<S>(tensor, tile, sums, plane);
  const int32_t runs = tile.runs();
  bool open = false;
  for (int32_t run = 0; run < runs; ++run) open |= radius_of(run).open;
  if (!open) return;
  sum_columns<S>(tensor, tile, RadiiInTurn(tensor, tile, radii), sums, plane);
}

template <class S>
void shrink_tile(const SliceTensor& tensor, const SliceTile& tile, const SliceRadius* radii) {
  shrink_columns<S>(tensor, tile, RadiiInTurn(tensor, tile, radii));
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
