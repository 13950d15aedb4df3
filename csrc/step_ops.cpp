// The dispatcher's door to the step: torch.ops.regfused.sgd_, adam_ ..., for torch.compile, FakeTensor and functional
// use. One parameter group; the caller holds the state. One boxed kernel serves all rules: it reads its arguments by
// the names in the schema, which is made of the tables of options and slots.
#include "step_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

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

std::string declaration_of(const OptionInfo& option, const unsigned char* hyper) {
  const char* type = option.kind == OptionKind::flag        ? "bool"
                     : option.kind == OptionKind::fractions ? "float[]"
                                                            : "float";
  return std::string(", ") + type + " " + option.name + "=" + default_of(option, hyper);
}

// The arguments of one call, by name.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : arguments_(op.schema().arguments()), values_(stack.end() - static_cast<int64_t>(arguments_.size())) {}

  const c10::IValue& operator[](const std::string& name) const {
    for (size_t i = 0; i < arguments_.size(); ++i)
      if (arguments_[i].name() == name) return values_[static_cast<int64_t>(i)];
    TORCH_INTERNAL_ASSERT(false, "regfused: no argument ", name);
  }

 private:
  const std::vector<c10::Argument>& arguments_;
  torch::jit::Stack::const_iterator values_;
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

// One call: its options and its tensors.
struct Call {
  std::string op;  // for messages
  RuleId id;
  const RuleInfo& rule;
  StepHyper hyper;
  unsigned slot_set = 0;
  int64_t group_dim;
  std::optional<double> max_norm;
  NormType norm_type;
  std::string nonfinite;
  std::vector<Tensor> params, grads, counts;
  std::vector<Tensor> slots[kMostSlots];
  std::vector<bool> first;

  Call(const c10::OperatorHandle& handle, const Arguments& arguments);
  void check() const;

 private:
  void check_length(const char* name, size_t got, bool needed) const;
  void check_like(const std::string& name, const Tensor& tensor, const Tensor& param) const;
};

RuleId rule_of(const c10::OperatorHandle& handle) {
  std::string name = handle.schema().name();
  name = name.substr(name.find("::") + 2);
  const int rule = rule_named(name.substr(0, name.size() - 1));
  TORCH_INTERNAL_ASSERT(rule >= 0, "regfused: no rule for ", name);
  return static_cast<RuleId>(rule);
}

Call::Call(const c10::OperatorHandle& handle, const Arguments& arguments)
    : op(handle.schema().name()), id(rule_of(handle)), rule(info_of(id)) {
  for (const OptionInfo& option : kStepOptions)
    read_option(op, option, arguments[option.name], reinterpret_cast<unsigned char*>(&hyper));
  for (int i = 0; i < rule.option_count; ++i)
    read_option(op, rule.options[i], arguments[rule.options[i].name], hyper.of_rule);
  TORCH_CHECK_VALUE(rule.allows(hyper), op, ": ", rule.demand);
  hyper.steady_gain = rule.steady_gain(hyper);
  slot_set = rule.slots_of(hyper);
  group_dim = arguments["group_dim"].toInt();
  max_norm = arguments["max_norm"].toOptional<double>();
  TORCH_CHECK_VALUE(!max_norm || *max_norm >= 0, op, ": max_norm must be None or >= 0, but got ", *max_norm);
  norm_type = fused_norm_type(op, arguments["norm_type"].toDouble());
  nonfinite = arguments["nonfinite"].toStringRef();
  TORCH_CHECK_VALUE(nonfinite == "propagate" || nonfinite == "skip" || nonfinite == "error", op,
                    ": nonfinite must be 'propagate', 'skip' or 'error', but got '", nonfinite, "'");
  params = arguments["params"].toTensorVector();
  grads = arguments["grads"].toTensorVector();
  for (int slot = 0; slot < rule.slot_count; ++slot)
    slots[slot] = arguments[std::string(rule.slots[slot]) + "s"].toTensorVector();
  if (rule.counts_steps) {
    counts = arguments["state_steps"].toTensorVector();
  } else {
    const c10::List<bool> given = arguments["first"].toBoolList();
    first.assign(given.begin(), given.end());
  }
}

void Call::check_length(const char* name, size_t got, bool needed) const {
  TORCH_CHECK_VALUE(got == (needed ? params.size() : 0), op, ": with these options there must be ",
                    needed ? params.size() : 0, " ", name, ", one for each parameter that needs one, but got ", got);
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
  for (int slot = 0; slot < rule.slot_count; ++slot)
    check_length((std::string(rule.slots[slot]) + "s").c_str(), slots[slot].size(), slot_set >> slot & 1);
  if (rule.counts_steps)
    check_length("state_steps", counts.size(), true);
  else
    check_length("values of first", first.size(), slot_set != 0);
  for (size_t i = 0; i < params.size(); ++i) {
    check_like(c10::str("grads[", i, "]"), grads[i], params[i]);
    TORCH_CHECK_VALUE(hyper.group_l1 == 0 || has_slices(params[i], group_dim), op, ": group_dim must be ",
                      demand_on_dim(c10::str("params[", i, "]"), params[i]), ", but got ", group_dim);
    for (int slot = 0; slot < rule.slot_count; ++slot)
      if (!slots[slot].empty()) check_like(c10::str(rule.slots[slot], "s[", i, "]"), slots[slot][i], params[i]);
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
    row.device = driver.index_of(kernel_device(param));
    row.dtype = dtype_of(param);
    row.slot_set = static_cast<uint8_t>(call.slot_set);
    if (call.hyper.group_l1 != 0) row.slices = slices_along(param, call.group_dim);
    memory.push_back(memory_of(param));
    for (int slot = 0; slot < call.rule.slot_count; ++slot) {
      if (call.slots[slot].empty()) continue;
      const Tensor& there = call.slots[slot][i];
      TORCH_CHECK_VALUE(same_layout(there, param) && !there.is_neg(), call.op, ": ", call.rule.slots[slot], "s[", i,
                        "] must have the strides ", param.strides(), " of its parameter, but has ", there.strides());
      row.slots[slot] = there.data_ptr();
      memory.push_back(memory_of(there));
    }
    row.t = !call.first.empty() && call.first[i] ? 1 : 2;
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

// Whether the step happened, as far as the host knows.
bool run(const Call& call, StepDriver& driver) {
  StepScalars scalars;
  scalars.norm_type = call.norm_type;
  const bool needs_norm = call.max_norm || call.nonfinite != "propagate";
  if (driver.can_leave_host() && call.nonfinite != "error") {
    scalars.clips = call.max_norm.has_value();
    scalars.max_norm = call.max_norm.value_or(0);
    scalars.skip_nonfinite = call.nonfinite == "skip";
    driver.measure_without_host(scalars, needs_norm);
    driver.step_without_host(scalars);
    return true;
  }
  TORCH_CHECK(!driver.is_capturing(), call.op,
              ": in a CUDA graph all tensors must be on CUDA devices and nonfinite must not be 'error'");
  if (needs_norm) {
    const double norm = norm_finish(scalars.norm_type, driver.norm(scalars));
    TORCH_CHECK(std::isfinite(norm) || call.nonfinite != "error", call.op,
                ": nonfinite='error' demands a finite gradient norm, but it is ", norm);
    if (!std::isfinite(norm) && call.nonfinite == "skip") return false;
    if (call.max_norm) scalars.clip_coef = clip_coefficient(*call.max_norm, norm);
  }
  driver.step(scalars);
  return true;
}

void step_kernels(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Call call(handle, Arguments(handle, *stack));
  call.check();
  StepDriver driver;
  driver.rule = call.id;
  driver.groups = {call.hyper};
  driver.lr.resize(1);
  std::vector<Tensor> in_layout;
  add_rows(call, driver, in_layout);
  driver.cut();
  driver.find_live();
  driver.begin();
  if (run(call, driver)) {
    // The dispatcher bumps no version counters for operators from outside.
    for (size_t i = 0; i < call.params.size(); ++i) {
      bump_version(call.params[i]);
      for (const std::vector<Tensor>& slot : call.slots)
        if (!slot.empty()) bump_version(slot[i]);
      if (!call.rule.counts_steps) continue;
      if (driver.rows[i].t != 0) set_count(call.counts[i], driver.rows[i].t);
      bump_version(call.counts[i]);
    }
  }
  torch::jit::drop(*stack, handle.schema().arguments().size());
}

// Shapes are all that a fake step needs to look at: it returns nothing.
void step_meta(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  Call(handle, Arguments(handle, *stack)).check();
  torch::jit::drop(*stack, handle.schema().arguments().size());
}

}  // namespace

std::string step_schema(RuleId id) {
  const RuleInfo& rule = info_of(id);
  StepHyper hyper;
  rule.set_defaults(hyper);
  char alias = 'a';
  const auto mutated = [&](const std::string& name) { return std::string("Tensor(") + alias++ + "!)[] " + name; };
  std::string schema = std::string(rule.name) + "_(" + mutated("params") + ", Tensor[] grads";
  for (int slot = 0; slot < rule.slot_count; ++slot) schema += ", " + mutated(std::string(rule.slots[slot]) + "s");
  schema += ", " + (rule.counts_steps ? mutated("state_steps") : std::string("bool[] first")) + ", *, float lr";
  for (const OptionInfo& option : kStepOptions)
    if (option.where != offsetof(StepHyper, lr))
      schema += declaration_of(option, reinterpret_cast<const unsigned char*>(&hyper));
  for (int i = 0; i < rule.option_count; ++i) schema += declaration_of(rule.options[i], hyper.of_rule);
  return schema + ", int group_dim=0, float? max_norm=None, float norm_type=2, str nonfinite='propagate') -> ()";
}

namespace {

template <void kernel(const c10::OperatorHandle&, torch::jit::Stack*)>
void implement(torch::Library& m) {
  for (int rule = 0; rule < kRules; ++rule)
    m.impl((std::string(info_of(static_cast<RuleId>(rule)).name) + "_").c_str(),
           torch::CppFunction::makeFromBoxedFunction<kernel>());
}

}  // namespace

TORCH_LIBRARY_IMPL(regfused, CPU, m) { implement<step_kernels>(m); }
TORCH_LIBRARY_IMPL(regfused, CUDA, m) { implement<step_kernels>(m); }
TORCH_LIBRARY_IMPL(regfused, Meta, m) { implement<step_meta>(m); }

}  // namespace regfused
