// The elastic net as a differentiable number, for eager Python.
#pragma once

#include <pybind11/pybind11.h>

namespace regfused {

// (value, leftovers): the penalty of the tensors that the kernels take, or None where there is none, and the indices of
// the others.
pybind11::tuple penalty(const pybind11::list& params, double l1, double l2);

}  // namespace regfused
