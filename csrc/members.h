// What a step under a norm over ranks looks at of each parameter, every time: whether parameter, part and state are the
// objects that were found, and the gradient, which its part is given. In Python that takes as long as the step itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

namespace regfused {

namespace py = pybind11;

class Members {
 public:
  // is_spread_as(spec, other): of two specs of DTensors that are not one object; part_of(grad): what this process has
  // of a gradient that may be under way.
  Members(py::function is_spread_as, py::function part_of);

  // The next parameter, in one of the groups: what this process has of it, and how it is spread; None where it is no
  // DTensor and `part` is the parameter itself. Whoever adds it keeps it, its part and its state alive.
  void add(size_t group, py::handle param, const at::Tensor& part, py::object spec);
  // What is in the state of a parameter, by its number: the dictionary, or None, and objects in it by name, or None.
  void know_state(size_t number, py::handle own, const std::vector<std::pair<py::str, py::handle>>& slots);

  // Whether all is as it was found. Then every part has its gradient, until release().
  bool open(const py::list& param_groups, const py::dict& state);
  void release();
  // After a step through the parts: autograd must see that DTensors with a gradient, and their state, have changed.
  void bump_versions();

  // Of the last open().
  bool has_grad(size_t number) const { return members_[number].has_grad; }
  // Whether other parameters have one than when settle() was called.
  bool changed() const;
  void settle();

 private:
  struct Member {
    PyObject* param;
    PyObject* local;          // what the DTensor has
    at::Tensor part;          // the same; undefined where it is no DTensor
    py::object spec;          // likewise null
    py::object spec_of_grad;  // one that was found to be equal
    PyObject* own = nullptr;  // its state
    std::vector<std::pair<py::str, PyObject*>> slots;
    bool has_grad = false;
  };

  bool has_same_params(const py::list& param_groups) const;
  bool has_same_state(const py::dict& state);
  bool take_grad(Member& member);

  py::function is_spread_as_, part_of_;
  py::str params_name_, local_name_, spec_name_;
  std::vector<Member> members_;
  std::vector<size_t> sizes_;                             // of the groups
  std::vector<std::pair<PyObject*, PyObject*>> entries_;  // of the whole state, in its order, as they were last
  std::vector<bool> had_grad_;
};

}  // namespace regfused
