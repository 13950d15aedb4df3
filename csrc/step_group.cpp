// A parameter group as Python holds it: its options, read again each step.
#include "step_group.h"

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "devices.h"
#include "python_values.h"
#include "strength.h"

namespace regfused {

namespace py = pybind11;

namespace {

// Options that are no hyperparameter of a kernel. They follow those of step_options().
enum Rest { kGroupDim, kMaxNorm, kNormType, kNonfinite, kDifferentiable, kFused, kForeach, kRest };

PyObject* key_of_rest(int option) {
  static const std::array<PyObject*, kRest> keys = {
      interned("group_dim"),      interned("max_norm"), interned("norm_type"), interned("nonfinite"),
      interned("differentiable"), interned("fused"),    interned("foreach")};
  return keys[option];
}

constexpr size_t kMostOptions = 32;

bool is_text(PyObject* value, const char* text) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

double rounding_of(PyObject* value) {
  if (THPVariable_Check(value)) return regfused::rounding_of(THPVariable_Unpack(value).scalar_type());
  if (PyFloat_Check(value) || PyLong_Check(value)) return kRounding;
  // Numbers of other libraries, such as numpy.float32, by their size in bytes.
  const py::object size = py::getattr(value, "itemsize", py::none());
  if (!py::isinstance<py::int_>(size)) return kRounding;
  const auto type = size.equal(py::int_(2)) ? at::kBFloat16 : size.equal(py::int_(4)) ? at::kFloat : at::kDouble;
  return regfused::rounding_of(type);
}

double strength(PyObject* value) {
  const double x = number(value);
  return x < 0 ? rounded_up_to_zero(x, rounding_of(value)) : x;
}

bool is_strength(double x) { return std::isfinite(x) && x >= 0; }

// True and False are integers.
bool is_flag(PyObject* value) { return PyLong_Check(value); }

bool is_on(PyObject* value) { return value != Py_None && PyObject_IsTrue(value) == 1; }

// True if such a value never changes and holds no memory but its own.
bool is_plain_value(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (PyTuple_CheckExact(PyTuple_GET_ITEM(value, i)) || !is_plain_value(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value);
}

// A tuple or list of as many numbers in [0, 1).
bool read_fractions(PyObject* value, double* to, Py_ssize_t count) {
  const bool is_list = PyTuple_Check(value) || PyList_Check(value);
  if (!is_list || PySequence_Fast_GET_SIZE(value) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    to[i] = number(PySequence_Fast_GET_ITEM(value, i));
    if (!(to[i] >= 0 && to[i] < 1)) return false;
  }
  return true;
}

}  // namespace

const std::vector<StepOption>& step_options(RuleId rule) {
  static const std::vector<std::vector<StepOption>> of_rules = [] {
    std::vector<std::vector<StepOption>> all;
    for (int r = 0; r < kRules; ++r) {
      std::vector<StepOption> options;
      for (const OptionInfo& option : kStepOptions)
        options.push_back({interned(option.name), option.kind, option.where, false});
      const RuleInfo& info = info_of(static_cast<RuleId>(r));
      for (int i = 0; i < info.option_count; ++i)
        options.push_back({interned(info.options[i].name), info.options[i].kind, info.options[i].where, true});
      TORCH_INTERNAL_ASSERT(options.size() + kRest <= kMostOptions);
      all.push_back(std::move(options));
    }
    return all;
  }();
  return of_rules[static_cast<int>(rule)];
}

StepGroup::StepGroup(RuleId rule) : rule_(rule) {
  info_of(rule).set_defaults(hyper);
  values_.resize(step_options(rule).size() + kRest);
}

void StepGroup::hold(PyObject* group, const std::string& operation) {
  static PyObject* const key = interned("params");
  dict = py::reinterpret_borrow<py::object>(group);
  PyObject* found = lookup(group, key);
  TORCH_CHECK_TYPE(found, operation, ": a parameter group must have 'params'");
  // A list or a tuple as it is, a new list of anything else.
  if (PyList_Check(found) || PyTuple_Check(found)) {
    params = py::reinterpret_borrow<py::object>(found);
    return;
  }
  params =
      py::reinterpret_steal<py::object>(PySequence_Fast(found, (operation + ": 'params' must be iterable").c_str()));
  if (!params) throw py::error_already_set();
  // What can be gone through once would be empty at the next step.
  if (PyIter_Check(found) && PyDict_SetItem(group, key, params.ptr()) != 0) throw py::error_already_set();
}

void StepGroup::release() {
  dict = params = py::object();
  device_lr = at::Tensor();
}

StepGroup::Read StepGroup::read() {
  const std::vector<StepOption>& options = step_options(rule_);
  const size_t count = options.size() + kRest;
  std::array<PyObject*, kMostOptions> values;
  bool changed = reread_;
  for (size_t i = 0; i < count; ++i) {
    values[i] =
        lookup(dict.ptr(), i < options.size() ? options[i].key : key_of_rest(static_cast<int>(i - options.size())));
    if (!values[i]) return Read::odd;
    changed |= values[i] != values_[i].ptr();
  }
  if (!changed) return Read::same;

  reread_ = true;
  for (size_t i = 0; i < options.size(); ++i)
    if (!read_option(options[i], values[i])) return Read::odd;
  if (!read_rest(values.data() + options.size())) return Read::odd;
  const RuleInfo& rule = info_of(rule_);
  slot_set = rule.slots_of(hyper);
  hyper.steady_gain = rule.steady_gain(hyper);
  if (!rule.allows(hyper)) return Read::odd;

  reread_ = false;
  for (size_t i = 0; i < count; ++i)
    values_[i] = is_plain_value(values[i]) ? py::reinterpret_borrow<py::object>(values[i]) : py::object();
  return Read::changed;
}

bool StepGroup::read_option(const StepOption& option, PyObject* value) {
  unsigned char* const to = (option.of_rule ? hyper.of_rule : reinterpret_cast<unsigned char*>(&hyper)) + option.where;
  double numbers[2];
  size_t bytes = sizeof(double);
  switch (option.kind) {
    case OptionKind::strength:
      if (!option.of_rule && option.where == offsetof(StepHyper, lr)) {
        device_lr = number_on_device(value);
        if (device_lr.defined()) value = Py_False;  // unknown for now
      }
      numbers[0] = strength(value);
      if (!is_strength(numbers[0])) return false;
      break;
    case OptionKind::finite:
      numbers[0] = number(value);
      if (!std::isfinite(numbers[0])) return false;
      break;
    case OptionKind::fractions:
      if (!read_fractions(value, numbers, 2)) return false;
      bytes = sizeof numbers;
      break;
    case OptionKind::flag: {
      if (!is_flag(value)) return false;
      const bool on = is_on(value);
      std::memcpy(to, &on, sizeof on);
      return true;
    }
  }
  std::memcpy(to, numbers, bytes);
  return true;
}

bool StepGroup::read_rest(PyObject* const* values) {
  if (!PyLong_Check(values[kGroupDim]) || PyBool_Check(values[kGroupDim])) return false;
  int overflow = 0;
  group_dim = PyLong_AsLongLongAndOverflow(values[kGroupDim], &overflow);
  if (overflow) group_dim = std::numeric_limits<int64_t>::max();  // as much out of range

  clips = values[kMaxNorm] != Py_None;
  max_norm = clips ? number(values[kMaxNorm]) : 0;
  norm_type = number(values[kNormType]);
  if (!(max_norm >= 0) || std::isnan(norm_type)) return false;
  if (is_text(values[kNonfinite], "propagate"))
    nonfinite = Nonfinite::propagate;
  else if (is_text(values[kNonfinite], "skip"))
    nonfinite = Nonfinite::skip;
  else if (is_text(values[kNonfinite], "error"))
    nonfinite = Nonfinite::error;
  else
    return false;

  for (int option : {kDifferentiable, kFused, kForeach})
    if (!is_flag(values[option]) && !(option != kDifferentiable && values[option] == Py_None)) return false;
  demanded = is_on(values[kFused]);
  kernels = (demanded || values[kFused] == Py_None) && !is_on(values[kForeach]) && !is_on(values[kDifferentiable]);
  return true;
}

bool StepGroup::read_lr() {
  if (device_lr.defined()) {
    const double value = device_lr.is_meta() ? NAN : device_lr.item().toDouble();
    hyper.lr = rounded_up_to_zero(value, regfused::rounding_of(device_lr.scalar_type()));
  }
  return is_strength(hyper.lr);
}

}  // namespace regfused
