// The doors to dropout: torch.ops.regfused.dropout, and a shorter way for eager training.
#include "dropout_ops.h"

#include <limits>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "devices.h"
#include "tensor_check.h"
#include "watch.h"

namespace regfused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- Kernels --------------------------------------------------------------------------------------

void check(const Tensor& input, double p, const Tensor& seed) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "regfused::dropout: p must be in [0, 1], but got ", p);
  TORCH_CHECK_VALUE(input.is_floating_point() && input.element_size() >= 2,
                    "regfused::dropout: input must be float32, float64, bfloat16 or float16, but got ",
                    input.scalar_type());
  TORCH_CHECK_VALUE(seed.dim() == 0 && seed.scalar_type() == at::kLong && seed.device() == input.device(),
                    "regfused::dropout: seed must be a 0-dim int64 tensor on the device of the input, ", input.device(),
                    ", but has ", seed.dim(), " dimensions, dtype ", seed.scalar_type(), ", on ", seed.device());
}

void run(const Tensor& input, const Tensor& output, double p, const Tensor& seed) {
  if (output.numel() == 0) return;
  DropoutJob job;
  job.input = input.const_data_ptr();
  job.output = output.mutable_data_ptr();
  job.seed = seed.const_data_ptr<int64_t>();
  job.numel = output.numel();
  job.p = p;
  job.dtype = dtype_of(output);
  run_dropout(job, kernel_device(output));
}

Tensor dropout_kernels(const Tensor& input, double p, const Tensor& seed) {
  check(input, p, seed);
  Tensor output = at::empty_like(input);
  const Tensor& dense = why_not_in_place(input).empty() ? input : output.copy_(input);
  run(dense, output, p, seed);
  return output;
}

void dropout_kernels_(Tensor& input, double p, const Tensor& seed) {
  check(input, p, seed);
  if (why_not_in_place(input).empty())
    run(input, input, p, seed);
  else
    input.copy_(dropout_kernels(input, p, seed));
}

Tensor dropout_meta(const Tensor& input, double p, const Tensor& seed) {
  check(input, p, seed);
  return at::empty_like(input);
}

void dropout_meta_(Tensor& input, double p, const Tensor& seed) { check(input, p, seed); }

// --- Autograd -------------------------------------------------------------------------------------

Tensor call(const Tensor& input, double p, const Tensor& seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("regfused::dropout", "")
                             .typed<Tensor(const Tensor&, double, const Tensor&)>();
  return op.call(input, p, seed);
}

void call_(Tensor& input, double p, const Tensor& seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("regfused::dropout_", "")
                             .typed<void(Tensor&, double, const Tensor&)>();
  op.call(input, p, seed);
}

// y = x * factor is its own adjoint: what a backward pass needs is the seed, and the layout that the
// mask belongs to.
void remember(AutogradContext* ctx, const Tensor& output, double p, const Tensor& seed) {
  ctx->save_for_backward({seed});
  ctx->saved_data["p"] = p;
  ctx->saved_data["strides"] = output.sym_strides();
}

// The gradient in the layout of the output.
Tensor in_layout(const Tensor& grad, const c10::SymIntArrayRef strides) {
  const auto sizes = grad.sym_sizes(), now = grad.sym_strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && now[d] != strides[d])
      return at::empty_strided_symint(sizes, strides, grad.options()).copy_(grad);
  return grad;
}

// The factors: what becomes of ones. Constants, which no transform needs to look into.
Tensor factor(const c10::SymIntArrayRef sizes, const c10::SymIntArrayRef strides, at::ScalarType arithmetic, double p,
              const Tensor& seed) {
  const OutsideOfTransforms outside;
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor ones = at::empty_strided_symint(sizes, strides, seed.options().dtype(arithmetic)).fill_(1);
  return call(ones, p, seed);
}

// grad * factor in operations that torch can transform, with the bits of the kernels.
Tensor in_torch(const Tensor& grad, const c10::SymIntArrayRef strides, double p, const Tensor& seed) {
  const auto arithmetic = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return (grad * factor(grad.sym_sizes(), strides, arithmetic, p, seed)).to(grad.scalar_type());
}

variable_list backward_of(AutogradContext* ctx, const variable_list& grads) {
  const Tensor& grad = grads[0];
  const Tensor seed = ctx->get_saved_variables()[0];
  const std::vector<c10::SymInt> strides = ctx->saved_data["strides"].toSymIntVector();
  const double p = ctx->saved_data["p"].toDouble();
  if (is_transformed(grad)) return {in_torch(grad, strides, p, seed), Tensor(), Tensor()};
  return {call(in_layout(grad, strides), p, seed), Tensor(), Tensor()};
}

struct Dropout : torch::autograd::Function<Dropout> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, double p, const Tensor& seed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor output = call(input, p, seed);
    remember(ctx, output, p, seed);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return backward_of(ctx, grads); }
};

struct DropoutInPlace : torch::autograd::Function<DropoutInPlace> {
  static Tensor forward(AutogradContext* ctx, Tensor input, double p, const Tensor& seed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_(input, p, seed);
    ctx->mark_dirty({input});
    remember(ctx, input, p, seed);
    return input;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return backward_of(ctx, grads); }
};

// Before anything asks a nested tensor for its sizes.
void check_not_nested(const Tensor& input) {
  TORCH_CHECK_VALUE(!input.is_nested(), "regfused::dropout: input must be one tensor, but is a nested tensor");
}

Tensor dropout_autograd(const Tensor& input, double p, const Tensor& seed) {
  check_not_nested(input);
  return Dropout::apply(input, p, seed);
}

void dropout_autograd_(Tensor& input, double p, const Tensor& seed) {
  check_not_nested(input);
  torch::autograd::check_inplace(input, input.requires_grad());
  DropoutInPlace::apply(input, p, seed);
}

}  // namespace

// --- Eager ----------------------------------------------------------------------------------------

std::optional<Tensor> dropout_eagerly(const Tensor& input, double p, bool inplace) {
  if (in_function_mode() || in_jit_trace() || is_transformed(input) || !why_no_kernels(input).empty())
    return std::nullopt;
  if (input.numel() == 0) return input;
  // As torch.compile has it, which knows no random_(): the same seed in both.
  const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {}, input.options().dtype(at::kLong));
  if (!inplace) return call(input, p, seed);
  Tensor output = input;
  call_(output, p, seed);
  return output;
}

TORCH_LIBRARY_IMPL(regfused, CPU, m) {
  m.impl("dropout", &dropout_kernels);
  m.impl("dropout_", &dropout_kernels_);
}
TORCH_LIBRARY_IMPL(regfused, CUDA, m) {
  m.impl("dropout", &dropout_kernels);
  m.impl("dropout_", &dropout_kernels_);
}
TORCH_LIBRARY_IMPL(regfused, Meta, m) {
  m.impl("dropout", &dropout_meta);
  m.impl("dropout_", &dropout_meta_);
}
TORCH_LIBRARY_IMPL(regfused, Autograd, m) {
  m.impl("dropout", &dropout_autograd);
  m.impl("dropout_", &dropout_autograd_);
}

}  // namespace regfused
