// The elastic net l1*sum|p| + l2*sum(p^2): its value, its gradient, its proximal map.
//
// With a concavity c the term l1*|p| becomes the minimax concave penalty of gamma = 1/c (Zhang, Nearly unbiased
// variable selection under minimax concave penalty, 2010): l1*|p| - c*p^2/2 up to |p| = l1/c, and constant beyond. That
// is l1*|p| and something smooth, whose gradient is -clamp(c*p, -l1, l1). So a proximal step has the map of l1*|p|, and
// takes the smooth part for a part of the loss (Yao and Kwok, Efficient learning with a family of nonconvex
// regularizers by redistributing nonconvexity, 2018).
#pragma once

#include "portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

template <class V>
REGFUSED_RULE V absolute_value(V p) {
  return p > 0 ? p : -p;
}

// l1*|p| + l2*p^2 of one element. A strength of zero adds nothing, whatever p is.
template <class T>
struct ElasticNetValue {
  T l1, l2, concavity, flat;

  REGFUSED_RULE ElasticNetValue(double l1, double l2, double concavity = 0)
      : l1(T(l1)), l2(T(l2)), concavity(T(concavity)), flat(concavity == 0 ? T(0) : T(l1 / concavity)) {}

  // kConcave: whether there may be a concavity.
  template <bool kConcave = false, class V>
  REGFUSED_RULE V operator()(V p) const {
    V absolute = l1 == 0 ? V{} : kConcave && concavity != 0 ? concave(absolute_value(p)) : l1 * absolute_value(p);
    V square = l2 == 0 ? V{} : l2 * (p * p);
    return absolute + square;
  }

 private:
  template <class V>
  REGFUSED_RULE V concave(V size) const {
    const V at_most = size > flat ? splat<V>(flat) : size;
    return at_most * (l1 - concavity * T(0.5) * at_most);
  }
};

// g -> gain*g + sign_weight*sign(p) + slope*p, with sign(0) = 0.
//
// The gradient of the loss plus an elastic net is gain = 1, sign_weight = l1, slope = 2*l2;
// clipping scales all three, and coupled weight decay adds to the slope. A weight of zero
// adds -0, the one neutral element of addition, whatever p is: an option that is off leaves
// infinite parameters and negative zeros as they are.
template <class T>
struct ElasticNetGradient {
  T gain, at_positive, at_negative, at_zero, slope;

  REGFUSED_RULE ElasticNetGradient(double gain, double sign_weight, double slope)
      : gain(T(gain)),
        at_positive(sign_weight == 0 ? T(-0.0) : T(sign_weight)),
        at_negative(sign_weight == 0 ? T(-0.0) : T(-sign_weight)),
        at_zero(sign_weight == 0 ? T(-0.0) : T(0)),
        slope(T(slope)) {}

  template <class V>
  REGFUSED_RULE V operator()(V g, V p) const {
    V signs = p > 0 ? splat<V>(at_positive) : (p < 0 ? splat<V>(at_negative) : splat<V>(at_zero));
    V linear = slope == 0 ? splat<V>(T(-0.0)) : slope * p;
    return gain * g + signs + linear;
  }
};

// p -> clamp(concavity*p, -bound, bound): by what the gradient of the concave penalty is less than that of l1*|p|,
// where the bound is l1. Clipping scales both.
template <class T>
struct ConcavePart {
  T concavity, bound;

  REGFUSED_RULE ConcavePart(double concavity, double bound)
      : concavity(bound == 0 ? T(0) : T(concavity)), bound(concavity == 0 ? T(0) : T(bound)) {}

  REGFUSED_RULE explicit operator bool() const { return concavity != 0; }

  template <class V>
  REGFUSED_RULE V operator()(V p) const {
    p = concavity * p;
    return p > bound ? splat<V>(bound) : (p < -bound ? splat<V>(-bound) : p);  // a NaN stays
  }
};

// p -> sign(p)*max(|p| - threshold, 0) / (1 + growth): the proximal map of a step of length lr
// has threshold = lr*l1 and growth = 2*lr*l2. With both zero it returns p bit for bit.
//
// Branch-free: p - clamp(p, -threshold, threshold). The lower bound is 0 - threshold, so that a
// threshold of zero subtracts +0 from a parameter of -0 and keeps its sign.
template <class T>
struct ElasticNetProximal {
  T lower, upper, shrink;

  REGFUSED_RULE ElasticNetProximal(double threshold, double growth)
      : lower(T(0) - T(threshold)), upper(T(threshold)), shrink(T(1 / (1 + growth))) {}

  template <class V>
  REGFUSED_RULE V operator()(V p) const {
    V clamped = p > lower ? p : splat<V>(lower);
    clamped = clamped < upper ? clamped : splat<V>(upper);
    return (p - clamped) * shrink;
  }
};

// The same where each element has a step of its own length: threshold = length*l1 and growth = length*growth.
template <class T>
struct ElasticNetInMetric {
  T l1, growth;

  REGFUSED_RULE ElasticNetInMetric(double l1, double growth) : l1(T(l1)), growth(T(growth)) {}

  template <class V>
  REGFUSED_RULE V operator()(V p, V length) const {
    // A strength of zero does nothing, whatever the length.
    const V threshold = l1 == 0 ? V{} : l1 * length;
    const V lower = V{} - threshold;
    V clamped = p > lower ? p : lower;
    clamped = clamped < threshold ? clamped : threshold;
    p = p - clamped;
    return growth == 0 ? p : p / (T(1) + growth * length);
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
