// The formula of one SGD step, for one element.
//
//   g' = g / grad_scale, negated under maximize
//   h  = g' + l1*sign(p) + 2*l2*p                      what the norm is taken of
//   d  = c*h + weight_decay*p                          c: the clip coefficient
//   b  = d                                             first gradient of this parameter
//   b  = momentum*b + (1 - dampening)*d                afterwards
//   u  = d + momentum*b (nesterov) | b | d (no momentum)
//   p  = p - lr*u
//   w  = w * max(1 - lr*group_l1/||w||, 0)             each slice w of p, once it is stored: see slice_rule.h
//
// An option that is off is a neutral number here, never a code path: penalty_in_clip = false
// takes the penalty out of c, decoupled weight decay moves into the factor of p, classical
// momentum moves lr from the last line into the fourth, and without proximal steps the
// proximal map is the identity.
#pragma once

#include "norm_rule.h"
#include "penalty_rule.h"
#include "portable.h"

namespace regfused {

// One parameter group's hyperparameters, as the user wrote them. Doubles: products such as
// lr*l1 are formed in double and rounded once, to the type of arithmetic.
struct SgdHyper {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double l1 = 0;
  double l2 = 0;
  double group_l1 = 0;
  bool nesterov = false;
  bool maximize = false;
  bool proximal = false;
  bool penalty_in_clip = true;
  bool decoupled_weight_decay = false;
  bool classical_momentum = false;

  // Whether the norm reads the parameters beside the gradients.
  REGFUSED_RULE bool penalty_in_norm() const { return penalty_in_clip && !proximal && (l1 != 0 || l2 != 0); }
};

inline namespace REGFUSED_ISA {

// g -> g': the gradient of what is minimized, unscaled. The scale is applied as a factor, as
// torch.amp.GradScaler.unscale_ does; exact for powers of two.
template <class T>
struct StepGradient {
  T factor, sign;

  REGFUSED_RULE StepGradient(const SgdHyper& hyper, double grad_scale)
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
struct StepNormGradient : ElasticNetGradient<T> {
  REGFUSED_RULE explicit StepNormGradient(const SgdHyper& hyper)
      : ElasticNetGradient<T>(1, hyper.penalty_in_norm() ? hyper.l1 : 0, hyper.penalty_in_norm() ? 2 * hyper.l2 : 0) {}
};

// g', p, b -> p, b: the update. kMomentum = false reads and writes no momentum buffer.
template <class T>
struct SgdRule {
  ElasticNetGradient<T> direction;  // g', p -> d
  ElasticNetProximal<T> proximal;
  T momentum;
  T gain;   // of d: the learning rate under classical momentum
  T fresh;  // of d on its way into the momentum buffer
  T keep;   // factor of the old parameter
  T step;   // factor of u, negative
  bool first, nesterov;

  REGFUSED_RULE SgdRule(const SgdHyper& h, double clip_coef, bool first)
      : direction(clip_coef, penalty_gain(h, clip_coef) * h.l1,
                  penalty_gain(h, clip_coef) * 2 * h.l2 + (h.decoupled_weight_decay ? 0 : h.weight_decay)),
        proximal(h.proximal ? h.lr * h.l1 : 0, h.proximal ? 2 * h.lr * h.l2 : 0),
        momentum(T(h.momentum)),
        gain(h.classical_momentum ? T(h.lr) : T(1)),
        fresh(h.classical_momentum ? T(1) : T(1 - h.dampening)),
        keep(h.decoupled_weight_decay ? T(1 - h.lr * h.weight_decay) : T(1)),
        step(h.classical_momentum ? T(-1) : T(-h.lr)),
        first(first),
        nesterov(h.nesterov) {}

  template <bool kMomentum, class V>
  REGFUSED_RULE void operator()(V& param, V grad, V& momentum_buffer) const {
    V d = gain * direction(grad, param);
    V u = d;
    if (kMomentum) {
      momentum_buffer = first ? d : momentum * momentum_buffer + fresh * d;
      u = nesterov ? d + momentum * momentum_buffer : momentum_buffer;
    }
    // With lr = 0 the parameter keeps its bits, whatever the gradient.
    V move = step == 0 ? splat<V>(T(-0.0)) : step * u;
    param = proximal(keep * param + move);
  }

 private:
  REGFUSED_RULE static double penalty_gain(const SgdHyper& h, double clip_coef) {
    return h.proximal ? 0 : h.penalty_in_clip ? clip_coef : 1;
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
