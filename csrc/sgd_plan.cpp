// What an optimizer keeps between steps: what is known, and when it no longer holds.
#include "sgd_plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "devices.h"
#include "python_values.h"
#include "slice_check.h"
#include "tensor_check.h"

namespace regfused {

namespace {

PyObject* momentum_buffer_key() {
  static PyObject* const key = interned("momentum_buffer");
  return key;
}

PyObject* params_key() {
  static PyObject* const key = interned("params");
  return key;
}

// Whether the kernels can read this momentum buffer; one in other strides is copied first.
bool buffer_fits(PyObject* object, const at::Tensor& param) {
  if (!THPVariable_Check(object) || !is_plain(object)) return false;
  const at::Tensor& buffer = THPVariable_Unpack(object);
  return buffer.layout() == at::kStrided && buffer.device() == param.device() &&
         buffer.scalar_type() == param.scalar_type() && buffer.sizes() == param.sizes() && !buffer.is_neg();
}

}  // namespace

SgdPlan::SgdPlan(py::function check) : check_(std::move(check)) {}

bool SgdPlan::needs_norm() const {
  return !groups_.empty() && (groups_.front().clips || groups_.front().nonfinite != SgdGroup::Nonfinite::propagate);
}

bool SgdPlan::is_known(const py::list& param_groups, const py::dict& state) const {
  if (groups_.empty() || param_groups.ptr() != param_groups_.ptr() || state.ptr() != state_.ptr()) return false;
  if (param_groups.size() != groups_.size()) return false;
  size_t p = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* dict = PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(g));
    if (dict != groups_[g].dict.ptr()) return false;
    PyObject* list = lookup(dict, params_key());
    if (list != groups_[g].params.ptr() || !PyList_Check(list)) return false;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    for (Py_ssize_t i = 0; i < size; ++i, ++p) {
      if (p == params_.size() || params_[p].group != static_cast<int32_t>(g) ||
          params_[p].object.ptr() != PyList_GET_ITEM(list, i))
        return false;
    }
  }
  if (p != params_.size()) return false;
  // The state, in its own order: no hashing, no lookup.
  if (static_cast<size_t>(PyDict_Size(state.ptr())) != entries_.size()) return false;
  PyObject *state_key, *value;
  Py_ssize_t position = 0;
  for (size_t e = 0; PyDict_Next(state.ptr(), &position, &state_key, &value); ++e) {
    const StateEntry& entry = entries_[e];
    if (state_key != entry.key.ptr() || value != entry.value.ptr()) return false;
    if (PyDict_Check(value) && lookup(value, momentum_buffer_key()) != entry.buffer.ptr()) return false;
  }
  return true;
}

void SgdPlan::remember_state() {
  entries_.clear();
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state_.ptr(), &position, &key, &value)) {
    PyObject* buffer = PyDict_Check(value) ? lookup(value, momentum_buffer_key()) : nullptr;
    entries_.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value),
                        py::reinterpret_borrow<py::object>(buffer)});
  }
}

void SgdPlan::forget() {
  groups_.clear();
  params_.clear();
  entries_.clear();
  driver_.tensors.clear();
  driver_.groups.clear();
  driver_.lr.clear();
  grads_.clear();
  relaid_grads_.clear();
  pending_.clear();
}

void SgdPlan::build(const py::list& param_groups, const py::dict& state) {
  forget();
  param_groups_ = param_groups;
  state_ = state;
  try {
    list_params();
    read_options();
    check_group_dims();
    remember_state();
    plan_rows();
    driver_.cut();
  } catch (...) {
    forget();  // half a plan must not be taken for a known one
    throw;
  }
}

void SgdPlan::list_params() {
  for (const py::handle dict : param_groups_) {
    TORCH_CHECK_TYPE(PyDict_Check(dict.ptr()), "regfused.SGD.step: param_groups must hold dictionaries");
    const size_t g = groups_.size();
    SgdGroup group;
    group.dict = py::reinterpret_borrow<py::object>(dict);
    group.params = py::reinterpret_borrow<py::object>(lookup(dict.ptr(), params_key()));
    TORCH_CHECK_TYPE(group.params && PyList_Check(group.params.ptr()), "regfused.SGD.step: 'params' of group ", g,
                     " must be a list");
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params.ptr()); ++i) {
      Param param;
      param.object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(group.params.ptr(), i));
      TORCH_CHECK_TYPE(THPVariable_Check(param.object.ptr()), "regfused.SGD.step: parameter ", i, " of group ", g,
                       " must be a tensor, but is a ", Py_TYPE(param.object.ptr())->tp_name);
      param.group = static_cast<int32_t>(g);
      param.index = static_cast<int32_t>(i);
      params_.push_back(std::move(param));
    }
    groups_.push_back(std::move(group));
  }
  driver_.groups.resize(groups_.size());
  driver_.lr.resize(groups_.size());
}

// Every parameter must have the slices that its group asks for.
void SgdPlan::check_group_dims() const {
  for (const Param& param : params_) {
    const SgdGroup& group = groups_[param.group];
    if (group.hyper.group_l1 != 0 && !has_slices(THPVariable_Unpack(param.object.ptr()), group.group_dim)) complain();
  }
}

// Rows of the driver's table for the parameters that the kernels take.
void SgdPlan::plan_rows() {
  std::unordered_map<PyObject*, PyObject*> buffer_of;
  for (const StateEntry& entry : entries_) {
    if (!PyDict_Check(entry.value.ptr())) check_(param_groups_, state_);
    if (entry.buffer && !entry.buffer.is_none()) buffer_of.emplace(entry.key.ptr(), entry.buffer.ptr());
  }
  for (Param& param : params_) {
    const auto found = buffer_of.find(param.object.ptr());
    plan_row(param, found == buffer_of.end() ? nullptr : found->second);
  }

  std::vector<MemoryRange> memory;
  for (const Param& param : params_)
    if (param.row >= 0) memory.push_back(memory_of(THPVariable_Unpack(param.object.ptr())));
  if (any_overlap(memory)) {
    // One parameter listed twice, or two that share memory: the order of updates has a meaning
    // then, which parallel chunks do not keep. The reference does.
    for (const SgdGroup& group : groups_)
      TORCH_CHECK(!group.demanded,
                  "regfused.SGD.step: fused=True demands parameters that share no memory, but two of them do");
    for (Param& param : params_) param.row = -1;
    driver_.tensors.clear();
    return;
  }
  for (const Param& param : params_)
    if (param.row >= 0 && param.buffer && !param.relay_buffer)
      memory.push_back(memory_of(THPVariable_Unpack(param.buffer.ptr())));
  TORCH_CHECK_VALUE(!any_overlap(std::move(memory)),
                    "regfused.SGD.step: a momentum_buffer must share no memory with a parameter or another ",
                    "momentum_buffer, but one does");
}

void SgdPlan::plan_row(Param& param, PyObject* buffer_object) {
  const at::Tensor& tensor = THPVariable_Unpack(param.object.ptr());
  if (!groups_[param.group].kernels || !is_plain(param.object.ptr()) || !why_not_fused(tensor).empty()) return;
  if (buffer_object) {
    if (!buffer_fits(buffer_object, tensor)) {
      // Python raises, or knows the buffer as one of the reference's, such as a sparse one.
      check_(param_groups_, state_);
      return;
    }
    const at::Tensor& buffer = THPVariable_Unpack(buffer_object);
    param.buffer = py::reinterpret_borrow<py::object>(buffer_object);
    param.relay_buffer = !same_layout(buffer, tensor);
    param.buffer_keys = buffer.key_set();
    param.buffer_memory = buffer.data_ptr();
  }
  param.row = static_cast<int32_t>(driver_.tensors.size());
  param.keys = tensor.key_set();
  param.dtype = tensor.scalar_type();
  if (!tensor.is_contiguous()) param.strides = tensor.strides().vec();
  SgdTensor row;
  row.param = tensor.data_ptr();
  row.numel = tensor.numel();
  row.group = param.group;
  row.device = driver_.index_of(kernel_device(tensor));
  row.dtype = dtype_of(tensor);
  if (const SgdGroup& group = groups_[param.group]; group.hyper.group_l1 != 0) {
    row.slices = slices_along(tensor, group.group_dim);
    param.sizes = tensor.sizes().vec();
  }
  driver_.tensors.push_back(row);
}

// Reads the options of all groups. False where a group went over to the reference, or back, or where it
// has other slices: then the plan must be built again.
bool SgdPlan::read_options() {
  std::vector<bool> kernels;
  bool changed = false, slices_hold = true;
  for (SgdGroup& group : groups_) {
    kernels.push_back(group.kernels);
    const bool had_slices = group.hyper.group_l1 != 0;
    const int64_t group_dim = group.group_dim;
    const SgdGroup::Read read = group.read();
    if (read == SgdGroup::Read::odd) complain();
    changed |= read == SgdGroup::Read::changed;
    const bool has_slices = group.hyper.group_l1 != 0;
    slices_hold &= has_slices == had_slices && (!has_slices || group.group_dim == group_dim);
  }
  if (!changed) return true;
  const SgdGroup& first = groups_.front();
  const bool fused_norm = first.norm_type == 1 || first.norm_type == 2 || first.norm_type == INFINITY;
  for (SgdGroup& group : groups_) {
    if (!group.agrees(first)) complain();
    TORCH_CHECK(fused_norm || !group.demanded, "regfused.SGD.step: fused=True demands norm_type 1, 2 or inf, but got ",
                group.norm_type);
    group.kernels &= fused_norm;
  }
  scalars_.norm_type = first.norm_type == 1 ? NormType::one : first.norm_type == 2 ? NormType::two : NormType::inf;
  bool routes_hold = slices_hold;
  for (size_t g = 0; g < groups_.size(); ++g) {
    driver_.groups[g] = groups_[g].hyper;
    driver_.lr[g] = groups_[g].device_lr;
    routes_hold &= groups_[g].kernels == kernels[g];
  }
  return routes_hold;
}

// Something is not as it must be; Python's check says what.
void SgdPlan::complain() const {
  check_(param_groups_, state_);
  TORCH_INTERNAL_ASSERT(false, "regfused: an option is refused by the plan, but passes the check in Python");
}

// A parameter's hook may hold the optimizer, which holds this plan, which holds the parameter.
int SgdPlan::traverse(visitproc visit, void* arg) {
  Py_VISIT(check_.ptr());
  Py_VISIT(param_groups_.ptr());
  Py_VISIT(state_.ptr());
  Py_VISIT(leftover.ptr());
  for (const SgdGroup& group : groups_)
    if (int stop = group.traverse(visit, arg)) return stop;
  for (const Param& param : params_) {
    Py_VISIT(param.object.ptr());
    Py_VISIT(param.buffer.ptr());
  }
  for (const StateEntry& entry : entries_) {
    Py_VISIT(entry.key.ptr());
    Py_VISIT(entry.value.ptr());
    Py_VISIT(entry.buffer.ptr());
  }
  return 0;
}

void SgdPlan::clear() {
  forget();
  check_ = py::function();
  param_groups_ = py::object();
  state_ = py::object();
  leftover = py::list();
}

}  // namespace regfused
