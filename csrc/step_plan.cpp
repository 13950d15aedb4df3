// What an optimizer keeps between steps: what is known, and when it no longer holds.
#include "step_plan.h"

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

// True if the kernels can step with this slot; one of another layout or type is copied first.
bool slot_fits(PyObject* object, const at::Tensor& param) {
  if (!is_tensor(object) || !is_plain(object)) return false;
  const at::Tensor& slot = THPVariable_Unpack(object);
  return slot.layout() == at::kStrided && slot.device() == param.device() && slot.is_floating_point() &&
         slot.sizes() == param.sizes();
}

// The same for a count of steps.
bool count_fits(PyObject* object) {
  if (!is_tensor(object) || !is_plain(object)) return false;
  const at::Tensor& count = THPVariable_Unpack(object);
  return count.layout() == at::kStrided && count.is_floating_point() && count.numel() == 1 && !count.is_meta();
}

RuleId rule_of(const std::string& name) {
  const int rule = rule_named(name);
  TORCH_INTERNAL_ASSERT(rule >= 0, "regfused: there is no rule of this name: ", name);
  return static_cast<RuleId>(rule);
}

}  // namespace

StepPlan::StepPlan(const std::string& rule, const std::string& optimizer, py::function check)
    : rule_id_(rule_of(rule)),
      rule_(info_of(rule_id_)),
      operation_("regfused." + optimizer + ".step"),
      check_(std::move(check)) {
  driver_.rule = rule_id_;
  if (rule_.counts_steps) names_.push_back(interned("step"));
  for (int slot = 0; slot < rule_.slot_count; ++slot) names_.push_back(interned(rule_.slots[slot]));
}

bool StepPlan::needs_norm() const {
  return !groups_.empty() && (groups_.front().clips || groups_.front().nonfinite != StepGroup::Nonfinite::propagate);
}

// Whether groups, parameters and state have the addresses that they had when the plan was made. What is there now is
// for collect to see.
bool StepPlan::is_known() {
  if (groups_.empty() || static_cast<size_t>(PyList_GET_SIZE(param_groups_.ptr())) != groups_.size()) return false;
  size_t p = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* dict = PyList_GET_ITEM(param_groups_.ptr(), static_cast<Py_ssize_t>(g));
    if (!PyDict_Check(dict)) return false;
    groups_[g].hold(dict, operation_);
    PyObject* list = groups_[g].params.ptr();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
    if (size != groups_[g].size) return false;
    for (Py_ssize_t i = 0; i < size; ++i, ++p) {
      PyObject* object = PySequence_Fast_GET_ITEM(list, i);
      if (p == params_.size() || object != known_[p].param) return false;
    }
  }
  if (p != params_.size()) return false;
  // The state, in its own order: no hashing, no lookup.
  if (static_cast<size_t>(PyDict_Size(state_.ptr())) != entries_.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t e = 0; PyDict_Next(state_.ptr(), &position, &key, &value); ++e)
    if (key != entries_[e] || !PyDict_Check(value) || !has_same_state(value, &in_entry_[e * names_.size()]))
      return false;
  return true;
}

// True if an entry of the state holds these objects under names_.
bool StepPlan::has_same_state(PyObject* entry, PyObject* const* known) const {
  // As a step writes it: nothing else, in this order.
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t n = 0;
  while (n < names_.size() && PyDict_Next(entry, &position, &key, &value) && key == names_[n]) {
    if (value != known[n]) return false;
    ++n;
  }
  const bool was_all = static_cast<size_t>(PyDict_Size(entry)) == n;
  for (; n < names_.size(); ++n)
    if (known[n] != (was_all ? nullptr : lookup(entry, names_[n]))) return false;
  return true;
}

void StepPlan::remember_state() {
  entries_.clear();
  in_entry_.clear();
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state_.ptr(), &position, &key, &value)) {
    entries_.push_back(key);
    for (PyObject* name : names_) in_entry_.push_back(PyDict_Check(value) ? lookup(value, name) : nullptr);
  }
}

void StepPlan::forget() {
  if (knows_stepped_) stepped_before_ = stepped();
  knows_stepped_ = false;
  groups_.clear();
  params_.clear();
  known_.clear();
  found_.clear();
  entries_.clear();
  in_entry_.clear();
  driver_.rows.clear();
  driver_.groups.clear();
  driver_.lr.clear();
  grads_.clear();
  relaid_grads_.clear();
  pending_.clear();
}

void StepPlan::release() {
  is_open_ = false;
  grads_.clear();
  relaid_grads_.clear();
  pending_.clear();
  driver_.grad_scale = driver_.found_inf = at::Tensor();
  for (at::Tensor& lr : driver_.lr) lr = at::Tensor();
  for (StepGroup& group : groups_) group.release();
  if (!leftover.empty()) leftover = py::list();
  held_.clear();
  param_groups_ = state_ = py::object();
}

// For the rest of a step in which other Python code may run, and let go of what the step works on.
void StepPlan::hold_all() {
  for (const Known& known : known_) held_.push_back(py::reinterpret_borrow<py::object>(known.param));
  for (const StateTensor& tensor : found_)
    if (tensor.object) held_.push_back(py::reinterpret_borrow<py::object>(tensor.object));
}

void StepPlan::build() {
  forget();
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

void StepPlan::list_params() {
  for (const py::handle dict : param_groups_) {
    TORCH_CHECK_TYPE(PyDict_Check(dict.ptr()), operation_, ": param_groups must hold dictionaries");
    const size_t g = groups_.size();
    StepGroup group(rule_id_);
    group.hold(dict.ptr(), operation_);
    PyObject* list = group.params.ptr();
    group.size = PySequence_Fast_GET_SIZE(list);
    for (Py_ssize_t i = 0; i < group.size; ++i) {
      PyObject* object = PySequence_Fast_GET_ITEM(list, i);
      TORCH_CHECK_TYPE(is_tensor(object), operation_, ": parameter ", i, " of group ", g,
                       " must be a tensor, but is a ", Py_TYPE(object)->tp_name);
      Param param;
      param.group = static_cast<int32_t>(g);
      param.index = static_cast<int32_t>(i);
      params_.push_back(std::move(param));
      known_.push_back({object, Py_TYPE(object)});
    }
    groups_.push_back(std::move(group));
  }
  found_.assign(params_.size() * names_.size(), StateTensor());
  driver_.groups.resize(groups_.size());
  driver_.lr.resize(groups_.size());
}

// Every parameter must have the slices that its group asks for.
void StepPlan::check_group_dims() const {
  for (size_t p = 0; p < params_.size(); ++p) {
    const StepGroup& group = groups_[params_[p].group];
    if (group.hyper.group_l1 != 0 && !has_slices(tensor_of(p), group.group_dim)) complain();
  }
}

// Rows of the driver's table for the parameters that the kernels take.
void StepPlan::plan_rows() {
  std::unordered_map<PyObject*, size_t> entry_by_key;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state_.ptr(), &position, &key, &value))
    if (!PyDict_Check(value)) check_(param_groups_, state_);
  for (size_t e = 0; e < entries_.size(); ++e) entry_by_key.emplace(entries_[e], e);
  const std::vector<PyObject*> nothing(names_.size(), nullptr);
  for (size_t p = 0; p < params_.size(); ++p) {
    const auto entry = entry_by_key.find(known_[p].param);
    plan_row(p, entry == entry_by_key.end() ? nothing.data() : &in_entry_[entry->second * names_.size()]);
  }

  std::vector<MemoryRange> memory;
  for (size_t p = 0; p < params_.size(); ++p)
    if (params_[p].row >= 0) memory.push_back(memory_of(tensor_of(p)));
  if (any_overlap(memory)) {
    // One parameter listed twice, or two that share memory: the order of updates has a meaning
    // then, which parallel chunks do not keep. The reference does.
    for (const StepGroup& group : groups_)
      TORCH_CHECK(!group.demanded, operation_,
                  ": fused=True demands parameters that share no memory, but two of them do");
    for (Param& param : params_) param.row = -1;
    driver_.rows.clear();
    return;
  }
  std::string names;
  for (int slot = 0; slot < rule_.slot_count; ++slot) names += (slot ? ", " : "") + std::string(rule_.slots[slot]);
  for (size_t p = 0; p < params_.size(); ++p)
    for (size_t n = 0; n < names_.size() && params_[p].row >= 0; ++n)
      if (const StateTensor& known = found(p, static_cast<int>(n)); known.object && !known.relay)
        memory.push_back(memory_of(THPVariable_Unpack(known.object)));
  TORCH_CHECK_VALUE(!any_overlap(std::move(memory)), operation_, ": a tensor of the state (", names,
                    ") must share no memory with a parameter or another one, but one does");
}

void StepPlan::plan_row(size_t p, PyObject* const* state) {
  Param& param = params_[p];
  const at::Tensor& tensor = tensor_of(p);
  if (!groups_[param.group].kernels || !is_plain(known_[p].param) || !why_not_fused(tensor).empty()) return;
  if (!plan_state(p, tensor, state)) {
    // Python raises, or knows what is there as the reference's, such as a sparse buffer.
    check_(param_groups_, state_);
    for (size_t n = 0; n < names_.size(); ++n) found(p, static_cast<int>(n)) = StateTensor();
    return;
  }
  param.row = static_cast<int32_t>(driver_.rows.size());
  param.keys = tensor.key_set();
  param.dtype = tensor.scalar_type();
  param.is_async = is_asynchronous(kernel_device(tensor));
  if (!tensor.is_contiguous()) param.strides = tensor.strides().vec();
  StepRow row;
  row.param = tensor.data_ptr();
  row.numel = tensor.numel();
  row.group = param.group;
  row.device = driver_.index_of(kernel_device(tensor));
  row.dtype = dtype_of(tensor);
  if (const StepGroup& group = groups_[param.group]; group.hyper.group_l1 != 0) {
    row.slices = slices_along(tensor, group.group_dim);
    param.sizes = tensor.sizes().vec();
  }
  driver_.rows.push_back(row);
}

// Notes the state tensors of a parameter. False where one is not for the kernels.
bool StepPlan::plan_state(size_t p, const at::Tensor& tensor, PyObject* const* state) {
  for (size_t n = 0; n < names_.size(); ++n) {
    PyObject* object = state[n];
    if (!object || object == Py_None) continue;
    const bool is_count = rule_.counts_steps && n == 0;
    if (!(is_count ? count_fits(object) : slot_fits(object, tensor))) return false;
    const at::Tensor& there = THPVariable_Unpack(object);
    StateTensor& known = found(p, static_cast<int>(n));
    known.object = object;
    known.type = Py_TYPE(object);
    known.keys = there.key_set();
    known.dtype = there.scalar_type();
    known.memory = there.data_ptr();
    if (is_count)
      known.relay = (known.dtype != at::kFloat && known.dtype != at::kDouble) || there.device() != tensor.device();
    else
      known.relay = !same_layout(there, tensor) || known.dtype != tensor.scalar_type();
    known.relay |= there.is_neg();
  }
  return true;
}

// Reads the options of all groups. False where a group went over to the reference, or back, or where it
// has other slices: then the plan must be built again.
bool StepPlan::read_options() {
  std::vector<bool> kernels;
  bool changed = false, slices_hold = true;
  for (StepGroup& group : groups_) {
    kernels.push_back(group.kernels);
    const bool had_slices = group.hyper.group_l1 != 0;
    const int64_t group_dim = group.group_dim;
    const StepGroup::Read read = group.read();
    if (read == StepGroup::Read::odd) complain();
    changed |= read == StepGroup::Read::changed;
    const bool has_slices = group.hyper.group_l1 != 0;
    slices_hold &= has_slices == had_slices && (!has_slices || group.group_dim == group_dim);
  }
  if (!changed) return true;
  const StepGroup& first = groups_.front();
  const bool has_kernels = is_fused_norm(first.norm_type);
  for (StepGroup& group : groups_) {
    if (!group.agrees(first)) complain();
    TORCH_CHECK(has_kernels || !group.demanded, operation_, ": fused=True demands norm_type 1, 2 or inf, but got ",
                group.norm_type);
    group.kernels &= has_kernels;
  }
  scalars_.norm_type = fused_norm(first.norm_type);
  bool routes_hold = slices_hold;
  for (size_t g = 0; g < groups_.size(); ++g) {
    driver_.groups[g] = groups_[g].hyper;
    driver_.lr[g] = groups_[g].device_lr;
    routes_hold &= groups_[g].kernels == kernels[g];
  }
  return routes_hold;
}

// Something is not as it must be; Python's check says what.
void StepPlan::complain() const {
  check_(param_groups_, state_);
  TORCH_INTERNAL_ASSERT(false, "regfused: an option is refused by the plan, but passes the check in Python");
}

}  // namespace regfused
