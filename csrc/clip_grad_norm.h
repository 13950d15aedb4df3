// The norm of all gradients of a list of parameters, and clipping by it.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include "rule/norm_rule.h"

namespace regfused {

// The norm of the gradients of these parameters, a 0-dim tensor; None where one of the gradients is not for the
// kernels: then nothing has changed. Given a max_norm, every gradient is multiplied by torch's clip coefficient. With
// `finite` a norm that is not raises before anything changed.
pybind11::object clip_grad_norm(const pybind11::list& params, double norm_type, std::optional<double> max_norm,
                                bool finite);

}  // namespace regfused
