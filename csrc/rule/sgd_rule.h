// SGD with momentum: what it makes of the direction d of one element.
//
//   b = d                                             first gradient of this parameter
//   b = momentum*b + (1 - dampening)*d                afterwards
//   u = d + momentum*b (nesterov) | b | d (no momentum)
//   m = lr*u,  e = lr
//
// Classical momentum moves lr from the last line into the second: b = momentum*b + lr*d, m = u.
#pragma once

#include "step_rule.h"

namespace regfused {

struct SgdHyper {
  double momentum = 0;
  double dampening = 0;
  bool nesterov = false;
  bool classical_momentum = false;
};

inline namespace REGFUSED_ISA {

template <class T>
struct SgdRule {
  // All elements have one length of step: lr.
  static constexpr bool kLengthOfElements = false;

  T momentum;
  T gain;   // of d: the learning rate under classical momentum
  T fresh;  // of d on its way into the momentum buffer
  T size;   // factor of u
  bool first, nesterov;

  REGFUSED_RULE SgdRule(const StepHyper& step, const StepTime& time) : SgdRule(step, step.own<SgdHyper>(), time) {}
  REGFUSED_RULE SgdRule(const StepHyper& step, const SgdHyper& h, const StepTime& time)
      : momentum(T(h.momentum)),
        gain(h.classical_momentum ? T(step.lr) : T(1)),
        fresh(h.classical_momentum ? T(1) : T(1 - h.dampening)),
        size(h.classical_momentum ? T(1) : T(step.lr)),
        first(time.t == 1),
        nesterov(h.nesterov) {}

  template <unsigned kSlots, class V>
  REGFUSED_RULE V move(V d, V* slots, V&) const {
    d = gain * d;
    V u = d;
    if constexpr (kSlots != 0) {
      V& momentum_buffer = slots[0];
      momentum_buffer = first ? d : momentum * momentum_buffer + fresh * d;
      u = nesterov ? d + momentum * momentum_buffer : momentum_buffer;
    }
    // With lr = 0 the parameter keeps its bits, whatever the gradient.
    return size == 0 ? splat<V>(T(0)) : size * u;
  }

  // --- The same without what a later step with lr > 0 does not need -----------------------------------

  static constexpr int kVariants = 2;  // 1: nesterov
  REGFUSED_RULE int variant() const { return nesterov ? 1 : 0; }
  REGFUSED_RULE static bool is_lean(const StepHyper& step, const StepTime& time) {
    const auto h = step.own<SgdHyper>();
    return !h.classical_momentum && (time.t != 1 || h.momentum == 0);
  }

  template <unsigned kSlots, int kVariant, class V>
  REGFUSED_RULE V lean_move(V d, V* slots) const {
    if constexpr (kSlots == 0) return size * d;
    slots[0] = momentum * slots[0] + fresh * d;
    if constexpr (kVariant == 1) return size * (d + momentum * slots[0]);
    return size * slots[0];
  }
};

// What the engine has to know of this rule.
struct Sgd {
  static constexpr const char* kName = "sgd";
  using Hyper = SgdHyper;
  template <class T>
  using Rule = SgdRule<T>;

  static constexpr OptionInfo kOptions[] = {
      {"momentum", OptionKind::strength, offsetof(SgdHyper, momentum)},
      {"dampening", OptionKind::finite, offsetof(SgdHyper, dampening)},
      {"nesterov", OptionKind::flag, offsetof(SgdHyper, nesterov)},
      {"classical_momentum", OptionKind::flag, offsetof(SgdHyper, classical_momentum)},
  };
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr bool kCountsSteps = false;
  static constexpr unsigned kSlotSets[] = {0b0, 0b1};  // that have kernels

  static unsigned slots_of(const Hyper& h) { return h.momentum != 0 ? 0b1 : 0b0; }
  // u in the long run, for d = 1.
  static double steady_gain(const Hyper& h) {
    if (h.momentum == 0) return 1;
    const double buffer = (h.classical_momentum ? 1 : 1 - h.dampening) / (1 - h.momentum);
    return h.nesterov && !h.classical_momentum ? 1 + h.momentum * buffer : buffer;
  }
  // Whether a proximal map has a length to go by.
  static constexpr const char* kDemand = "a proximal map and a group lasso demand momentum < 1 and dampening <= 1";
  static bool allows(const StepHyper& step, const Hyper& h) {
    return !step.has_map() || (h.momentum < 1 && h.dampening <= 1);
  }
  REGFUSED_RULE static StepTime at(const Hyper&, double t) { return {t, {}}; }
  REGFUSED_RULE static StepLength length(const Hyper&, const StepTime&, unsigned) { return {}; }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
