// What a step under a norm over ranks looks at of each parameter. See members.h.
#include "members.h"

#include <torch/csrc/autograd/python_variable.h>

#include "python_values.h"

namespace regfused {

namespace {

py::object attribute(PyObject* object, const py::str& name) {
  PyObject* value = PyObject_GetAttr(object, name.ptr());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

PyObject* or_null(py::handle object) { return object.is_none() ? nullptr : object.ptr(); }

}  // namespace

Members::Members(py::function is_spread_as, py::function part_of)
    : is_spread_as_(std::move(is_spread_as)),
      part_of_(std::move(part_of)),
      params_name_("params"),
      local_name_("_local_tensor"),
      spec_name_("_spec") {}

void Members::add(size_t group, py::handle param, const at::Tensor& part, py::object spec) {
  if (sizes_.size() <= group) sizes_.resize(group + 1);
  ++sizes_[group];
  Member member{param.ptr(), nullptr, {}, {}, {}, nullptr, {}, false};
  if (!spec.is_none()) {
    member.local = attribute(param.ptr(), local_name_).ptr();
    member.part = part;
    member.spec_of_grad = member.spec = std::move(spec);
  }
  members_.push_back(std::move(member));
}

void Members::know_state(size_t number, py::handle own, const std::vector<std::pair<py::str, py::handle>>& slots) {
  Member& member = members_[number];
  member.own = or_null(own);
  member.slots.clear();
  for (const auto& [name, slot] : slots) member.slots.emplace_back(name, or_null(slot));
  entries_.clear();
}

bool Members::open(const py::list& param_groups, const py::dict& state) {
  if (!has_same_params(param_groups) || !has_same_state(state)) return false;
  for (Member& member : members_)
    if (!take_grad(member)) return false;
  return true;
}

bool Members::changed() const {
  if (had_grad_.size() != members_.size()) return true;
  for (size_t i = 0; i < members_.size(); ++i)
    if (had_grad_[i] != members_[i].has_grad) return true;
  return false;
}

void Members::settle() {
  had_grad_.clear();
  for (const Member& member : members_) had_grad_.push_back(member.has_grad);
}

bool Members::has_same_params(const py::list& param_groups) const {
  if (param_groups.size() < sizes_.size()) return false;
  size_t next = 0;
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::object group = param_groups[g];
    PyObject* params = lookup(group.ptr(), params_name_.ptr());
    if (!params || (!PyList_Check(params) && !PyTuple_Check(params))) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(params);
    if (static_cast<size_t>(size) != (g < sizes_.size() ? sizes_[g] : 0)) return false;
    for (Py_ssize_t i = 0; i < size; ++i)
      if (PySequence_Fast_GET_ITEM(params, i) != members_[next++].param) return false;
  }
  return true;
}

// Hashing a tensor runs Python code: mostly it is enough to go through the dictionary once.
bool Members::has_same_state(const py::dict& state) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t i = 0;
  bool same = !entries_.empty() && entries_.size() == state.size();
  while (same && PyDict_Next(state.ptr(), &position, &key, &value)) {
    same = entries_[i].first == key && entries_[i].second == value;
    ++i;
  }
  if (!same) {
    entries_.clear();
    for (const Member& member : members_)
      if (lookup(state.ptr(), member.param) != member.own) return false;
    position = 0;
    while (PyDict_Next(state.ptr(), &position, &key, &value)) entries_.emplace_back(key, value);
  }
  for (const Member& member : members_)
    for (const auto& [name, slot] : member.slots)
      if (lookup(member.own, name.ptr()) != slot) return false;
  return true;
}

// False where the gradient is spread in another way than its parameter.
bool Members::take_grad(Member& member) {
  const at::Tensor& grad = THPVariable_Unpack(member.param).unsafeGetTensorImpl()->grad();
  member.has_grad = grad.defined();
  if (!member.spec) return true;
  if (attribute(member.param, local_name_).ptr() != member.local) return false;
  if (!member.has_grad) return true;
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  if (!py::hasattr(object, spec_name_)) return false;
  py::object spec = attribute(object.ptr(), spec_name_);
  if (!spec.is(member.spec_of_grad)) {
    if (!py::cast<bool>(is_spread_as_(spec, member.spec))) return false;
    member.spec_of_grad = std::move(spec);
  }
  py::object local = attribute(object.ptr(), local_name_);
  if (!THPVariable_CheckExact(local.ptr())) local = part_of_(object);
  member.part.mutable_grad() = THPVariable_Unpack(local.ptr());
  return true;
}

void Members::bump_versions() {
  const auto bump = [](PyObject* object) {
    if (!is_tensor(object)) return;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    // Of what is no DTensor, such as a count of steps, the plan has bumped the version.
    if (tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor.is_inference())
      tensor.unsafeGetTensorImpl()->bump_version();
  };
  for (const Member& member : members_) {
    if (!member.has_grad || !member.spec) continue;
    bump(member.param);
    for (const auto& [name, slot] : member.slots)
      if (slot) bump(slot);
  }
}

void Members::release() {
  for (Member& member : members_)
    if (member.part.defined() && member.part.grad().defined()) member.part.mutable_grad() = at::Tensor();
}

}  // namespace regfused
