// What an optimizer keeps between steps, so that Python pays the same for one tensor as for a
// thousand: which parameters the kernels take, their memory, their state, the chunks.
//
// A step is collect -> norm -> update. Collecting checks everything and changes nothing, the norm
// pass reads, and the update commits fresh state and then runs what cannot fail.
//
// Between steps a plan owns none of Python's objects: what Python lets go of is free at once. It knows
// addresses of objects, and what was found of each; whether that still holds is looked up at each step,
// for another tensor may have come to an address. So it does not matter which tensor is there, if its memory,
// type and layout are those that the plan was made for.
//
// The host judges the norm, or, where all tensors are on CUDA devices, the devices do: then the host
// waits for nothing. It has to be the host that judges where it must raise (nonfinite="error"), where
// the reference takes part, and where a step may be skipped that would make fresh state.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include "step_drive.h"
#include "step_group.h"

namespace regfused {

namespace py = pybind11;

class StepPlan {
 public:
  // The rule by its name; the optimizer's class, for messages. check(param_groups, state) raises for every
  // hyperparameter and state tensor that is not as it must be; it holds the messages, this class only notices that
  // something is odd.
  StepPlan(const std::string& rule, const std::string& optimizer, py::function check);

  // The whole step. False where tensors are left to the reference, or where the step is shared: nothing has changed
  // yet, `leftover` holds (group index, index in the group, parameter), and the caller goes on with norm(), judge() and
  // update(), and calls release() whatever happens.
  bool step(py::list param_groups, py::dict state, py::handle grad_scale, py::handle found_inf);

  // Whether the step as a whole needs its norm before anything can be updated.
  bool needs_norm() const;
  // The norm over the tensors here.
  double norm();
  // Forms the clip coefficient of the norm over all tensors of the step (NaN unless needs_norm).
  // False: the step is skipped, and nothing changes.
  bool judge(double norm);
  // Updates the tensors here, and then writes what the reference made of the others: each source into
  // its target, added where it is sparse, under the caller's autograd mode. No Python runs in between (but
  // that of tensor subclasses), so that no signal can come between two tensors.
  void update(const std::vector<at::Tensor>& targets, const std::vector<at::Tensor>& sources);
  // Lets go of everything that a step holds. A step that comes to its end does it itself.
  void release();
  // (grad_norm, clip_coef, penalty, skipped) of the last step, of the tensors here; grad_norm is None where nothing
  // asked for it. The penalty is of the last step that was not skipped, skipped counts all steps so far that left no
  // trace. Floats; 0-dim tensors where a device has the numbers.
  py::tuple numbers() const;
  // (group index, index in the group) of each tensor here that the last step that was not skipped has updated.
  std::vector<std::pair<int, int>> stepped() const;
  // How many tensors the kernels take.
  size_t tensors() const { return driver_.rows.size(); }

  // What became of the last step: "stepped" (or left to the devices to judge), "overflow" or "nonfinite": skipped.
  const char* outcome() const { return outcome_; }

  // Whether every step is left open, as where tensors are left to the reference: the caller has more of it, on other
  // plans or other ranks.
  bool is_shared = false;

  // How many tensors of the state the last step made.
  size_t made() const { return made_; }

  py::list leftover;
  double clip_coef() const { return scalars_.clip_coef; }

 private:
  // The address of a parameter, and its type. What is there may be read only within a step, which holds it.
  struct Known {
    PyObject* param = nullptr;
    PyTypeObject* type = nullptr;
  };
  struct Param {
    int32_t group = 0;
    int32_t index = 0;         // within its group
    int32_t row = -1;          // in driver_.rows, or -1: left to the reference
    bool stepped = false;      // by the last step
    bool is_async = false;     // its device goes on while the host does something else
    c10::DispatchKeySet keys;  // as they were when the parameter was found eligible
    at::ScalarType dtype = at::kFloat;
    std::vector<int64_t> strides;  // empty: contiguous
    std::vector<int64_t> sizes;    // where they matter: the group lasso has slices
  };
  // A tensor in a parameter's state: a slot of the rule, or the count of its steps. Its address, and what is there, as
  // it was found. Null: there is none.
  struct StateTensor {
    PyObject* object = nullptr;
    PyTypeObject* type = nullptr;
    void* memory = nullptr;
    c10::DispatchKeySet keys;
    at::ScalarType dtype = at::kFloat;
    bool relay = false;  // of another layout, type or device: to be copied into one as the kernels need it
  };
  // A state tensor that becomes part of the state once the step is certain to happen, and what was there before.
  struct Pending {
    size_t param;
    int name;  // an index of names_
    at::Tensor tensor;
    py::object previous = {};
    bool fresh_entry = false;
  };

  // What is known: step_plan.cpp.
  bool is_known();
  void build();
  void list_params();
  void check_group_dims() const;
  void plan_rows();
  void plan_row(size_t p, PyObject* const* state);
  bool plan_state(size_t p, const at::Tensor& tensor, PyObject* const* state);
  bool has_same_state(PyObject* entry, PyObject* const* known) const;
  void remember_state();
  bool read_options();
  [[noreturn]] void complain() const;
  void forget();
  void hold_all();

  // One step: step_plan_run.cpp.
  bool is_same(size_t p) const;
  const at::Tensor& tensor_of(size_t p) const;
  const StateTensor& found(size_t p, int name) const { return found_[p * names_.size() + name]; }
  StateTensor& found(size_t p, int name) { return found_[p * names_.size() + name]; }
  // Index of a slot of the rule in names_.
  int name_of_slot(int slot) const { return slot + (rule_.counts_steps ? 1 : 0); }
  std::string name_of(const Param& param) const;
  bool is_unchanged(const Param& param, const at::Tensor& tensor) const;
  bool is_unchanged_slot(const StateTensor& known, const at::Tensor& param) const;
  bool is_unchanged_count(const StateTensor& known, const at::Tensor& param) const;
  static constexpr int64_t kAhead = 16;  // parameters
  void ask_ahead(int64_t p, int64_t begin, int64_t end) const;
  bool collect();
  bool collect_usual(size_t p);
  bool collect_closely(size_t p);
  std::string why_left(size_t p, const at::Tensor& tensor, const at::Tensor& grad) const;
  void collect_gradient(size_t p, const at::Tensor& tensor, const at::Tensor& grad);
  bool collect_usual_state(size_t p, const at::Tensor& tensor);
  bool collect_state(size_t p, const at::Tensor& tensor);
  void* collect_slot(size_t p, int slot, const at::Tensor& tensor);
  void collect_count(size_t p, const at::Tensor& tensor);
  void check_open() const;
  double norm_pass();
  void update_pass();
  const char* why_host_judges() const;
  void let_devices_judge();
  bool let_host_judge(py::handle grad_scale, py::handle found_inf);
  template <class Update>
  void run(Update update);
  void finish_update();
  [[noreturn]] void raise_nonfinite(double norm) const;
  void commit();
  void commit_state(Pending& pending);
  void roll_back(size_t count);
  void count_and_bump_versions();

  const RuleId rule_id_;
  const RuleInfo& rule_;
  const std::string operation_;  // for messages
  py::function check_;
  // Keys of what a parameter's state holds: the count of steps, where the rule has one, then its slots.
  std::vector<PyObject*> names_;
  std::vector<StepGroup> groups_;
  std::vector<Param> params_;
  std::vector<Known> known_;         // one for each of params_
  std::vector<StateTensor> found_;   // one for each of params_ and names_
  std::vector<PyObject*> entries_;   // keys of the state, in the order of the dictionary
  std::vector<PyObject*> in_entry_;  // one for each of entries_ and names_: what is there
  StepDriver driver_;
  StepScalars scalars_;
  bool busy_ = false;
  bool is_open_ = false;  // a step is left to Python between collect and update

  // Of the last step, as the host knows them. Where the devices judged, they have the norm and the coefficient.
  const char* outcome_ = "stepped";
  bool devices_judged_ = false;
  bool measured_ = false;  // whether something needed a norm: measuring it would take a pass
  double grad_norm_ = NAN;
  double clip_coef_ = 1;
  double penalty_ = 0;
  bool knows_stepped_ = false;  // Param::stepped is of the last step
  std::vector<std::pair<int, int>> stepped_before_;
  int64_t skipped_ = 0;
  size_t made_ = 0;

  // Of one step, until its end.
  py::object param_groups_, state_;
  std::vector<py::object> held_;  // see hold_all
  double judged_norm_ = NAN;
  std::vector<at::Tensor> grads_;                                // one for each of params_
  std::vector<std::pair<at::Tensor, at::Tensor>> relaid_grads_;  // the gradient, its copy
  std::vector<Pending> pending_;
};

}  // namespace regfused
