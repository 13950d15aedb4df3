// The elastic net as a differentiable number: torch.ops.regfused.penalty, its gradient, and autograd's side of both.
#include "penalty_ops.h"

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sgn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "devices.h"
#include "foreach_drive.h"
#include "python_values.h"
#include "tensor_check.h"
#include "watch.h"

namespace regfused {
namespace {

using at::Tensor;

void check_strengths(double l1, double l2) {
  for (const auto& [name, value] : {std::pair{"l1", l1}, std::pair{"l2", l2}})
    TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, "regfused.penalty: ", name,
                      " must be finite and >= 0, but got ", value);
}

// Of the value: wide enough for a sum over many elements.
at::ScalarType dtype_of_value(at::TensorList params) {
  for (const Tensor& param : params)
    if (param.scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

// The parameter where it is dense; otherwise a copy that is, laid out as its gradient will be.
Tensor dense(const Tensor& param, size_t i) {
  const bool lies_otherwise =
      param.layout() == at::kStrided && (param.is_neg() || !param.is_non_overlapping_and_dense());
  const Tensor there = lies_otherwise ? at::empty_like(param).copy_(param) : param;
  const std::string why = why_not_fused(there);
  TORCH_CHECK_VALUE(why.empty(), "regfused::penalty: params must be strided float32, float64, bfloat16 or float16 ",
                    "tensors ", where_kernels_run(), ", but params[", i, "] ", why);
  return there;
}

Tensor penalty_kernels(at::TensorList params, double l1, double l2) {
  check_strengths(l1, l2);
  std::vector<Tensor> kept;
  Foreach all;
  for (size_t i = 0; i < params.size(); ++i) {
    kept.push_back(dense(params[i], i));
    all.add(kept.back());
  }
  return all.penalty(l1, l2).to(dtype_of_value(params));
}

Tensor penalty_meta(at::TensorList params, double l1, double l2) {
  check_strengths(l1, l2);
  c10::Device device = params.front().device();
  for (const Tensor& param : params)
    if (device.is_cpu()) device = param.device();
  return at::empty({}, at::TensorOptions().device(device).dtype(dtype_of_value(params)));
}

std::vector<Tensor> penalty_backward_kernels(const Tensor& grad, at::TensorList params, double l1, double l2) {
  std::vector<Tensor> kept, grads;
  Foreach all;
  for (size_t i = 0; i < params.size(); ++i) {
    kept.push_back(dense(params[i], i));
    grads.push_back(at::empty_like(kept.back()));
    all.add(kept.back(), grads.back());
  }
  all.penalty_gradients(l1, l2, grad);
  return grads;
}

std::vector<Tensor> penalty_backward_meta(const Tensor&, at::TensorList params, double, double) {
  std::vector<Tensor> grads;
  for (const Tensor& param : params) grads.push_back(at::empty_like(param));
  return grads;
}

// The operators one layer below autograd.
Tensor call_penalty(at::TensorList params, double l1, double l2) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("regfused::penalty", "")
                             .typed<Tensor(at::TensorList, double, double)>();
  return op.call(params, l1, l2);
}

std::vector<Tensor> call_penalty_backward(const Tensor& grad, at::TensorList params, double l1, double l2) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("regfused::penalty_backward", "")
                             .typed<std::vector<Tensor>(const Tensor&, at::TensorList, double, double)>();
  return op.call(grad, params, l1, l2);
}

// gain*l1*sign(p) + gain*2*l2*p in operations that autograd knows and torch can transform, rounded as the kernels do. A
// strength of zero must not meet infinities.
Tensor differentiable_gradient(const Tensor& gain, const Tensor& param, double l1, double l2) {
  const auto arithmetic = param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor p = param.to(arithmetic);
  const Tensor wide = gain.to(p.device(), at::kDouble);
  Tensor grad;
  if (l1 != 0 || l2 == 0) grad = (wide * l1).to(arithmetic) * at::sgn(p);
  if (l2 != 0) {
    const Tensor linear = (wide * (2 * l2)).to(arithmetic) * p;
    grad = grad.defined() ? grad + linear : linear;
  }
  return grad.to(param.scalar_type());
}

struct Penalty : torch::autograd::Function<Penalty> {
  static Tensor forward(torch::autograd::AutogradContext* context, at::TensorList params, double l1, double l2) {
    context->save_for_backward(params.vec());
    context->saved_data["l1"] = l1;
    context->saved_data["l2"] = l2;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_penalty(params, l1, l2);
  }

  static std::vector<Tensor> backward(torch::autograd::AutogradContext* context, std::vector<Tensor> grad_outputs) {
    const double l1 = context->saved_data["l1"].toDouble(), l2 = context->saved_data["l2"].toDouble();
    const std::vector<Tensor> params = context->get_saved_variables();
    std::vector<Tensor> wanted, grads(params.size() + 2);  // l1 and l2 have none
    for (size_t i = 0; i < params.size(); ++i)
      if (context->needs_input_grad(i)) wanted.push_back(params[i]);
    std::vector<Tensor> of_wanted;
    if (at::GradMode::is_enabled() || is_transformed(grad_outputs[0]))
      for (const Tensor& param : wanted) of_wanted.push_back(differentiable_gradient(grad_outputs[0], param, l1, l2));
    else
      of_wanted = call_penalty_backward(grad_outputs[0], wanted, l1, l2);
    for (size_t i = 0, w = 0; i < params.size(); ++i)
      if (context->needs_input_grad(i)) grads[i] = std::move(of_wanted[w++]);
    return grads;
  }
};

Tensor penalty_autograd(at::TensorList params, double l1, double l2) {
  // Before anything asks a nested tensor for its sizes.
  for (size_t i = 0; i < params.size(); ++i)
    TORCH_CHECK_VALUE(!params[i].is_nested(), "regfused::penalty: params must be strided tensors, but params[", i,
                      "] is a nested tensor");
  return Penalty::apply(params, l1, l2);
}

}  // namespace

pybind11::tuple penalty(const pybind11::list& params, double l1, double l2) {
  std::vector<Tensor> taken;
  pybind11::list leftovers;
  const bool in_trace = in_jit_trace();
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const object = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    TORCH_CHECK_TYPE(THPVariable_Check(object), "regfused.penalty: params must be tensors, but item ", i, " is a ",
                     Py_TYPE(object)->tp_name);
    const Tensor& param = THPVariable_Unpack(object);
    if (!in_trace && is_plain(object) && !is_transformed(param) && why_no_kernels(param).empty())
      taken.push_back(param);
    else
      leftovers.append(i);
  }
  if (taken.empty()) return pybind11::make_tuple(pybind11::none(), leftovers);
  Tensor value;
  {
    pybind11::gil_scoped_release others_may_run;
    value = call_penalty(taken, l1, l2);
  }
  return pybind11::make_tuple(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(value)), leftovers);
}

TORCH_LIBRARY_IMPL(regfused, CPU, m) {
  m.impl("penalty", &penalty_kernels);
  m.impl("penalty_backward", &penalty_backward_kernels);
}
TORCH_LIBRARY_IMPL(regfused, CUDA, m) {
  m.impl("penalty", &penalty_kernels);
  m.impl("penalty_backward", &penalty_backward_kernels);
}
TORCH_LIBRARY_IMPL(regfused, Meta, m) {
  m.impl("penalty", &penalty_meta);
  m.impl("penalty_backward", &penalty_backward_meta);
}
TORCH_LIBRARY_IMPL(regfused, Autograd, m) { m.impl("penalty", &penalty_autograd); }

}  // namespace regfused
