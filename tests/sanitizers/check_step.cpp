// The step by each rule, every dtype and size in one list, against the rule's own formula run element by element in
// double: what vectors, storage types, chunks and threads make of it.
#include <cstring>

#include "checks.h"
#include "step_drive.h"

namespace regfused {

namespace {

struct Case {
  std::string name;
  RuleId rule;
  StepHyper hyper;
  StepScalars scalars = {};
  double max_norm = INFINITY;

  unsigned slot_set() const { return info_of(rule).slots_of(hyper); }
};

struct Tensor {
  SliceLayout slices;
  Array param, grad;
  Array slots[kMostSlots];
  bool has_grad = true;
};
using Tensors = std::vector<Tensor>;

struct Step {
  Tensors tensors;
  double norm;
  double penalty;
};

template <class Hyper>
StepHyper with(StepHyper hyper, const Hyper& own) {
  hyper.set_own(own);
  return hyper;
}

std::vector<Case> cases() {
  const auto amp = [](NormType type, double scale, bool write) {
    StepScalars scalars;
    scalars.norm_type = type;
    scalars.grad_scale = scale;
    scalars.write_unscaled_grad = write;
    return scalars;
  };
  const AdamHyper adam, amsgrad = {.amsgrad = true}, decoupled = {.decoupled_proximal = true};
  const auto sgd = RuleId::sgd, by_adam = RuleId::adam;
  return {
      {"plain", sgd, {.lr = 0.1, .weight_decay = 0.1}},
      {"momentum", sgd, with({.lr = 0.1, .weight_decay = 0.1}, SgdHyper{.momentum = 0.9, .dampening = 0.3})},
      {"nesterov", sgd, with({.lr = 0.1}, SgdHyper{.momentum = 0.9, .nesterov = true})},
      {"elastic net in the clip",
       sgd,
       with({.lr = 0.1, .l1 = 0.2, .l2 = 0.1}, SgdHyper{.momentum = 0.9, .nesterov = true}),
       {},
       50},
      {"norm 1, amp", sgd, {.lr = 0.1, .l1 = 0.3, .maximize = true}, amp(NormType::one, 8, true), 1e5},
      {"norm inf, amp", sgd, with({.lr = 0.1, .l2 = 0.2}, SgdHyper{.momentum = 0.5}), amp(NormType::inf, 4, true), 0.5},
      {"proximal",
       sgd,
       {.lr = 0.1, .weight_decay = 0.2, .l1 = 3, .l2 = 0.5, .proximal = true, .decoupled_weight_decay = true}},
      {"classical, elastic net outside",
       sgd,
       with({.lr = 0.1, .l1 = 0.1, .l2 = 0.1, .penalty_in_clip = false},
            SgdHyper{.momentum = 0.8, .classical_momentum = true}),
       {},
       50},
      {"Adam", by_adam, with({.lr = 0.1}, adam)},
      {"AdamW, clip, amp", by_adam,
       with({.lr = 0.1, .weight_decay = 0.1, .maximize = true, .decoupled_weight_decay = true}, adam),
       amp(NormType::two, 8, true), 50},
      {"amsgrad, elastic net", by_adam, with({.lr = 0.1, .l1 = 0.2, .l2 = 0.1}, amsgrad), {}, 50},
      {"Adam, proximal", by_adam, with({.lr = 0.1, .l1 = 0.5, .l2 = 0.2, .proximal = true}, adam)},
      {"nonnegative, kept zeros",
       sgd,
       with({.lr = 0.1, .l1 = 0.3, .keep_zeros = true, .nonnegative = true}, SgdHyper{.momentum = 0.9}),
       {},
       50},
      {"kept zeros",
       sgd,
       with({.lr = 0.1, .weight_decay = 0.1, .keep_zeros = true}, SgdHyper{.momentum = 0.9}),
       {},
       50},
      {"concave l1", sgd, {.lr = 0.1, .l1 = 0.5, .concavity = 0.3}, {}, 50},
      {"proximal, concave l1", sgd, {.lr = 0.1, .l1 = 3, .l2 = 0.5, .concavity = 2, .proximal = true}},
      {"Adam, kept zeros", by_adam, with({.lr = 0.1, .weight_decay = 0.1, .keep_zeros = true}, adam), {}, 50},
      {"Adam, proximal, concave l1", by_adam,
       with({.lr = 0.1, .l1 = 0.5, .l2 = 0.2, .concavity = 1, .proximal = true, .nonnegative = true}, adam)},
      {"Adam, decoupled proximal", by_adam, with({.lr = 0.1, .l1 = 3, .l2 = 0.2, .proximal = true}, decoupled)},
  };
}

// t of a step after the first one: a rule that does not count says 2.
constexpr double kLaterT = 5;

// A rule that does not count reads nothing of what the slots hold at a first gradient; others read zeros.
Array fresh_slot(const Case& of, const Array& param) {
  Array slot(param.dtype(), param.numel());
  if (info_of(of.rule).counts_steps) std::memset(slot.data(), 0, param.numel() * size_of(param.dtype()));
  return slot;
}

Step run(const Case& of, const Tensors& from, bool first) {
  Step step{from, 0, 0};
  StepDriver driver;
  driver.rule = of.rule;
  driver.groups = {of.hyper};
  for (size_t t = 0; t < from.size(); ++t) {
    Tensor& tensor = step.tensors[t];
    StepRow row;
    row.param = tensor.param.data();
    row.grad = tensor.has_grad ? tensor.grad.data() : nullptr;
    row.slot_set = static_cast<uint8_t>(of.slot_set());
    for (int slot = 0; slot < kMostSlots; ++slot) {
      if ((row.slot_set >> slot & 1) == 0) continue;
      if (first) tensor.slots[slot] = fresh_slot(of, tensor.param);
      row.slots[slot] = tensor.slots[slot].data();
    }
    row.numel = tensor.param.numel();
    row.device = driver.index_of({});
    row.dtype = tensor.param.dtype();
    row.slices = tensor.slices;
    row.t = first ? 1 : kLaterT;
    driver.rows.push_back(row);
  }
  driver.cut();
  driver.find_live();
  driver.begin();
  StepScalars scalars = of.scalars;
  step.norm = norm_finish(scalars.norm_type, driver.norm(scalars));
  scalars.clip_coef = std::min(1.0, of.max_norm / (step.norm + 1e-6));
  driver.step(scalars);
  step.penalty = driver.penalty();
  return step;
}

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// The group lasso where each element has a step of its own length: the root of its equation, by bisection.
void shrink_in_metric(std::vector<double>& q, const SliceLayout& layout, const std::vector<double>& lengths,
                      double strength) {
  for (int64_t slice = 0; slice < layout.count; ++slice) {
    std::vector<int64_t> own;
    for (int64_t i = 0; i < layout.numel(); ++i)
      if (i / layout.inner % layout.count == slice) own.push_back(i);
    double squares = 0, radius = 0, dual = 0;
    for (const int64_t i : own) {
      squares += q[i] * q[i];
      dual += q[i] / lengths[i] * (q[i] / lengths[i]);
    }
    if (std::sqrt(dual) > strength) {
      double step = std::sqrt(squares);
      for (int bits = 0; bits < 60; ++bits, step /= 2) {
        double sum = 0;
        for (const int64_t i : own) {
          const double x = q[i] / (radius + step + strength * lengths[i]);
          sum += x * x;
        }
        if (sum > 1) radius += step;
      }
    }
    for (const int64_t i : own) q[i] *= radius / (radius + strength * lengths[i]);
  }
}

// What the step makes of one tensor, and g'.
struct ByFormula {
  std::vector<double> param, slots[kMostSlots], unscaled;

  ByFormula(const Case& of, const Tensor& from, const Tensor& now, double c, bool first)
      : param(from.param.values()), unscaled(from.grad.values()) {
    for (double& g : unscaled) g /= of.scalars.grad_scale;
    for (int slot = 0; slot < kMostSlots; ++slot) {
      if ((of.slot_set() >> slot & 1) == 0) continue;
      if (first)
        slots[slot].resize(param.size());
      else
        slots[slot] = from.slots[slot].values();
    }
    by_rule(of.rule, [&]<class R>() {
      if (of.slot_set() == R::kSlotSets[1])
        step<R, R::kSlotSets[1]>(of.hyper, c, first);
      else
        step<R, R::kSlotSets[0]>(of.hyper, c, first);
    });
    const StepHyper& h = of.hyper;
    if (h.group_l1 > 0 && of.rule == RuleId::adam && !h.own<AdamHyper>().decoupled_proximal) {
      const AdamHyper adam = h.own<AdamHyper>();
      // As they were stored.
      std::vector<double> lengths = now.slots[adam.amsgrad ? 2 : 1].values();
      for (double& e : lengths) {
        e = h.lr / (std::sqrt(e / (1 - std::pow(adam.betas[1], first ? 1 : kLaterT))) + adam.eps);
        if (h.proximal) e /= 1 + 2 * h.l2 * e;
      }
      shrink_in_metric(param, from.slices, lengths, h.group_l1);
      return;
    }
    const double threshold = h.group_threshold();
    if (threshold > 0)
      scale_slices(param, from.slices, [&](double norm) { return norm <= threshold ? 0 : 1 - threshold / norm; });
  }

  template <class R, unsigned kSlots>
  void step(const StepHyper& hyper, double c, bool first) {
    const StepTime time = R::at(hyper.own<typename R::Hyper>(), first ? 1 : kLaterT);
    const StepElement<double, R::template Rule> element(hyper, c, time);
    const StepGradient<double> gradient(hyper, 1);
    for (size_t i = 0; i < param.size(); ++i) {
      double of_slots[kMostSlots] = {};
      for (int slot = 0; slot < kMostSlots; ++slot)
        if ((kSlots >> slot & 1) != 0) of_slots[slot] = slots[slot][i];
      element.template operator()<kSlots, true>(param[i], gradient(unscaled[i]), of_slots);
      for (int slot = 0; slot < kMostSlots; ++slot)
        if ((kSlots >> slot & 1) != 0) slots[slot][i] = of_slots[slot];
    }
  }
};

double norm_by_formula(const Case& of, const Tensors& tensors) {
  const StepHyper& h = of.hyper;
  double sum = 0, largest = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].has_grad) continue;
    for (int64_t i = 0; i < tensors[t].param.numel(); ++i) {
      const double p = tensors[t].param[i];
      double x = tensors[t].grad[i] / of.scalars.grad_scale * (h.maximize ? -1 : 1);
      if (h.penalty_in_clip && !h.proximal)
        x += std::max(h.l1 - h.concavity * std::abs(p), 0.0) * sign(p) + 2 * h.l2 * p;
      if (h.keep_zeros && p == 0) x = 0;
      sum += of.scalars.norm_type == NormType::one ? std::abs(x) : x * x;
      largest = std::max(largest, std::abs(x));
    }
  }
  const NormType type = of.scalars.norm_type;
  return type == NormType::one ? sum : type == NormType::two ? std::sqrt(sum) : largest;
}

void check_penalty(const Case& of, const Tensors& from, const Step& step) {
  double want = 0;
  for (const Tensor& tensor : from)
    if (tensor.has_grad)
      for (const double p : tensor.param.values()) {
        const double flat = of.hyper.concavity == 0 ? std::abs(p) : of.hyper.l1 / of.hyper.concavity;
        const double bent = std::min(std::abs(p), flat);
        want += of.hyper.l1 * bent - of.hyper.concavity / 2 * bent * bent + of.hyper.l2 * p * p;
      }
  expect_near(step.penalty, want, of.name + ": penalty");
}

void check_step(const Case& of, const Tensors& from, const Step& step, bool first) {
  expect_near(step.norm, norm_by_formula(of, from), of.name + ": norm");
  check_penalty(of, from, step);
  const double c = std::min(1.0, of.max_norm / (step.norm + 1e-6));
  const double scale = 16;
  for (size_t t = 0; t < from.size(); ++t) {
    const std::string what = of.name + (first ? ", first gradient, tensor " : ", tensor ") + std::to_string(t);
    const Tensor &old = from[t], &now = step.tensors[t];
    if (!old.has_grad) {
      expect(now.param == old.param && now.grad == old.grad, what + ", without a gradient");
      continue;
    }
    const ByFormula want(of, old, now, c, first);
    // The group lasso looks at parameters that were rounded once.
    expect_near(now.param, want.param, scale, what + ", param", of.hyper.group_l1 != 0 ? 2 : 1);
    for (int slot = 0; slot < kMostSlots; ++slot)
      if (!want.slots[slot].empty())
        expect_near(now.slots[slot], want.slots[slot], scale, what + ", " + info_of(of.rule).slots[slot]);
    if (of.scalars.write_unscaled_grad)
      expect_near(now.grad, want.unscaled, scale, what + ", grad");
    else
      expect(now.grad == old.grad, what + ": the gradient was written");
  }
}

void check(const Case& of, Tensors tensors) {
  for (const bool first : {true, false}) {
    const auto [one, four] = on_one_and_on_four([&] { return run(of, tensors, first); });
    for (size_t t = 0; t < tensors.size(); ++t) {
      const Tensor &a = one.tensors[t], &b = four.tensors[t];
      bool same = a.param == b.param && a.grad == b.grad;
      for (int slot = 0; slot < kMostSlots; ++slot)
        if (tensors[t].has_grad && (of.slot_set() >> slot & 1) != 0) same &= a.slots[slot] == b.slots[slot];
      expect(same, of.name + ": other bits on four threads, tensor " + std::to_string(t));
    }
    expect(one.norm == four.norm && one.penalty == four.penalty, of.name + ": other sums on four threads");
    check_step(of, tensors, one, first);
    for (size_t t = 0; t < tensors.size(); ++t) {
      Tensor now = one.tensors[t];
      now.grad = gradients(now.grad.dtype(), now.grad.numel(), -1 - static_cast<int64_t>(t));
      tensors[t] = std::move(now);
    }
  }
}

Tensor make(DType dtype, const SliceLayout& layout, int64_t salt) {
  const Array slot(dtype, layout.numel());
  return {
      layout, parameters(dtype, layout.numel(), salt), gradients(dtype, layout.numel(), salt + 1), {slot, slot, slot}};
}

Tensors with_one_passed_by(Tensors tensors) {
  tensors.push_back(make(DType::float32, {1, 5, 20}, 1000));
  tensors.back().has_grad = false;
  return tensors;
}

Tensors of_all_kinds() {
  Tensors tensors;
  for (const Kind& kind : kinds_of_arrays())
    tensors.push_back(make(kind.dtype, {1, 1, kind.numel}, static_cast<int64_t>(2 * tensors.size())));
  return with_one_passed_by(std::move(tensors));
}

Tensors with_slices(const std::vector<SliceLayout>& layouts) {
  Tensors tensors;
  for (const SliceLayout& layout : layouts)
    for (const DType dtype : kDTypes) tensors.push_back(make(dtype, layout, static_cast<int64_t>(2 * tensors.size())));
  return with_one_passed_by(std::move(tensors));
}

}  // namespace

void check_step() {
  for (const Case& of : cases()) check(of, of_all_kinds());
  const StepHyper hyper = {.lr = 0.1, .l1 = 0.5, .group_l1 = 80, .proximal = true};
  const Case lasso = {"group lasso, whole slices", RuleId::sgd, with(hyper, SgdHyper{.momentum = 0.9}), {}, 50};
  check(lasso, with_slices(kWholeSlices));
  check({"group lasso, other slices", lasso.rule, lasso.hyper, {}, 50}, with_slices(kOtherSlices));
  const Case in_metric = {"Adam, group lasso",
                          RuleId::adam,
                          with({.lr = 0.1, .l1 = 0.5, .l2 = 0.2, .group_l1 = 80, .proximal = true}, AdamHyper{}),
                          {},
                          50};
  check(in_metric, with_slices(kWholeSlices));
  check(
      {"Adam, group lasso, other slices", RuleId::adam, with({.lr = 0.1, .group_l1 = 80}, AdamHyper{.amsgrad = true})},
      with_slices(kOtherSlices));
}

}  // namespace regfused
