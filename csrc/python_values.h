// Reading Python objects: dictionary entries, numbers, and whether a tensor is a plain one.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace regfused {

// An interned string, which dictionaries find by identity. Never freed.
PyObject* interned(const char* text);

// dict[name] as a borrowed reference, or nullptr. Raises what the lookup raises.
PyObject* lookup(PyObject* dict, PyObject* name);

// A number or a 1-element tensor as a double; NaN where it is neither, so that every check fails.
double number(PyObject* value);

// A plain 1-element tensor whose value the host would have to wait for; otherwise an undefined one.
at::Tensor number_on_device(PyObject* value);

// Whether this is a torch.Tensor or of a class derived from it: runs no Python.
bool is_tensor(PyObject* object);

// Whether a tensor's class is torch.Tensor, Parameter, Buffer, or one derived from them that has neither
// __torch_function__ nor __torch_dispatch__ of its own: what lies in its memory is all there is.
bool is_plain(PyObject* tensor);

}  // namespace regfused
