// The dispatcher's door to the step: torch.ops.regfused.sgd_, for torch.compile, FakeTensor and
// functional use. One parameter group; the caller holds the state.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "devices.h"
#include "slice_check.h"
#include "step_drive.h"
#include "strength.h"
#include "tensor_check.h"

namespace regfused {
namespace {

using at::Tensor;

double strength(const char* name, double value) {
  value = rounded_up_to_zero(value, kRounding);
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, "regfused::sgd_: ", name, " must be finite and >= 0, but got ",
                    value);
  return value;
}

NormType fused_norm_type(double norm_type) {
  TORCH_CHECK_VALUE(norm_type == 1 || norm_type == 2 || norm_type == std::numeric_limits<double>::infinity(),
                    "regfused::sgd_: norm_type must be 1, 2 or inf, but got ", norm_type);
  return norm_type == 1 ? NormType::one : norm_type == 2 ? NormType::two : NormType::inf;
}

void check_tensors(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                   const c10::List<bool>& first, double momentum, double group_l1, int64_t group_dim) {
  TORCH_CHECK_VALUE(grads.size() == params.size(),
                    "regfused::sgd_: there must be one gradient for each parameter, but got ", params.size(),
                    " parameters and ", grads.size(), " gradients");
  const size_t buffers = momentum == 0 ? 0 : params.size();
  TORCH_CHECK_VALUE(momentum_buffers.size() == buffers && first.size() == buffers,
                    "regfused::sgd_: with momentum=", momentum, " there must be ", buffers,
                    " momentum_buffers and values of first, but got ", momentum_buffers.size(), " and ", first.size());
  const auto check_like = [&](const char* name, const Tensor& tensor, const Tensor& param, size_t i) {
    TORCH_CHECK_VALUE(tensor.sizes() == param.sizes() && tensor.scalar_type() == param.scalar_type() &&
                          tensor.device() == param.device() && tensor.layout() == at::kStrided,
                      "regfused::sgd_: ", name, "[", i, "] must have the shape, dtype and device of its parameter (",
                      param.sizes(), ", ", param.scalar_type(), ", ", param.device(), "), but has ", tensor.sizes(),
                      ", ", tensor.scalar_type(), ", ", tensor.device());
  };
  for (size_t i = 0; i < params.size(); ++i) {
    check_like("grads", grads[i], params[i], i);
    TORCH_CHECK_VALUE(group_l1 == 0 || has_slices(params[i], group_dim), "regfused::sgd_: group_dim must be ",
                      demand_on_dim(c10::str("params[", i, "]"), params[i]), ", but got ", group_dim);
    if (buffers) check_like("momentum_buffers", momentum_buffers[i], params[i], i);
  }
}

void sgd_kernels(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first,
                 double lr, double momentum, double dampening, double weight_decay, bool nesterov, double l1, double l2,
                 bool proximal, double group_l1, int64_t group_dim, std::optional<double> max_norm, double norm_type,
                 bool penalty_in_clip, std::string_view nonfinite, bool decoupled_weight_decay, bool classical_momentum,
                 bool maximize) {
  SgdHyper hyper;
  hyper.lr = strength("lr", lr);
  hyper.momentum = strength("momentum", momentum);
  hyper.dampening = dampening;
  hyper.weight_decay = strength("weight_decay", weight_decay);
  hyper.l1 = strength("l1", l1);
  hyper.l2 = strength("l2", l2);
  hyper.group_l1 = strength("group_l1", group_l1);
  hyper.nesterov = nesterov;
  hyper.maximize = maximize;
  hyper.proximal = proximal;
  hyper.penalty_in_clip = penalty_in_clip;
  hyper.decoupled_weight_decay = decoupled_weight_decay;
  hyper.classical_momentum = classical_momentum;
  TORCH_CHECK_VALUE(!max_norm || *max_norm >= 0, "regfused::sgd_: max_norm must be None or >= 0, but got ", *max_norm);
  TORCH_CHECK_VALUE(nonfinite == "propagate" || nonfinite == "skip" || nonfinite == "error",
                    "regfused::sgd_: nonfinite must be 'propagate', 'skip' or 'error', but got '", nonfinite, "'");
  check_tensors(params, grads, momentum_buffers, first, momentum, group_l1, group_dim);

  StepDriver driver;
  driver.groups = {hyper};
  driver.lr.resize(1);
  StepScalars scalars;
  scalars.norm_type = fused_norm_type(norm_type);
  std::vector<MemoryRange> memory;
  std::vector<Tensor> in_layout;  // gradients that had other strides
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const std::string why = why_not_fused(param);
    TORCH_CHECK_VALUE(why.empty(), "regfused::sgd_: parameters must be dense float32, float64, bfloat16 or float16 ",
                      "tensors ", where_kernels_run(), ", but params[", i, "] ", why);
    Tensor grad = grads[i];
    if (!same_layout(grad, param) || grad.is_neg()) {
      grad = at::empty_strided(param.sizes(), param.strides(), param.options());
      grad.copy_(grads[i]);
      in_layout.push_back(grad);
    }
    StepRow row;
    row.param = param.data_ptr();
    row.grad = grad.data_ptr();
    row.numel = param.numel();
    row.device = driver.index_of(kernel_device(param));
    row.dtype = dtype_of(param);
    if (group_l1 != 0) row.slices = slices_along(param, group_dim);
    memory.push_back(memory_of(param));
    if (momentum != 0) {
      const Tensor& buffer = momentum_buffers[i];
      TORCH_CHECK_VALUE(same_layout(buffer, param) && !buffer.is_neg(), "regfused::sgd_: momentum_buffers[", i,
                        "] must have the strides ", param.strides(), " of its parameter, but has ", buffer.strides());
      row.momentum_buffer = buffer.data_ptr();
      row.first = first[i];
      memory.push_back(memory_of(buffer));
    }
    driver.tensors.push_back(row);
  }
  TORCH_CHECK_VALUE(!any_overlap(std::move(memory)),
                    "regfused::sgd_: parameters and momentum_buffers must share no memory, but two of them do");
  driver.cut();
  driver.find_live();
  driver.begin();

  const bool needs_norm = max_norm || nonfinite != "propagate";
  if (driver.can_leave_host() && nonfinite != "error") {
    scalars.clips = max_norm.has_value();
    scalars.max_norm = max_norm.value_or(0);
    scalars.skip_nonfinite = nonfinite == "skip";
    driver.measure_without_host(scalars, needs_norm);
    driver.step_without_host(scalars);
  } else {
    TORCH_CHECK(
        !driver.is_capturing(),
        "regfused::sgd_: in a CUDA graph all tensors must be on CUDA devices and nonfinite must not be 'error'");
    if (needs_norm) {
      const double norm = norm_finish(scalars.norm_type, driver.norm(scalars));
      TORCH_CHECK(std::isfinite(norm) || nonfinite != "error",
                  "regfused::sgd_: nonfinite='error' demands a finite gradient norm, but it is ", norm);
      if (!std::isfinite(norm) && nonfinite == "skip") return;
      if (max_norm) scalars.clip_coef = clip_coefficient(*max_norm, norm);
    }
    driver.step(scalars);
  }
  // The dispatcher bumps no version counters for operators from outside.
  for (const Tensor& param : params)
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  for (const Tensor& buffer : momentum_buffers)
    if (!buffer.is_inference()) buffer.unsafeGetTensorImpl()->bump_version();
}

// Shapes are all that a fake step needs to look at: it returns nothing.
void sgd_meta(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, c10::List<bool> first,
              double, double momentum, double, double, bool, double, double, bool, double group_l1, int64_t group_dim,
              std::optional<double>, double, bool, std::string_view, bool, bool, bool) {
  check_tensors(params, grads, momentum_buffers, first, momentum, group_l1, group_dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfused, CPU, m) { m.impl("sgd_", &sgd_kernels); }
TORCH_LIBRARY_IMPL(regfused, CUDA, m) { m.impl("sgd_", &sgd_kernels); }
TORCH_LIBRARY_IMPL(regfused, Meta, m) { m.impl("sgd_", &sgd_meta); }

}  // namespace regfused
