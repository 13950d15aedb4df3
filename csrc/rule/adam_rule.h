// Adam (Kingma and Ba 2015; amsgrad: Reddi, Kale, Kumar 2018): what it makes of the direction d of one element.
//
//   exp_avg        = beta1*exp_avg + (1 - beta1)*d
//   exp_avg_sq     = beta2*exp_avg_sq + (1 - beta2)*d^2
//   max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)   amsgrad only; v is this one then, otherwise exp_avg_sq
//   e = lr / (sqrt(v / (1 - beta2^t)) + eps)
//   m = e * exp_avg / (1 - beta1^t)
#pragma once

#include "step_rule.h"

namespace regfused {

struct AdamHyper {
  double betas[2] = {0.9, 0.999};
  double eps = 1e-8;
  bool amsgrad = false;
  bool decoupled_proximal = false;  // the proximal maps take lr as the length of each element's step
};

inline namespace REGFUSED_ISA {

template <class T>
struct AdamRule {
  // Each element has a length of step of its own.
  static constexpr bool kLengthOfElements = true;

  T beta1, rest1, beta2, rest2;
  T root;  // factor of the root of v
  T eps;
  T size;  // factor of exp_avg in the move
  T lr;
  bool decoupled_proximal;

  REGFUSED_RULE AdamRule(const StepHyper& step, const StepTime& time) : AdamRule(step, step.own<AdamHyper>(), time) {}
  REGFUSED_RULE AdamRule(const StepHyper& step, const AdamHyper& h, const StepTime& time)
      : beta1(T(h.betas[0])),
        rest1(T(1 - h.betas[0])),
        beta2(T(h.betas[1])),
        rest2(T(1 - h.betas[1])),
        root(T(1 / sqrt(1 - time.powers[1]))),
        eps(T(h.eps)),
        size(T(step.lr / (1 - time.powers[0]))),
        lr(T(step.lr)),
        decoupled_proximal(h.decoupled_proximal) {}

  template <unsigned kSlots, class V>
  REGFUSED_RULE V move(V d, V* slots, V& length) const {
    const V inverse = inverse_root<kSlots>(d, slots);
    // With lr = 0 the parameter keeps its bits, whatever the gradient.
    length = decoupled_proximal || lr == 0 ? splat<V>(lr) : lr * inverse;
    return size == 0 ? splat<V>(T(0)) : size * (slots[0] * inverse);
  }

  static constexpr int kVariants = 1;
  REGFUSED_RULE int variant() const { return 0; }
  REGFUSED_RULE static bool is_lean(const StepHyper&, const StepTime&) { return true; }

  template <unsigned kSlots, int kVariant, class V>
  REGFUSED_RULE V lean_move(V d, V* slots) const {
    const V inverse = inverse_root<kSlots>(d, slots);
    return size * (slots[0] * inverse);
  }

 private:
  // The new moments, and 1 / (sqrt(v / (1 - beta2^t)) + eps).
  template <unsigned kSlots, class V>
  REGFUSED_RULE V inverse_root(V d, V* slots) const {
    V &exp_avg = slots[0], &exp_avg_sq = slots[1];
    exp_avg = beta1 * exp_avg + rest1 * d;
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (d * d);
    V v = exp_avg_sq;
    if constexpr ((kSlots & 0b100) != 0) {
      V& largest = slots[2];
      largest = ((largest > v) | (largest != largest)) ? largest : v;  // a NaN stays
      v = largest;
    }
    return T(1) / (square_root(v) * root + eps);
  }
};

// What the engine has to know of this rule.
struct Adam {
  static constexpr const char* kName = "adam";
  using Hyper = AdamHyper;
  template <class T>
  using Rule = AdamRule<T>;

  static constexpr OptionInfo kOptions[] = {
      {"betas", OptionKind::fractions, offsetof(AdamHyper, betas)},
      {"eps", OptionKind::strength, offsetof(AdamHyper, eps)},
      {"amsgrad", OptionKind::flag, offsetof(AdamHyper, amsgrad)},
      {"decoupled_proximal", OptionKind::flag, offsetof(AdamHyper, decoupled_proximal)},
  };
  static constexpr const char* kSlots[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kCountsSteps = true;
  static constexpr unsigned kSlotSets[] = {0b011, 0b111};  // that have kernels

  static unsigned slots_of(const Hyper& h) { return h.amsgrad ? 0b111 : 0b011; }
  static double steady_gain(const Hyper&) { return 1; }
  static constexpr const char* kDemand = "";
  static bool allows(const StepHyper&, const Hyper&) { return true; }
  REGFUSED_RULE static StepTime at(const Hyper& h, double t) { return {t, {pow(h.betas[0], t), pow(h.betas[1], t)}}; }
  REGFUSED_RULE static StepLength length(const Hyper& h, const StepTime& time, unsigned slot_set) {
    if (h.decoupled_proximal) return {};
    return {(slot_set & 0b100) != 0 ? 2 : 1, 1 / sqrt(1 - time.powers[1]), h.eps};
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
