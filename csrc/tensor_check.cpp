// Which tensors the kernels can take, and how they must lie in memory.
#include "tensor_check.h"

#include <algorithm>

#include "devices.h"

namespace regfused {
namespace {

// What transforms put among the keys of their thread. Not the accessor of torch.func's state, which is there for good
// once something was compiled.
constexpr c10::DispatchKeySet kTransforms({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::FuncTorchVmapMode, c10::DispatchKey::VmapMode});

// And among those of their tensors.
constexpr c10::DispatchKeySet kTransformed({c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::Batched});

}  // namespace

std::string why_no_kernels(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) return "is a tensor subclass";
  if (tensor.is_nested()) return "is a nested tensor";
  if (tensor.layout() != at::kStrided) return c10::str("has layout ", tensor.layout());
  if (!has_kernels(tensor.device())) return c10::str("is on device ", tensor.device());
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf: return "";
    default: return c10::str("has dtype ", tensor.scalar_type());
  }
}

std::string why_not_in_place(const at::Tensor& tensor) {
  if (tensor.is_neg()) return "is a lazily negated view";
  if (!tensor.is_non_overlapping_and_dense()) return "is not dense in memory";
  if (tensor.numel() > 0 && tensor.data_ptr() == nullptr) return "has no memory";
  if (memory_of(tensor).first % tensor.element_size() != 0) return "is not aligned to its elements";
  return "";
}

std::string why_not_fused(const at::Tensor& param) {
  std::string why = why_no_kernels(param);
  return why.empty() ? why_not_in_place(param) : why;
}

bool in_functional_transform() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - keys.excluded_).has_any(kTransforms);
}

bool is_transformed(const at::Tensor& tensor) {
  return in_functional_transform() || tensor.key_set().has_any(kTransformed) || tensor._fw_grad(0).defined();
}

OutsideOfTransforms::OutsideOfTransforms() : guard(kTransforms) {}

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: TORCH_INTERNAL_ASSERT(false, "regfused: no storage type for ", tensor.scalar_type());
  }
}

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes();
  if (sizes != b.sizes()) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto left = a.strides(), right = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && left[d] != right[d]) return false;
  return true;
}

bool any_overlap(std::vector<MemoryRange> ranges) {
  std::sort(ranges.begin(), ranges.end());
  uintptr_t covered = 0;
  for (const auto& [begin, end] : ranges) {
    if (begin < end && begin < covered) return true;
    covered = std::max(covered, end);
  }
  return false;
}

MemoryRange memory_of(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  return {begin, begin + tensor.nbytes()};
}

}  // namespace regfused
