// Reading Python objects: dictionary entries, numbers, and whether a tensor is a plain one.
#include "python_values.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <vector>

#include "devices.h"

namespace regfused {

namespace py = pybind11;

PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (!string) throw py::error_already_set();
  return string;
}

PyObject* lookup(PyObject* dict, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(dict, name);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    const bool usable = tensor.layout() == at::kStrided && !tensor.is_meta() && !tensor.is_quantized() &&
                        tensor.scalar_type() != at::kBool && !tensor.is_complex() && tensor.numel() == 1;
    return usable ? tensor.item().toDouble() : NAN;
  }
  const double result = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return NAN;
  }
  return result;
}

at::Tensor number_on_device(PyObject* value) {
  if (!THPVariable_Check(value) || !is_plain(value)) return {};
  const at::Tensor& tensor = THPVariable_Unpack(value);
  const bool usable = is_asynchronous(tensor.device()) && tensor.numel() == 1 && tensor.layout() == at::kStrided &&
                      tensor.is_floating_point() && !tensor.is_neg() && !tensor.is_meta();
  return usable ? tensor : at::Tensor();
}

bool is_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ||
         PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

bool is_plain(PyObject* tensor) {
  if (THPVariable_CheckExact(tensor)) return true;
  static PyObject* const function = interned("__torch_function__");
  static PyObject* const dispatch = interned("__torch_dispatch__");
  const auto of_tensor = [](PyObject* name) {
    return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(THPVariableClass), name);
  };
  PyObject* const own = _PyType_Lookup(Py_TYPE(tensor), function);
  return (own == of_tensor(function) ||
          own == _PyType_Lookup(reinterpret_cast<PyTypeObject*>(ParameterClass), function)) &&
         _PyType_Lookup(Py_TYPE(tensor), dispatch) == of_tensor(dispatch);
}

}  // namespace regfused
