// A parameter group as Python holds it: its options, read again each step.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>

#include "rule/sgd_rule.h"

namespace regfused {

struct StepGroup {
  enum class Nonfinite { propagate, skip, error };
  // odd: an option is not as it must be; Python's check knows the message.
  enum class Read { same, changed, odd };

  // Within a step: the group, and a list or tuple of what is in dict["params"].
  pybind11::object dict;
  pybind11::object params;
  Py_ssize_t size = 0;  // how many there were when they were listed

  SgdHyper hyper;
  int64_t group_dim = 0;  // as it was written: which tensors have it is the plan's to check
  // Defined where lr is a tensor in the memory of a device: hyper.lr is then unknown until read_lr().
  at::Tensor device_lr;
  bool clips = false;
  double max_norm = 0;
  double norm_type = 2;
  Nonfinite nonfinite = Nonfinite::propagate;
  bool kernels = true;    // fused is not False, neither foreach nor differentiable
  bool demanded = false;  // fused=True

  void hold(PyObject* group);
  // Lets go of all that belongs to somebody else.
  void release();

  // Reads the options, unless they are the very objects of the last time.
  Read read();

  // Waits for a device that holds lr. False where it is not as it must be.
  bool read_lr();

  // Whether both agree on what is one value for the whole optimizer.
  bool agrees(const StepGroup& other) const {
    return clips == other.clips && max_norm == other.max_norm && norm_type == other.norm_type &&
           nonfinite == other.nonfinite;
  }

 private:
  static constexpr int kOptions = 20;
  // Numbers, strings, True, False and None of the last time; null for what may change or hold memory.
  std::array<pybind11::object, kOptions> values_;
  bool reread_ = true;  // something was refused
};

}  // namespace regfused
