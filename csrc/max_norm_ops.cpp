// The dispatcher's door to max norm constraints: torch.ops.regfused.constrain_max_norm_.
#include <optional>
#include <utility>
#include <vector>

#include <torch/library.h>

#include "devices.h"
#include "slice_check.h"
#include "tensor_check.h"

namespace regfused {
namespace {

void check_dims(at::TensorList params, double max_norm, std::optional<int64_t> dim) {
  TORCH_CHECK_VALUE(max_norm >= 0, "regfused::constrain_max_norm_: max_norm must be >= 0, but got ", max_norm);
  if (!dim) return;
  for (size_t i = 0; i < params.size(); ++i)
    TORCH_CHECK_VALUE(has_slices(params[i], *dim), "regfused::constrain_max_norm_: dim must be None or ",
                      demand_on_dim(c10::str("params[", i, "]"), params[i]), ", but got ", *dim);
}

void constrain_with_kernels(at::TensorList params, double max_norm, std::optional<int64_t> dim) {
  check_dims(params, max_norm, dim);
  std::vector<std::pair<c10::Device, std::vector<SliceTensor>>> devices;
  std::vector<MemoryRange> memory;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    const std::string why = why_not_fused(param);
    TORCH_CHECK_VALUE(why.empty(), "regfused::constrain_max_norm_: params must be dense float32, float64, bfloat16 or ",
                      "float16 tensors ", where_kernels_run(), ", but params[", i, "] ", why);
    memory.push_back(memory_of(param));
    const c10::Device device = kernel_device(param);
    size_t d = 0;
    while (d < devices.size() && devices[d].first != device) ++d;
    if (d == devices.size()) devices.push_back({device, {}});
    devices[d].second.push_back(
        {param.data_ptr(), dtype_of(param), SliceRule::max_norm, slices_along(param, dim), max_norm, {}});
  }
  TORCH_CHECK_VALUE(!any_overlap(std::move(memory)),
                    "regfused::constrain_max_norm_: params must share no memory, but two of them do");
  for (const auto& [device, tensors] : devices) shrink_slices(device, tensors);
  // The dispatcher bumps no version counters for operators from outside.
  for (const at::Tensor& param : params)
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(regfused, CPU, m) { m.impl("constrain_max_norm_", &constrain_with_kernels); }
TORCH_LIBRARY_IMPL(regfused, CUDA, m) { m.impl("constrain_max_norm_", &constrain_with_kernels); }
TORCH_LIBRARY_IMPL(regfused, Meta, m) { m.impl("constrain_max_norm_", &check_dims); }

}  // namespace regfused
