// The norm of all gradients of a list of parameters, and clipping by it.
#include "clip_grad_norm.h"

#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <vector>

#include "foreach_drive.h"
#include "python_values.h"
#include "tensor_check.h"
#include "watch.h"

namespace regfused {

namespace py = pybind11;

namespace {

// A norm type as Python writes it.
const char* text_of(double norm_type) { return norm_type == 1 ? "1.0" : norm_type == 2 ? "2.0" : "inf"; }

// False where one of the gradients is not for the kernels.
bool collect_grads(const py::list& params, std::vector<at::Tensor>& grads) {
  std::vector<MemoryRange> memory;
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const object = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    TORCH_CHECK_TYPE(THPVariable_Check(object), "regfused.clip_grad_norm_: parameters must be tensors, but item ", i,
                     " is a ", Py_TYPE(object)->tp_name);
    if (!is_plain(object)) return false;
    // Not Tensor::grad(), which warns where the tensor is no leaf.
    const at::Tensor& grad = std::as_const(*THPVariable_Unpack(object).unsafeGetTensorImpl()).grad();
    if (!grad.defined()) continue;
    if (!why_not_fused(grad).empty()) return false;
    memory.push_back(memory_of(grad));
    grads.push_back(grad);
  }
  // A gradient that is there twice is scaled twice, one after the other.
  return !any_overlap(std::move(memory));
}

}  // namespace

py::object clip_grad_norm(const py::list& params, double norm_type, std::optional<double> max_norm, bool finite) {
  const NormType type = fused_norm(norm_type);
  if (is_watched()) return py::none();
  c10::AutoGradMode no_grad(false);
  std::vector<at::Tensor> grads;
  if (!collect_grads(params, grads)) return py::none();
  if (grads.empty()) return py::cast(at::zeros({}));
  at::Tensor norm;
  {
    py::gil_scoped_release others_may_run;
    Foreach all;
    at::ScalarType dtype = grads.front().scalar_type();
    for (const at::Tensor& grad : grads) {
      all.add(grad);
      if (grad.scalar_type() != dtype) dtype = c10::promoteTypes(dtype, grad.scalar_type());
    }
    norm = max_norm ? all.clip(type, *max_norm, finite) : all.norm(type);
    if (finite) {
      const double value = norm.item().toDouble();
      TORCH_CHECK(std::isfinite(value), "regfused.", max_norm ? "clip_grad_norm_" : "grad_norm",
                  ": error_if_nonfinite=True demands a finite norm of the gradients, but it is ", value,
                  " (The total norm of order ", text_of(norm_type),
                  " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable this error and "
                  "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`)");
    }
    if (max_norm)
      for (const at::Tensor& grad : grads)
        if (!grad.is_inference()) grad.unsafeGetTensorImpl()->bump_version();
    norm = norm.to(grads.front().device(), dtype);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(norm));
}

}  // namespace regfused
