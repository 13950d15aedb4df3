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
// minimizes  sum (w - q)^2 / (2*e) + k*group_l1*||w||.  With D = 1/(k*group_l1*e) of each element:
//
//   w = 0                      where sum (D*q)^2 <= 1
//   w = q * r*D/(r*D + 1)      where r = ||w|| solves  sum x^2 = 1,  x = D*q/(r*D + 1)
//
// Newton's method on 1/sqrt(sum x^2) - 1, which is concave and nearly linear in r: from ||q|| - 1/max D, which is not
// below the solution, the first step leads to a point that is not above it, or to 0, and from there the steps only
// grow.
//
// e is made again of what the step has left in a slot: D = (sqrt(v)*root + floor)*scale.
struct SliceMetric {
  const void* second_moment = nullptr;  // v, which lies as the tensor does; null: one length for all elements
  double root = 0;
  double floor = 0;

  REGFUSED_RULE explicit operator bool() const { return second_moment != nullptr; }
};

// What is summed up over a slice. At the beginning: (D*q)^2, q^2, and the largest D. Later: x^2 and x^2*D/(r*D + 1).
struct SliceSums {
  static constexpr int kCount = 3;
  double squares = 0;
  double second = 0;
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

// D of an element from its second moment. No D is so large that its products overflow: an element whose second moment
// has become infinite does not move anyway.
template <class T>
struct SliceWeight {
  T root, floor, scale, cap;

  REGFUSED_RULE SliceWeight(const SliceMetric& metric, double bound)
      : root(T(metric.root)), floor(T(metric.floor)), cap(T(sizeof(T) == 4 ? 1e18 : 1e100)) {
    scale = bound * double(cap) > 1 ? T(1 / bound) : cap;
  }

  template <class V>
  REGFUSED_RULE V operator()(V v) const {
    const V weight = (square_root(v) * root + floor) * scale;
    return weight < cap ? weight : splat<V>(cap);
  }
};

// D/(r*D + 1) of an element from its D and the radius r of its slice. x is its product with q.
template <class T, class V, class R>
REGFUSED_RULE V slice_slope(V weight, R radius) {
  return weight / (radius * weight + T(1));
}

// q -> w of one element. An infinite radius leaves the slice as it is.
template <class T, class V, class R>
REGFUSED_RULE V slice_shrunk(V q, V weight, R radius) {
  return q * (radius * slice_slope<T>(weight, radius));
}

template <class T>
REGFUSED_RULE constexpr T largest_number() {
  return T(sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308);
}

// From the sums at a radius to the next one; `tolerance`: of a relative change after which the error, about the square
// of it, does not count.
REGFUSED_RULE SliceRadius next_radius(const SliceRadius& now, const SliceSums& sums, double tolerance) {
  if (now.is_beginning()) {
    if (sums.squares <= 1) return {0, false};
    const double norm = sqrt(sums.second);
    if (!(norm <= largest_number<double>())) return {norm, false};  // infinite: as it is; NaN: NaN
    const double start = norm - 1 / sums.largest;
    return {start > 0 ? start : 0, true};
  }
  const double step = sums.squares * (sqrt(sums.squares) - 1) / sums.second;
  double next = now.radius + step;
  if (!(next > 0)) next = 0;
  if (!(step <= largest_number<double>())) return {now.radius, false};  // nothing of the slice is left to measure
  const double change = next > now.radius ? next - now.radius : now.radius - next;
  return {next, change > tolerance * next};
}

// Where rounding keeps a search from its end, it ends here.
constexpr int kMostRadii = 16;

// Of the type of arithmetic.
template <class T>
REGFUSED_RULE constexpr double radius_tolerance() {
  return sizeof(T) == 4 ? 1e-4 : 1e-8;
}

// One element, given the factor of its slice, in the type of arithmetic.
template <class V>
REGFUSED_RULE V slice_scaled(V w, V factor) {
  return w * factor;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
