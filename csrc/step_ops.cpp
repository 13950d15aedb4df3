// The dispatcher's door to the step: torch.ops.regfused.sgd_, adam_ ..., for torch.compile, FakeTensor and functional
// use. The caller holds the state. The overload `groups` has several parameter groups, and what a compiled optimizer
// needs besides: learning rates that are tensors, and the numbers of the step. One boxed kernel serves all rules: it
// reads its arguments by the names in the schema, which is made of the tables of options and slots.
#include "step_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "devices.h"
#include "slice_check.h"
#include "step_drive.h"
#include "strength.h"
#include "tensor_check.h"

namespace regfused {
namespace {

using at::Tensor;

constexpr const char* kGroups = "groups";  // the overload

std::string default_of(const OptionInfo& option, const unsigned char* hyper) {
  double numbers[2] = {};
  switch (option.kind) {
    case OptionKind::flag: return hyper[option.where] ? "True" : "False";
    case OptionKind::fractions:
      std::memcpy(numbers, hyper + option.where, sizeof numbers);
      return "[" + c10::str(numbers[0]) + ", " + c10::str(numbers[1]) + "]";
    default: std::memcpy(numbers, hyper + option.where, sizeof(double)); return c10::str(numbers[0]);
  }
}

std::string declaration_of(const OptionInfo& option, const unsigned char* hyper, bool has_groups) {
  std::string type = option.kind == OptionKind::flag        ? "bool"
                     : option.kind == OptionKind::fractions ? "float[]"
                                                            : "float";
  // The values of all groups: a pair of fractions is two of them.
  if (has_groups) return ", " + (type.back() == ']' ? type : type + "[]") + " " + option.name;
  return ", " + type + " " + option.name + "=" + default_of(option, hyper);
}

// The arguments of one call, by name.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : name_(op.schema().name()),
        arguments_(op.schema().arguments()),
        values_(stack.end() - static_cast<int64_t>(arguments_.size())),
        has_groups_(op.schema().overload_name() == kGroups) {}

  bool has_groups() const { return has_groups_; }

  const c10::IValue& operator[](const std::string& name) const {
    for (size_t i = 0; i < arguments_.size(); ++i)
      if (arguments_[i].name() == name) return values_[static_cast<int64_t>(i)];
    TORCH_INTERNAL_ASSERT(false, "regfused: no argument ", name);
  }

  // An option of one of so many groups.
  c10::IValue of_group(const char* name, OptionKind kind, size_t group, size_t groups) const {
    const c10::IValue& given = (*this)[name];
    if (!has_groups_) return given;
    const size_t each = kind == OptionKind::fractions ? 2 : 1, got = given.toList().size();
    TORCH_CHECK_VALUE(got == each * groups, name_, ": for ", groups, " groups there must be ", each * groups,
                      " values of ", name, ", but got ", got);
    const c10::List<c10::IValue> all = given.toList();
    if (each == 1) return all.get(group);
    return std::vector<double>{all.get(2 * group).toDouble(), all.get(2 * group + 1).toDouble()};
  }

 private:
  const std::string name_;
  const std::vector<c10::Argument>& arguments_;
  torch::jit::Stack::const_iterator values_;
  const bool has_groups_;
};

NormType fused_norm_type(const std::string& op, double norm_type) {
  TORCH_CHECK_VALUE(is_fused_norm(norm_type), op, ": norm_type must be 1, 2 or inf, but got ", norm_type);
  return fused_norm(norm_type);
}

void read_option(const std::string& op, const OptionInfo& option, const c10::IValue& value, unsigned char* hyper) {
  double numbers[2] = {};
  size_t bytes = sizeof(double);
  switch (option.kind) {
    case OptionKind::strength:
      numbers[0] = rounded_up_to_zero(value.toDouble(), kRounding);
      TORCH_CHECK_VALUE(std::isfinite(numbers[0]) && numbers[0] >= 0, op, ": ", option.name,
                        " must be finite and >= 0, but got ", numbers[0]);
      break;
    case OptionKind::finite:
      numbers[0] = value.toDouble();
      TORCH_CHECK_VALUE(std::isfinite(numbers[0]), op, ": ", option.name, " must be finite, but got ", numbers[0]);
      break;
    case OptionKind::fractions: {
      const std::vector<double> given = value.toDoubleVector();
      TORCH_CHECK_VALUE(given.size() == 2, op, ": ", option.name, " must be two numbers, but got ", given.size());
      for (int i = 0; i < 2; ++i) {
        TORCH_CHECK_VALUE(given[i] >= 0 && given[i] < 1, op, ": ", option.name, " must be in [0, 1), but got ", given);
        numbers[i] = given[i];
      }
      bytes = sizeof numbers;
      break;
    }
    case OptionKind::flag: {
      const bool on = value.toBool();
      std::memcpy(hyper + option.where, &on, sizeof on);
      return;
    }
  }
  std::memcpy(hyper + option.where, numbers, bytes);
}

struct CallGroup {
  StepHyper hyper;
  unsigned slot_set = 0;
  int64_t group_dim = 0;
};

// One call: its options and its tensors.
struct Call {
  std::string op;  // for messages
  RuleId id;
  const RuleInfo& rule;
  bool has_groups;
  std::vector<CallGroup> groups;
  std::vector<Tensor> lr;  // of each group; empty where they are numbers
  std::optional<double> max_norm;
  NormType norm_type;
  std::string nonfinite;
  std::vector<Tensor> params, grads, counts;
  std::vector<size_t> group_of;           // each parameter
  std::vector<Tensor> slots[kMostSlots];  // for each parameter, undefined where its group has no such slot
  std::vector<bool> first;                // likewise

  Call(const c10::OperatorHandle& handle, const Arguments& arguments);
  void check() const;

 private:
  void find_groups(const Arguments& arguments);
  void check_length(const char* name, size_t got, size_t needed) const;
  void check_like(const std::string& name, const Tensor& tensor, const Tensor& param) const;

  // What has one element for each parameter that `needs` it: spread over all parameters.
  template <class Element, class Needs>
  std::vector<Element> spread(const char* name, const std::vector<Element>& given, Needs needs) const;
};

RuleId rule_of(const c10::OperatorHandle& handle) {
  std::string name = handle.schema().name();
  name = name.substr(name.find("::") + 2);
  const int rule = rule_named(name.substr(0, name.size() - 1));
  TORCH_INTERNAL_ASSERT(rule >= 0, "regfused: no rule for ", name);
  return static_cast<RuleId>(rule);
}

Call::Call(const c10::OperatorHandle& handle, const Arguments& arguments)
    : op(handle.schema().name()), id(rule_of(handle)), rule(info_of(id)), has_groups(arguments.has_groups()) {
  params = arguments["params"].toTensorVector();
  grads = arguments["grads"].toTensorVector();
  find_groups(arguments);
  for (size_t g = 0; g < groups.size(); ++g) {
    StepHyper& hyper = groups[g].hyper;
    const auto read = [&](const OptionInfo& option, void* to) {
      read_option(op, option, arguments.of_group(option.name, option.kind, g, groups.size()),
                  static_cast<unsigned char*>(to));
    };
    for (const OptionInfo& option : kStepOptions) read(option, &hyper);
    for (int i = 0; i < rule.option_count; ++i) read(rule.options[i], hyper.of_rule);
    TORCH_CHECK_VALUE(rule.allows(hyper), op, ": ", rule.demand);
    hyper.steady_gain = rule.steady_gain(hyper);
    groups[g].slot_set = rule.slots_of(hyper);
    groups[g].group_dim = arguments.of_group("group_dim", OptionKind::finite, g, groups.size()).toInt();
  }
  max_norm = arguments["max_norm"].toOptional<double>();
  TORCH_CHECK_VALUE(!max_norm || *max_norm >= 0, op, ": max_norm must be None or >= 0, but got ", *max_norm);
  norm_type = fused_norm_type(op, arguments["norm_type"].toDouble());
  nonfinite = arguments["nonfinite"].toStringRef();
  TORCH_CHECK_VALUE(nonfinite == "propagate" || nonfinite == "skip" || nonfinite == "error", op,
                    ": nonfinite must be 'propagate', 'skip' or 'error', but got '", nonfinite, "'");
  for (int slot = 0; slot < rule.slot_count; ++slot) {
    const std::string name = std::string(rule.slots[slot]) + "s";
    slots[slot] = spread(name.c_str(), arguments[name].toTensorVector(),
                         [&](const CallGroup& group) { return (group.slot_set >> slot & 1) != 0; });
  }
  if (rule.counts_steps) {
    counts = arguments["state_steps"].toTensorVector();
  } else {
    const c10::List<bool> given = arguments["first"].toBoolList();
    first = spread("values of first", std::vector<bool>(given.begin(), given.end()),
                   [](const CallGroup& group) { return group.slot_set != 0; });
  }
}

void Call::find_groups(const Arguments& arguments) {
  if (!has_groups) {
    groups.resize(1);
    group_of.assign(params.size(), 0);
    return;
  }
  const std::vector<int64_t> sizes = arguments["sizes"].toIntVector();
  groups.resize(sizes.size());
  for (size_t g = 0; g < sizes.size(); ++g) {
    TORCH_CHECK_VALUE(sizes[g] >= 0, op, ": sizes must be >= 0, but got ", sizes);
    group_of.insert(group_of.end(), static_cast<size_t>(sizes[g]), g);
  }
  TORCH_CHECK_VALUE(group_of.size() == params.size(), op, ": sizes must add up to ", params.size(),
                    " parameters, but got ", sizes);
  lr = arguments["lr_tensors"].toTensorVector();
  TORCH_CHECK_VALUE(lr.empty() || lr.size() == groups.size(), op, ": there must be no lr_tensors, or one for each of ",
                    groups.size(), " groups, but got ", lr.size());
  for (const Tensor& tensor : lr)
    TORCH_CHECK_VALUE(tensor.numel() == 1 && tensor.is_floating_point() && tensor.layout() == at::kStrided, op,
                      ": lr must be a floating-point tensor with 1 element, but has shape ", tensor.sizes(), ", ",
                      tensor.scalar_type());
}

void Call::check_length(const char* name, size_t got, size_t needed) const {
  TORCH_CHECK_VALUE(got == needed, op, ": with these options there must be ", needed, " ", name,
                    ", one for each parameter that needs one, but got ", got);
}

template <class Element, class Needs>
std::vector<Element> Call::spread(const char* name, const std::vector<Element>& given, Needs needs) const {
  const auto needed = std::count_if(group_of.begin(), group_of.end(), [&](size_t g) { return needs(groups[g]); });
  check_length(name, given.size(), static_cast<size_t>(needed));
  std::vector<Element> all(params.size());
  auto next = given.begin();
  for (size_t i = 0; i < params.size(); ++i)
    if (needs(groups[group_of[i]])) all[i] = *next++;
  return all;
}

void Call::check_like(const std::string& name, const Tensor& tensor, const Tensor& param) const {
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes() && tensor.scalar_type() == param.scalar_type() &&
                        tensor.device() == param.device() && tensor.layout() == at::kStrided,
                    op, ": ", name, " must have the shape, dtype and device of its parameter (", param.sizes(), ", ",
                    param.scalar_type(), ", ", param.device(), "), but has ", tensor.sizes(), ", ",
                    tensor.scalar_type(), ", ", tensor.device());
}

// Looks at shapes and types alone.
void Call::check() const {
  TORCH_CHECK_VALUE(grads.size() == params.size(), op, ": there must be one gradient for each parameter, but got ",
                    params.size(), " parameters and ", grads.size(), " gradients");
  if (rule.counts_steps) check_length("state_steps", counts.size(), params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const CallGroup& group = groups[group_of[i]];
    check_like(c10::str("grads[", i, "]"), grads[i], params[i]);
    TORCH_CHECK_VALUE(group.hyper.group_l1 == 0 || has_slices(params[i], group.group_dim), op, ": group_dim must be ",
                      demand_on_dim(c10::str("params[", i, "]"), params[i]), ", but got ", group.group_dim);
    for (int slot = 0; slot < rule.slot_count; ++slot)
      if (slots[slot][i].defined()) check_like(c10::str(rule.slots[slot], "s[", i, "]"), slots[slot][i], params[i]);
    if (rule.counts_steps)
      TORCH_CHECK_VALUE(counts[i].numel() == 1 && counts[i].layout() == at::kStrided &&
                            counts[i].device() == params[i].device() &&
                            (counts[i].scalar_type() == at::kFloat || counts[i].scalar_type() == at::kDouble),
                        op, ": state_steps[", i,
                        "] must be one float32 or float64 number on the device of its parameter, but has shape ",
                        counts[i].sizes(), ", ", counts[i].scalar_type(), ", ", counts[i].device());
  }
}

double count_of(const Tensor& count) {
  return count.scalar_type() == at::kFloat ? *static_cast<const float*>(count.data_ptr())
                                           : *static_cast<const double*>(count.data_ptr());
}

void set_count(const Tensor& count, double to) {
  if (count.scalar_type() == at::kFloat)
    *static_cast<float*>(count.data_ptr()) = static_cast<float>(to);
  else
    *static_cast<double*>(count.data_ptr()) = to;
}

void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// The rows of a call, after check(). `in_layout` keeps copies of gradients that had other strides.
void add_rows(const Call& call, StepDriver& driver, std::vector<Tensor>& in_layout) {
  std::vector<MemoryRange> memory;
  for (size_t i = 0; i < call.params.size(); ++i) {
    const Tensor& param = call.params[i];
    const std::string why = why_not_fused(param);
    TORCH_CHECK_VALUE(why.empty(), call.op, ": parameters must be dense float32, float64, bfloat16 or float16 ",
                      "tensors ", where_kernels_run(), ", but params[", i, "] ", why);
    Tensor grad = call.grads[i];
    if (!same_layout(grad, param) || grad.is_neg()) {
      grad = at::empty_strided(param.sizes(), param.strides(), param.options());
      grad.copy_(call.grads[i]);
      in_layout.push_back(grad);
    }
    StepRow row;
    row.param = param.data_ptr();
    row.grad = address_of_grad(grad.data_ptr());
    row.numel = param.numel();
    row.group = static_cast<int32_t>(call.group_of[i]);
    row.device = driver.index_of(kernel_device(param));
    row.dtype = dtype_of(param);
    const CallGroup& group = call.groups[call.group_of[i]];
    row.slot_set = static_cast<uint8_t>(group.slot_set);
    if (group.hyper.group_l1 != 0) row.slices = slices_along(param, group.group_dim);
    memory.push_back(memory_of(param));
    for (int slot = 0; slot < call.rule.slot_count; ++slot) {
      const Tensor& there = call.slots[slot][i];
      if (!there.defined()) continue;
      TORCH_CHECK_VALUE(same_layout(there, param) && !there.is_neg(), call.op, ": ", call.rule.slots[slot], "s[", i,
                        "] must have the strides ", param.strides(), " of its parameter, but has ", there.strides());
      row.slots[slot] = there.data_ptr();
      memory.push_back(memory_of(there));
    }
    row.t = !call.rule.counts_steps && call.first[i] ? 1 : 2;
    if (call.rule.counts_steps) {
      const Tensor& count = call.counts[i];
      row.steps = count.data_ptr();
      row.steps_dtype = dtype_of(count);
      row.t = 0;
      memory.push_back(memory_of(count));
      if (!is_asynchronous(kernel_device(param))) {
        const double before = count_of(count);
        TORCH_CHECK_VALUE(before >= 0 && std::isfinite(before) && before == std::floor(before), call.op,
                          ": state_steps[", i, "] must be a whole number >= 0, but is ", before);
        row.t = before + 1;
      }
    }
    driver.rows.push_back(row);
  }
  TORCH_CHECK_VALUE(!any_overlap(std::move(memory)), call.op,
                    ": parameters and their state must share no memory, but two tensors do");
}

// Learning rates that are tensors: kernels that judge by themselves read them on their device, others are told.
void read_lr(const Call& call, StepDriver& driver, bool devices_judge) {
  for (size_t g = 0; g < call.lr.size(); ++g) {
    if (devices_judge && is_asynchronous(call.lr[g].device())) {
      driver.lr[g] = call.lr[g];
      continue;
    }
    const double lr = rounded_up_to_zero(call.lr[g].item().toDouble(), rounding_of(call.lr[g].scalar_type()));
    TORCH_CHECK_VALUE(std::isfinite(lr) && lr >= 0, call.op, ": lr must be finite and >= 0, but got ", lr);
    driver.groups[g].lr = lr;
  }
}

// The numbers of a step. The norm is NaN where nothing asked for it.
using Outcome = std::array<double, kRecordSize>;

// What the host knows of the step that was made, or not made. Where devices judge, they have the rest.
Outcome run(const Call& call, StepDriver& driver, bool devices_judge) {
  StepScalars scalars;
  scalars.norm_type = call.norm_type;
  const bool needs_norm = call.max_norm || call.nonfinite != "propagate";
  if (devices_judge) {
    scalars.clips = call.max_norm.has_value();
    scalars.max_norm = call.max_norm.value_or(0);
    scalars.skip_nonfinite = call.nonfinite == "skip";
    driver.measure_without_host(scalars, needs_norm);
    driver.step_without_host(scalars);
    return {};
  }
  TORCH_CHECK(!driver.is_capturing(), call.op,
              ": in a CUDA graph all tensors must be on CUDA devices and nonfinite must not be 'error'");
  Outcome outcome = {};
  outcome[kGradNorm] = NAN;
  if (needs_norm) {
    const double norm = outcome[kGradNorm] = norm_finish(scalars.norm_type, driver.norm(scalars));
    TORCH_CHECK(std::isfinite(norm) || call.nonfinite != "error", call.op,
                ": nonfinite='error' demands a finite gradient norm, but it is ", norm);
    if (!std::isfinite(norm) && call.nonfinite == "skip") {
      outcome[kSkipped] = 1;
      return outcome;
    }
    if (call.max_norm) scalars.clip_coef = clip_coefficient(*call.max_norm, norm);
  }
  outcome[kClipCoef] = scalars.clip_coef;
  driver.step(scalars);
  outcome[kPenalty] = driver.penalty();
  return outcome;
}

// On the device of the first parameter.
c10::Device device_of_outcome(const Call& call) {
  return call.params.empty() ? c10::Device(at::kCPU) : call.params.front().device();
}

Tensor as_tensor(const Call& call, const StepDriver& driver, const Outcome& of_host, bool devices_judge) {
  Tensor outcome = at::empty({kRecordSize}, at::kDouble);
  std::copy(of_host.begin(), of_host.end(), outcome.mutable_data_ptr<double>());
  outcome = outcome.to(device_of_outcome(call));
  const std::vector<Tensor> of_devices = driver.numbers();
  if (of_devices.empty()) return outcome;
  if (devices_judge) outcome.narrow(0, 0, kPenalty).copy_(of_devices.front().narrow(0, 0, kPenalty));
  for (const Tensor& numbers : of_devices) {
    outcome.select(0, kPenalty).add_(numbers.select(0, kPenalty).to(outcome.device()));
    outcome.select(0, kSkipped).add_(numbers.select(0, kSkipped).to(outcome.device()));
  }
  return outcome;
}

void step_kernels(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Call call(handle, Arguments(handle, *stack));
  call.check();
  StepDriver driver;
  driver.rule = call.id;
  for (const CallGroup& group : call.groups) driver.groups.push_back(group.hyper);
  driver.lr.resize(call.groups.size());
  std::vector<Tensor> in_layout;
  add_rows(call, driver, in_layout);
  driver.cut();
  driver.find_live();
  const bool devices_judge = driver.can_leave_host() && call.nonfinite != "error";
  read_lr(call, driver, devices_judge);
  driver.begin();
  const Outcome outcome = run(call, driver, devices_judge);
  if (devices_judge || outcome[kSkipped] == 0) {
    // The dispatcher bumps no version counters for operators from outside.
    for (size_t i = 0; i < call.params.size(); ++i) {
      bump_version(call.params[i]);
      for (int slot = 0; slot < call.rule.slot_count; ++slot)
        if (call.slots[slot][i].defined()) bump_version(call.slots[slot][i]);
      if (!call.rule.counts_steps) continue;
      if (driver.rows[i].t != 0) set_count(call.counts[i], driver.rows[i].t);
      bump_version(call.counts[i]);
    }
  }
  torch::jit::drop(*stack, handle.schema().arguments().size());
  if (call.has_groups) stack->push_back(as_tensor(call, driver, outcome, devices_judge));
}

// Shapes are all that a fake step needs to look at.
void step_meta(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Call call(handle, Arguments(handle, *stack));
  call.check();
  torch::jit::drop(*stack, handle.schema().arguments().size());
  if (call.has_groups)
    stack->push_back(at::empty({kRecordSize}, at::device(device_of_outcome(call)).dtype(at::kDouble)));
}

std::string name_of(RuleId id, bool has_groups) {
  return has_groups ? c10::str(info_of(id).name, "_.", kGroups) : c10::str(info_of(id).name, "_");
}

}  // namespace

std::string step_schema(RuleId id, bool has_groups) {
  const RuleInfo& rule = info_of(id);
  StepHyper hyper;
  rule.set_defaults(hyper);
  char alias = 'a';
  const auto mutated = [&](const std::string& name) { return std::string("Tensor(") + alias++ + "!)[] " + name; };
  std::string schema = name_of(id, has_groups) + "(" + mutated("params") + ", Tensor[] grads";
  for (int slot = 0; slot < rule.slot_count; ++slot) schema += ", " + mutated(std::string(rule.slots[slot]) + "s");
  schema += ", " + (rule.counts_steps ? mutated("state_steps") : std::string("bool[] first"));
  if (has_groups) schema += ", Tensor[] lr_tensors";
  schema += has_groups ? ", *, int[] sizes, float[] lr" : ", *, float lr";
  for (const OptionInfo& option : kStepOptions)
    if (option.where != offsetof(StepHyper, lr))
      schema += declaration_of(option, reinterpret_cast<const unsigned char*>(&hyper), has_groups);
  for (int i = 0; i < rule.option_count; ++i) schema += declaration_of(rule.options[i], hyper.of_rule, has_groups);
  schema += has_groups ? ", int[] group_dim" : ", int group_dim=0";
  schema += ", float? max_norm=None, float norm_type=2, str nonfinite='propagate') -> ";
  return schema + (has_groups ? "Tensor" : "()");
}

namespace {

template <void kernel(const c10::OperatorHandle&, torch::jit::Stack*)>
void implement(torch::Library& m) {
  for (int rule = 0; rule < kRules; ++rule)
    for (bool has_groups : {false, true})
      m.impl(name_of(static_cast<RuleId>(rule), has_groups).c_str(),
             torch::CppFunction::makeFromBoxedFunction<kernel>());
}

}  // namespace

TORCH_LIBRARY_IMPL(regfused, CPU, m) { implement<step_kernels>(m); }
TORCH_LIBRARY_IMPL(regfused, CUDA, m) { implement<step_kernels>(m); }
TORCH_LIBRARY_IMPL(regfused, Meta, m) { implement<step_meta>(m); }

}  // namespace regfused
