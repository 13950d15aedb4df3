// Slices of a tensor along one dimension, such as rows, columns or filters, and what a rule that
// looks at their L2 norm makes of them.
#pragma once

#include <cstdint>

#include "portable.h"

namespace regfused {

// A dense tensor as it lies in memory, [outer][count][inner], whatever its memory format: element m
// belongs to slice (m / inner) % count.
struct SliceLayout {
  int64_t outer = 1;
  int64_t count = 0;  // of slices
  int64_t inner = 0;  // elements of a run: what of a slice lies together

  REGFUSED_RULE int64_t numel() const { return outer * count * inner; }
};

enum class SliceRule : uint8_t {
  group_lasso,  // w * max(1 - bound/||w||, 0): the proximal map of bound*||w||; exact zeros where ||w|| <= bound
  max_norm,     // w * bound/||w|| where ||w|| > bound
};

// The group lasso where each element has a step of its own length e, taken in the metric of the step: the w that
// minimizes  sum (w - q)^2 / (2*e) + k*group_l1*||w||.  With the threshold t = k*group_l1*e of each element:
//
//   w = 0              where sum (q/t)^2 <= 1
//   w = q * r/(r + t)  where r = ||w|| solves  sum x^2 = 1,  x = q/(r + t)
//
// Newton's method on f(r) = 1/sqrt(sum x^2) - 1, which is concave and nearly linear. Where r is large, f is its
// asymptote (r + sum (q^2*t)/||q||^2)/||q|| - 1: the search begins at the zero of that, which is not above the
// solution, as f is not above its asymptote, and from there the steps only grow. The solution is above it by no more
// than about 1.5*sum (q^2*t^2)/||q||^3: where thresholds are small against ||q|| that does not show in any w, and the
// search is at its end where it begins.
//
// e is made again of what the step has left in a slot: t = bound/D where D = sqrt(v)*root + floor. With that
// w = q * D/(D + bound/r), which takes one division less.
struct SliceMetric {
  const void* second_moment = nullptr;  // v, which lies as the tensor does; null: one length for all elements
  double root = 0;
  double floor = 0;

  REGFUSED_RULE explicit operator bool() const { return second_moment != nullptr; }
};

// What is summed up over a slice. At the beginning: q^2, q^2*t, q^2*t^2, and the largest t where q is not 0. Later: x^2
// and x^2/(r + t).
struct SliceSums {
  static constexpr int kCount = 4;
  double squares = 0;
  double second = 0;
  double third = 0;
  double largest = 0;
};

// How far the search for r has come.
struct SliceRadius {
  double radius = -1;  // below 0: at the beginning
  bool open = true;

  REGFUSED_RULE bool is_beginning() const { return radius < 0; }
};

// A bound that depends on the length of a step: per_length*length / (1 + growth*length).
struct SliceBound {
  double per_length = 0;
  double growth = 0;

  REGFUSED_RULE double at(double length) const { return per_length * length / (1 + growth * length); }
};

// Whether the rule leaves every slice as it is.
REGFUSED_RULE bool is_neutral(SliceRule rule, double bound) {
  return rule == SliceRule::group_lasso ? bound == 0 : bound > 1.7976931348623157e308;
}

inline namespace REGFUSED_ISA {

// The factor of a slice with this norm. 1 leaves the bits of the slice as they are. A NaN norm makes
// the group lasso's slice NaN, and is not above any max_norm, as in torch.renorm.
REGFUSED_RULE double slice_factor(SliceRule rule, double bound, double norm) {
  if (is_neutral(rule, bound)) return 1;
  if (rule == SliceRule::max_norm) return norm > bound ? bound / norm : 1;
  return norm <= bound ? 0 : 1 - bound / norm;
}

template <class T>
REGFUSED_RULE constexpr T largest_number() {
  return T(sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308);
}

// D of an element from its second moment. An element whose second moment has become infinite has a large one, and moves
// no more.
template <class T>
struct SliceWeight {
  static constexpr T kLargest = T(sizeof(T) == 4 ? 1e38 : 1e300), kLargestThreshold = T(sizeof(T) == 4 ? 1e18 : 1e100);
  double bound;
  T root, floor;

  REGFUSED_RULE SliceWeight(const SliceMetric& metric, double bound)
      : bound(bound), root(T(metric.root)), floor(T(metric.floor)) {}

  template <class V>
  REGFUSED_RULE V operator()(V v) const {
    const V weight = square_root(v) * root + floor;
    return weight < kLargest ? weight : splat<V>(kLargest);
  }
  // t. None is so small or so large that products of it overflow.
  template <class V>
  REGFUSED_RULE V threshold(V weight) const {
    const V threshold = T(bound) / weight;
    const V not_small = threshold > 1 / kLargestThreshold ? threshold : splat<V>(1 / kLargestThreshold);
    return not_small < kLargestThreshold ? not_small : splat<V>(kLargestThreshold);
  }
  // bound/r of a slice, for slice_shrunk. 0 where the norm is infinite, or as good as that: the slice stays as it is.
  REGFUSED_RULE T pull(double radius) const { return T(bound / radius); }
};

// 1/(r + t) of an element from its threshold and the radius of its slice. x is its product with q.
template <class T, class V, class R>
REGFUSED_RULE V slice_slope(V threshold, R radius) {
  return T(1) / (radius + threshold);
}

// q -> w of one element. Of an element without weight, which has an infinite threshold, nothing is left.
template <class V, class P>
REGFUSED_RULE V slice_shrunk(V q, V weight, P pull) {
  return q * (weight / (weight + pull));
}

// How exact a search has to be, in the type of arithmetic.
struct RadiusPrecision {
  double change;  // after a relative change of r that is not above it the error, about its square, does not count
  double error;   // a relative error of w that does not count
};
template <class T>
REGFUSED_RULE constexpr RadiusPrecision radius_precision() {
  return sizeof(T) == 4 ? RadiusPrecision{1e-4, 1e-8} : RadiusPrecision{1e-8, 1e-17};
}

// From the sums at a radius to the next one.
REGFUSED_RULE SliceRadius next_radius(const SliceRadius& now, const SliceSums& sums, const RadiusPrecision& precision) {
  if (now.is_beginning()) {
    const double norm = sqrt(sums.squares);
    if (!(norm > 0 && norm <= largest_number<double>())) return {norm, false};  // 0 or infinite: as it is; NaN: NaN
    const double start = norm - sums.second / sums.squares;
    if (!(start > 0)) return {0, true};
    // Of r, and what of it an element's w can show: its error is that of r times t/(r + t).
    const double error = 1.5 * sums.third / (sums.squares * start * start);
    return {start, !(error * sums.largest <= precision.error * (start + sums.largest))};
  }
  const double step = sums.squares * (sqrt(sums.squares) - 1) / sums.second;
  double next = now.radius + step;
  if (!(next > 0)) next = 0;  // of a slice that becomes zero: at r = 0 the sum is no more than 1
  if (!(step <= largest_number<double>())) return {now.radius, false};  // nothing of the slice is left to measure
  const double change = next > now.radius ? next - now.radius : now.radius - next;
  return {next, change > precision.change * next};
}

// Where rounding keeps a search from its end, it ends here.
constexpr int kMostRadii = 16;

// One element, given the factor of its slice, in the type of arithmetic.
template <class V>
REGFUSED_RULE V slice_scaled(V w, V factor) {
  return w * factor;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
