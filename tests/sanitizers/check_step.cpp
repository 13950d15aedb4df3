// The SGD step, every dtype and size in one list, against its formula in double.
#include "checks.h"
#include "step_drive.h"

namespace regfused {

namespace {

struct Case {
  std::string name;
  SgdHyper hyper;
  StepScalars scalars = {};
  bool momentum = false;
  double max_norm = INFINITY;
};

struct Tensor {
  SliceLayout slices;
  Array param, grad, buffer;
  bool has_grad = true;
};
using Tensors = std::vector<Tensor>;

struct Step {
  Tensors tensors;
  double norm;
  StepTotals totals;
};

std::vector<Case> cases() {
  const auto amp = [](NormType type, double scale, bool write) {
    StepScalars scalars;
    scalars.norm_type = type;
    scalars.grad_scale = scale;
    scalars.write_unscaled_grad = write;
    return scalars;
  };
  return {
      {"plain", {.lr = 0.1, .weight_decay = 0.1}},
      {"momentum", {.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.1}, {}, true},
      {"elastic net in the clip", {.lr = 0.1, .momentum = 0.9, .l1 = 0.2, .l2 = 0.1, .nesterov = true}, {}, true, 50},
      {"norm 1, amp", {.lr = 0.1, .l1 = 0.3, .maximize = true}, amp(NormType::one, 8, true), false, 1e5},
      {"norm inf, amp", {.lr = 0.1, .momentum = 0.5, .l2 = 0.2}, amp(NormType::inf, 4, true), true, 0.5},
      {"proximal",
       {.lr = 0.1, .weight_decay = 0.2, .l1 = 3, .l2 = 0.5, .proximal = true, .decoupled_weight_decay = true}},
      {"classical, elastic net outside",
       {.lr = 0.1, .momentum = 0.8, .l1 = 0.1, .l2 = 0.1, .penalty_in_clip = false, .classical_momentum = true},
       {},
       true,
       50},
  };
}

Step run(const Case& of, const Tensors& from, bool first) {
  Step step{from, 0, {}};
  StepDriver driver;
  driver.groups = {of.hyper};
  for (size_t t = 0; t < from.size(); ++t) {
    Tensor& tensor = step.tensors[t];
    if (first) tensor.buffer = Array(tensor.param.dtype(), tensor.param.numel());
    StepRow row;
    row.param = tensor.param.data();
    row.grad = tensor.has_grad ? tensor.grad.data() : nullptr;
    row.momentum_buffer = of.momentum ? tensor.buffer.data() : nullptr;
    row.numel = tensor.param.numel();
    row.device = driver.index_of({});
    row.dtype = tensor.param.dtype();
    row.slices = tensor.slices;
    row.first = first;
    driver.tensors.push_back(row);
  }
  driver.cut();
  driver.find_live();
  driver.begin();
  StepScalars scalars = of.scalars;
  step.norm = norm_finish(scalars.norm_type, driver.norm(scalars));
  scalars.clip_coef = std::min(1.0, of.max_norm / (step.norm + 1e-6));
  driver.step(scalars);
  step.totals = driver.totals();
  return step;
}

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// What the step makes of one tensor, and g'.
struct ByFormula {
  std::vector<double> param, buffer, unscaled;

  ByFormula(const Case& of, const Tensor& from, double c, bool first)
      : param(from.param.values()), unscaled(from.grad.values()) {
    const SgdHyper& h = of.hyper;
    if (of.momentum && !first) buffer = from.buffer.values();
    if (of.momentum && first) buffer.resize(param.size());
    for (size_t i = 0; i < param.size(); ++i) {
      const double p = param[i], g = (unscaled[i] /= of.scalars.grad_scale) * (h.maximize ? -1 : 1);
      const double penalty = h.proximal ? 0 : h.l1 * sign(p) + 2 * h.l2 * p;
      double d = h.penalty_in_clip ? c * (g + penalty) : c * g + penalty;
      if (!h.decoupled_weight_decay) d += h.weight_decay * p;
      if (h.classical_momentum) d *= h.lr;
      double u = d;
      if (of.momentum) {
        double& b = buffer[i];
        b = first ? d : h.momentum * b + (h.classical_momentum ? 1 : 1 - h.dampening) * d;
        u = h.nesterov ? d + h.momentum * b : b;
      }
      param[i] = (h.decoupled_weight_decay ? 1 - h.lr * h.weight_decay : 1) * p - (h.classical_momentum ? u : h.lr * u);
      if (h.proximal)
        param[i] = sign(param[i]) * std::max(std::abs(param[i]) - h.lr * h.l1, 0.0) / (1 + 2 * h.lr * h.l2);
    }
    const double threshold = h.lr * h.group_l1;
    if (threshold > 0)
      scale_slices(param, from.slices, [&](double norm) { return norm <= threshold ? 0 : 1 - threshold / norm; });
  }
};

double norm_by_formula(const Case& of, const Tensors& tensors) {
  const SgdHyper& h = of.hyper;
  double sum = 0, largest = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].has_grad) continue;
    for (int64_t i = 0; i < tensors[t].param.numel(); ++i) {
      const double p = tensors[t].param[i];
      double x = tensors[t].grad[i] / of.scalars.grad_scale * (h.maximize ? -1 : 1);
      if (h.penalty_in_clip && !h.proximal) x += h.l1 * sign(p) + 2 * h.l2 * p;
      sum += of.scalars.norm_type == NormType::one ? std::abs(x) : x * x;
      largest = std::max(largest, std::abs(x));
    }
  }
  const NormType type = of.scalars.norm_type;
  return type == NormType::one ? sum : type == NormType::two ? std::sqrt(sum) : largest;
}

void check_totals(const Case& of, const Tensors& from, const Step& step) {
  StepTotals want;
  for (size_t t = 0; t < from.size(); ++t) {
    if (!from[t].has_grad) continue;
    want.numel += static_cast<double>(from[t].param.numel());
    want.zeros += static_cast<double>(zeros_in(step.tensors[t].param));
    for (const double p : from[t].param.values()) want.penalty += of.hyper.l1 * std::abs(p) + of.hyper.l2 * p * p;
  }
  expect_near(step.totals.penalty, want.penalty, of.name + ": penalty");
  expect(step.totals.zeros == want.zeros, of.name + ": zeros");
  expect(step.totals.numel == want.numel, of.name + ": numel");
}

void check_step(const Case& of, const Tensors& from, const Step& step, bool first) {
  expect_near(step.norm, norm_by_formula(of, from), of.name + ": norm");
  check_totals(of, from, step);
  const double c = std::min(1.0, of.max_norm / (step.norm + 1e-6));
  const double scale = 16;
  for (size_t t = 0; t < from.size(); ++t) {
    const std::string what = of.name + (first ? ", first gradient, tensor " : ", tensor ") + std::to_string(t);
    const Tensor &old = from[t], &now = step.tensors[t];
    if (!old.has_grad) {
      expect(now.param == old.param && now.grad == old.grad, what + ", without a gradient");
      continue;
    }
    const ByFormula want(of, old, c, first);
    // The group lasso looks at parameters that were rounded once.
    expect_near(now.param, want.param, scale, what + ", param", of.hyper.group_l1 != 0 ? 2 : 1);
    if (of.momentum) expect_near(now.buffer, want.buffer, scale, what + ", momentum_buffer");
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
      const bool stepped = of.momentum && tensors[t].has_grad;
      expect(a.param == b.param && a.grad == b.grad && (!stepped || a.buffer == b.buffer),
             of.name + ": other bits on four threads, tensor " + std::to_string(t));
    }
    expect(one.norm == four.norm && one.totals.penalty == four.totals.penalty,
           of.name + ": other sums on four threads");
    check_step(of, tensors, one, first);
    for (size_t t = 0; t < tensors.size(); ++t) {
      Tensor now = one.tensors[t];
      now.grad = gradients(now.grad.dtype(), now.grad.numel(), -1 - static_cast<int64_t>(t));
      tensors[t] = std::move(now);
    }
  }
}

Tensor make(DType dtype, const SliceLayout& layout, int64_t salt) {
  return {layout, parameters(dtype, layout.numel(), salt), gradients(dtype, layout.numel(), salt + 1),
          Array(dtype, layout.numel())};
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
  const SgdHyper lasso = {.lr = 0.1, .momentum = 0.9, .l1 = 0.5, .group_l1 = 80, .proximal = true};
  check({"group lasso, whole slices", lasso, {}, true, 50}, with_slices(kWholeSlices));
  check({"group lasso, other slices", lasso, {}, true, 50}, with_slices(kOtherSlices));
}

}  // namespace regfused
