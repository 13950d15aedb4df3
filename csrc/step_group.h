// A parameter group as Python holds it: its options, read again each step.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "rule/rules.h"

namespace regfused {

// One option and where its value goes.
struct StepOption {
  PyObject* key;
  OptionKind kind;
  size_t where;
  bool of_rule;  // `where` is in the rule's hyperparameters
};

// The options of the engine and of a rule, with their keys. Made once for each rule.
const std::vector<StepOption>& step_options(RuleId rule);

struct StepGroup {
  enum class Nonfinite { propagate, skip, error };
  // odd: an option is not as it must be; Python's check knows the message.
  enum class Read { same, changed, odd };

  explicit StepGroup(RuleId rule);

  // Within a step: the group, and a list or tuple of what is in dict["params"].
  pybind11::object dict;
  pybind11::object params;
  Py_ssize_t size = 0;  // how many there were when they were listed

  StepHyper hyper;
  unsigned slot_set = 0;  // which slots its parameters need
  int64_t group_dim = 0;  // as it was written: which tensors have it is the plan's to check
  // Defined where lr is a tensor in the memory of a device: hyper.lr is then unknown until read_lr().
  at::Tensor device_lr;
  bool clips = false;
  double max_norm = 0;
  double norm_type = 2;
  Nonfinite nonfinite = Nonfinite::propagate;
  bool kernels = true;    // fused is not False, neither foreach nor differentiable
  bool demanded = false;  // fused=True

  // `operation`: for messages.
  void hold(PyObject* group, const std::string& operation);
  // Lets go of all that belongs to somebody else.
  void release();

  // Reads the options, unless they are the very objects of the last time.
  Read read();

  // Waits for a device that holds lr. False where it is not as it must be.
  bool read_lr();

  // True if both have the same options of the whole optimizer.
  bool agrees(const StepGroup& other) const {
    return clips == other.clips && max_norm == other.max_norm && norm_type == other.norm_type &&
           nonfinite == other.nonfinite;
  }

 private:
  bool read_option(const StepOption& option, PyObject* value);
  bool read_rest(PyObject* const* values);

  RuleId rule_;
  // Numbers, strings, True, False and None of the last time; null for what may change or hold memory.
  std::vector<pybind11::object> values_;
  bool reread_ = true;  // something was refused
};

}  // namespace regfused
