// Whether somebody watches what tensors are asked to do.
#include "watch.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>

#include "tensor_check.h"

namespace regfused {

namespace py = pybind11;

namespace {

// What modes and tracers put among the keys of their thread; for transforms see in_functional_transform().
constexpr c10::DispatchKeySet kWatchers({c10::DispatchKey::Python, c10::DispatchKey::PreDispatch,
                                         c10::DispatchKey::Tracer, c10::DispatchKey::Functionalize});

// torch.set_default_device is a TorchFunctionMode, too. It only adds a device to calls that make tensors.
bool is_default_device(const c10::SafePyObject& mode) {
  static PyObject* const type =
      py::object(py::module_::import("torch.utils._device").attr("DeviceContext")).release().ptr();
  return reinterpret_cast<PyObject*>(Py_TYPE(mode.ptr(getPyInterpreter()))) == type;
}

}  // namespace

bool in_jit_trace() { return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer); }

bool in_function_mode() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  const py::gil_scoped_acquire looks_at_python_objects;
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i)
    if (!is_default_device(*at::impl::PythonTorchFunctionTLS::get_stack_at(i))) return true;
  return false;
}

bool is_watched() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - keys.excluded_).has_any(kWatchers) || in_functional_transform() || in_function_mode();
}

}  // namespace regfused
