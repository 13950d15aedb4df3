// A parameter group as Python holds it: its options, read again each step.
#include "step_group.h"

#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>

#include "devices.h"
#include "python_values.h"
#include "strength.h"

namespace regfused {

namespace py = pybind11;

namespace {

enum Option {
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kL1,
  kL2,
  kGroupL1,
  kGroupDim,
  kMaxNorm,
  kNormType,
  kNonfinite,
  // True or False.
  kNesterov,
  kMaximize,
  kProximal,
  kPenaltyInClip,
  kDecoupledWeightDecay,
  kClassicalMomentum,
  kDifferentiable,
  // True, False or None.
  kFused,
  kForeach,
  kCount
};

PyObject* key_of(int option) {
  static const std::array<PyObject*, kCount> keys = {interned("lr"),
                                                     interned("momentum"),
                                                     interned("dampening"),
                                                     interned("weight_decay"),
                                                     interned("l1"),
                                                     interned("l2"),
                                                     interned("group_l1"),
                                                     interned("group_dim"),
                                                     interned("max_norm"),
                                                     interned("norm_type"),
                                                     interned("nonfinite"),
                                                     interned("nesterov"),
                                                     interned("maximize"),
                                                     interned("proximal"),
                                                     interned("penalty_in_clip"),
                                                     interned("decoupled_weight_decay"),
                                                     interned("classical_momentum"),
                                                     interned("differentiable"),
                                                     interned("fused"),
                                                     interned("foreach")};
  return keys[option];
}

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

// Whether such a value never changes and holds no memory but its own.
bool is_plain_value(PyObject* value) {
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value);
}

bool is_on(PyObject* value) { return value != Py_None && PyObject_IsTrue(value) == 1; }

}  // namespace

void StepGroup::hold(PyObject* group) {
  static PyObject* const key = interned("params");
  dict = py::reinterpret_borrow<py::object>(group);
  PyObject* found = lookup(group, key);
  TORCH_CHECK_TYPE(found, "regfused.SGD.step: a parameter group must have 'params'");
  // A list or a tuple as it is, a new list of anything else.
  params = py::reinterpret_steal<py::object>(PySequence_Fast(found, "regfused.SGD.step: 'params' must be iterable"));
  if (!params) throw py::error_already_set();
  // What can be gone through once would be empty at the next step.
  if (PyIter_Check(found) && PyDict_SetItem(group, key, params.ptr()) != 0) throw py::error_already_set();
}

void StepGroup::release() {
  dict = params = py::object();
  device_lr = at::Tensor();
}

StepGroup::Read StepGroup::read() {
  static_assert(kCount == kOptions);
  std::array<PyObject*, kCount> value;
  bool changed = reread_;
  for (int option = 0; option < kCount; ++option) {
    value[option] = lookup(dict.ptr(), key_of(option));
    if (!value[option]) return Read::odd;
    changed |= value[option] != values_[option].ptr();
  }
  if (!changed) return Read::same;

  reread_ = true;
  device_lr = number_on_device(value[kLr]);
  hyper.lr = device_lr.defined() ? 0 : strength(value[kLr]);
  hyper.momentum = strength(value[kMomentum]);
  hyper.dampening = number(value[kDampening]);
  hyper.weight_decay = strength(value[kWeightDecay]);
  hyper.l1 = strength(value[kL1]);
  hyper.l2 = strength(value[kL2]);
  hyper.group_l1 = strength(value[kGroupL1]);
  for (double x : {hyper.lr, hyper.momentum, hyper.weight_decay, hyper.l1, hyper.l2, hyper.group_l1})
    if (!is_strength(x)) return Read::odd;
  if (!std::isfinite(hyper.dampening)) return Read::odd;
  if (!PyLong_Check(value[kGroupDim]) || PyBool_Check(value[kGroupDim])) return Read::odd;
  int overflow = 0;
  group_dim = PyLong_AsLongLongAndOverflow(value[kGroupDim], &overflow);
  if (overflow) group_dim = std::numeric_limits<int64_t>::max();  // as much out of range

  clips = value[kMaxNorm] != Py_None;
  max_norm = clips ? number(value[kMaxNorm]) : 0;
  norm_type = number(value[kNormType]);
  if (!(max_norm >= 0) || std::isnan(norm_type)) return Read::odd;
  if (is_text(value[kNonfinite], "propagate"))
    nonfinite = Nonfinite::propagate;
  else if (is_text(value[kNonfinite], "skip"))
    nonfinite = Nonfinite::skip;
  else if (is_text(value[kNonfinite], "error"))
    nonfinite = Nonfinite::error;
  else
    return Read::odd;

  for (int option = kNesterov; option < kCount; ++option)  // True and False are integers
    if (!PyLong_Check(value[option]) && !(option >= kFused && value[option] == Py_None)) return Read::odd;
  hyper.nesterov = is_on(value[kNesterov]);
  hyper.maximize = is_on(value[kMaximize]);
  hyper.proximal = is_on(value[kProximal]);
  hyper.penalty_in_clip = is_on(value[kPenaltyInClip]);
  hyper.decoupled_weight_decay = is_on(value[kDecoupledWeightDecay]);
  hyper.classical_momentum = is_on(value[kClassicalMomentum]);
  demanded = is_on(value[kFused]);
  kernels = (demanded || value[kFused] == Py_None) && !is_on(value[kForeach]) && !is_on(value[kDifferentiable]);

  reread_ = false;
  for (int option = 0; option < kCount; ++option)
    values_[option] = is_plain_value(value[option]) ? py::reinterpret_borrow<py::object>(value[option]) : py::object();
  return Read::changed;
}

bool StepGroup::read_lr() {
  if (device_lr.defined()) {
    const double value = device_lr.is_meta() ? NAN : device_lr.item().toDouble();
    hyper.lr = rounded_up_to_zero(value, regfused::rounding_of(device_lr.scalar_type()));
  }
  return is_strength(hyper.lr);
}

}  // namespace regfused
