// What every step does to one element, whatever the optimizer's rule is.
//
//   g' = g / grad_scale, negated under maximize
//   h  = g' + l1*sign(p) + 2*l2*p                      what the norm is taken of; keep_zeros: 0 where p = 0
//   d  = c*h + weight_decay*p                          c: the clip coefficient; keep_zeros: 0 where p = 0
//   d  = d - clamp(concavity*p, -l1, l1)               this one is in h where l1*sign(p) is: see penalty_rule.h
//   m, e = rule(d, slots, t)                           the rule's move, and the length of its step for this element
//   p  = p*(1 - lr*weight_decay)                       decoupled weight decay only
//   p  = p - m
//   p  = sign(p)*max(|p| - k*e*l1, 0) / (1 + 2*k*e*l2) proximal only
//   p  = max(p, 0)                                     nonnegative only
//   p  = what it was, where that is 0                  keep_zeros only
//   w  = group_prox(w, e', k*group_l1)                 each slice w of p, once it is stored: see slice_rule.h
//
// An option that is off is a neutral number here, never a code path, with two exceptions. LeanElement is the same step
// without signs and without a proximal map, for the steps that need neither. And what few steps need (kMore) costs the
// others no register.
#pragma once

#include <cstring>

#include "norm_rule.h"
#include "option.h"
#include "penalty_rule.h"
#include "portable.h"
#include "slice_rule.h"

namespace regfused {

// Room for a rule's hyperparameters.
constexpr size_t kRuleBytes = 32;

// How the length of each element's step is made again after the step: e = lr / (sqrt(v)*root + eps).
struct StepLength {
  int slot = -1;  // v; -1: e = lr
  double root = 0;
  double eps = 0;
};

// One parameter group's hyperparameters, as the user wrote them. Doubles: products such as lr*l1 are formed in double
// and rounded once, to the type of arithmetic.
struct StepHyper {
  double lr = 1e-3;
  double weight_decay = 0;
  double l1 = 0;
  double l2 = 0;
  double concavity = 0;
  double group_l1 = 0;
  // k: what the rule makes, in the long run, of a direction that stays the same. Made of the rule's own
  // hyperparameters.
  double steady_gain = 1;
  bool maximize = false;
  bool proximal = false;
  bool penalty_in_clip = true;
  bool decoupled_weight_decay = false;
  bool keep_zeros = false;
  bool nonnegative = false;
  alignas(8) unsigned char of_rule[kRuleBytes] = {};

  template <class Hyper>
  REGFUSED_RULE Hyper own() const {
    static_assert(sizeof(Hyper) <= kRuleBytes);
    Hyper hyper;
    memcpy(&hyper, of_rule, sizeof hyper);
    return hyper;
  }
  template <class Hyper>
  void set_own(const Hyper& hyper) {
    static_assert(sizeof(Hyper) <= kRuleBytes);
    memcpy(of_rule, &hyper, sizeof hyper);
  }

  REGFUSED_RULE bool has_penalty() const { return l1 != 0 || l2 != 0; }
  REGFUSED_RULE bool penalty_in_norm() const { return penalty_in_clip && !proximal && has_penalty(); }
  // Whether the norm reads the parameters beside the gradients.
  REGFUSED_RULE bool norm_reads_param() const { return penalty_in_norm() || keep_zeros; }
  REGFUSED_RULE bool has_map() const { return (proximal && has_penalty()) || group_l1 != 0; }

  // k*e'*group_l1 where e' is the length of every element's step, after the map of elements.
  REGFUSED_RULE SliceBound group_bound() const { return {steady_gain * group_l1, proximal ? 2 * steady_gain * l2 : 0}; }
  REGFUSED_RULE double group_threshold() const { return group_bound().at(lr); }
  // The same where e differs: 1/e' = 1/e + growth, so D = (sqrt(v)*root + eps + lr*growth) / (lr*per_length).
  REGFUSED_RULE double metric_threshold() const { return lr * group_bound().per_length; }
  REGFUSED_RULE SliceMetric metric(const StepLength& length, const void* v) const {
    return {v, length.root, length.eps + lr * group_bound().growth};
  }
};

// In every group, under the names that Python has. `lr` may also be a tensor.
inline constexpr OptionInfo kStepOptions[] = {
    {"lr", OptionKind::strength, offsetof(StepHyper, lr)},
    {"weight_decay", OptionKind::strength, offsetof(StepHyper, weight_decay)},
    {"l1", OptionKind::strength, offsetof(StepHyper, l1)},
    {"l2", OptionKind::strength, offsetof(StepHyper, l2)},
    {"concavity", OptionKind::strength, offsetof(StepHyper, concavity)},
    {"group_l1", OptionKind::strength, offsetof(StepHyper, group_l1)},
    {"maximize", OptionKind::flag, offsetof(StepHyper, maximize)},
    {"proximal", OptionKind::flag, offsetof(StepHyper, proximal)},
    {"penalty_in_clip", OptionKind::flag, offsetof(StepHyper, penalty_in_clip)},
    {"decoupled_weight_decay", OptionKind::flag, offsetof(StepHyper, decoupled_weight_decay)},
    {"keep_zeros", OptionKind::flag, offsetof(StepHyper, keep_zeros)},
    {"nonnegative", OptionKind::flag, offsetof(StepHyper, nonnegative)},
};

// When a parameter is stepped: t = 1 at its first gradient; a rule that counts no steps only knows 1 and later.
struct StepTime {
  double t = 1;
  double powers[2] = {};  // what the rule makes of t, once for all elements: see its at()
};

inline namespace REGFUSED_ISA {

// `value`, but `at_zero` where p is 0.
template <class V>
REGFUSED_RULE V unless_zero(V p, V value, V at_zero) {
  return p == 0 ? at_zero : value;
}

// g -> g': the gradient of what is minimized, unscaled. The scale is applied as a factor, as
// torch.amp.GradScaler.unscale_ does; exact for powers of two.
template <class T>
struct StepGradient {
  T factor, sign;

  REGFUSED_RULE StepGradient(const StepHyper& hyper, double grad_scale)
      : factor(T(1 / grad_scale)), sign(hyper.maximize ? T(-1) : T(1)) {}

  template <class V>
  REGFUSED_RULE V unscaled(V g) const {
    return g * factor;
  }
  template <class V>
  REGFUSED_RULE V operator()(V g) const {
    return sign * unscaled(g);
  }
};

// g', p -> h: what the norm is taken of.
template <class T>
struct StepNormGradient {
  ElasticNetGradient<T> gradient;
  ConcavePart<T> concave;
  bool keeps_zeros;

  REGFUSED_RULE explicit StepNormGradient(const StepHyper& hyper)
      : gradient(1, hyper.penalty_in_norm() ? hyper.l1 : 0, hyper.penalty_in_norm() ? 2 * hyper.l2 : 0),
        concave(hyper.concavity, hyper.penalty_in_norm() ? hyper.l1 : 0),
        keeps_zeros(hyper.keep_zeros) {}

  template <class V>
  REGFUSED_RULE V operator()(V g, V p) const {
    V h = gradient(g, p);
    if (concave) h = h - concave(p);
    return keeps_zeros ? unless_zero(p, h, V{}) : h;
  }
};

REGFUSED_RULE double coupled_decay(const StepHyper& h) { return h.decoupled_weight_decay ? 0 : h.weight_decay; }
REGFUSED_RULE double kept_by_decay(const StepHyper& h) {
  return h.decoupled_weight_decay ? 1 - h.lr * h.weight_decay : 1;
}

// g', p, slots -> p, slots: the update by the rule R. kSlots: which slots there are; others are neither read nor
// written. kMore: the member `more`.
template <class T, template <class> class R>
struct StepElement {
  ElasticNetGradient<T> direction;  // g', p -> d
  R<T> rule;
  ElasticNetProximal<T> proximal;   // where all elements have one length of step
  ElasticNetInMetric<T> in_metric;  // where each has its own
  T keep;                           // factor of the old parameter
  bool maps;
  bool more;  // whether the step does one of the following
  bool keeps_zeros, nonnegative;
  ConcavePart<T> concave;

  REGFUSED_RULE StepElement(const StepHyper& h, double clip_coef, const StepTime& time)
      : direction(clip_coef, penalty_gain(h, clip_coef) * h.l1,
                  penalty_gain(h, clip_coef) * 2 * h.l2 + coupled_decay(h)),
        rule(h, time),
        proximal(h.proximal ? h.steady_gain * h.lr * h.l1 : 0, h.proximal ? 2 * h.steady_gain * h.lr * h.l2 : 0),
        in_metric(h.steady_gain * h.l1, 2 * h.steady_gain * h.l2),
        keep(T(kept_by_decay(h))),
        maps(h.proximal && h.has_penalty()),
        keeps_zeros(h.keep_zeros),
        nonnegative(h.nonnegative && h.lr != 0),
        // Beside a proximal map it is a part of the loss that is not clipped.
        concave((h.proximal ? 1 : penalty_gain(h, clip_coef)) * h.concavity,
                (h.proximal ? 1 : penalty_gain(h, clip_coef)) * h.l1) {
    more = keeps_zeros || nonnegative || (h.concavity != 0 && h.l1 != 0);
  }

  template <unsigned kSlots, bool kMore, class V>
  REGFUSED_RULE void operator()(V& param, V grad, V* slots) const {
    const V old = param;
    V d = direction(grad, param), length;
    if constexpr (kMore) {
      if (concave) d = d - concave(old);
      if (keeps_zeros) d = unless_zero(old, d, V{});
    }
    const V move = rule.template move<kSlots>(d, slots, length);
    param = keep * param - move;
    if constexpr (R<T>::kLengthOfElements)
      param = maps ? in_metric(param, length) : param;
    else
      param = proximal(param);
    if constexpr (kMore) {
      if (nonnegative) param = param < 0 ? V{} : param;
      if (keeps_zeros) param = unless_zero(old, param, old);
    }
  }

 private:
  REGFUSED_RULE static double penalty_gain(const StepHyper& h, double clip_coef) {
    return h.proximal ? 0 : h.penalty_in_clip ? clip_coef : 1;
  }
};

// The same for a step that has no strength of a penalty, moves, and that the rule allows: see is_lean. kSlope: whether
// there is coupled weight decay. kKeepsZeros: whether zeros stay. kVariant: the rule's own, see its variant().
template <class T, template <class> class R>
struct LeanElement {
  R<T> rule;
  T gain;   // of the gradient as it is in memory: scale, sign and clip
  T slope;  // of the parameter
  T keep;

  REGFUSED_RULE LeanElement(const StepHyper& h, double grad_scale, double clip_coef, const StepTime& time)
      : rule(h, time),
        gain(T((h.maximize ? -1 : 1) * clip_coef / grad_scale)),
        slope(T(coupled_decay(h))),
        keep(T(kept_by_decay(h))) {}

  template <unsigned kSlots, int kVariant, bool kSlope, bool kKeepsZeros, class V>
  REGFUSED_RULE void operator()(V& param, V grad, V* slots) const {
    const V old = param;
    V d = gain * grad;
    if constexpr (kSlope) d = d + slope * param;
    if constexpr (kKeepsZeros) d = unless_zero(old, d, V{});
    param = keep * param - rule.template lean_move<kSlots, kVariant>(d, slots);
    if constexpr (kKeepsZeros) param = unless_zero(old, param, old);
  }
};

template <template <class> class R>
REGFUSED_RULE bool is_lean(const StepHyper& h, const StepTime& time) {
  return !h.has_penalty() && !h.nonnegative && h.lr != 0 && R<double>::is_lean(h, time);
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
