// Which slices a tensor has, and how they lie in memory.
#include "slice_check.h"

#include <algorithm>

namespace regfused {

namespace {

int64_t dimensions(const at::Tensor& tensor) { return std::max<int64_t>(tensor.dim(), 1); }

}  // namespace

bool has_slices(const at::Tensor& tensor, int64_t dim) {
  return -dimensions(tensor) <= dim && dim < dimensions(tensor);
}

SliceLayout slices_along(const at::Tensor& tensor, std::optional<int64_t> dim) {
  const int64_t numel = tensor.numel();
  if (!dim || tensor.dim() == 0 || numel == 0) return {1, 1, numel};
  TORCH_INTERNAL_ASSERT(has_slices(tensor, *dim));
  const int64_t d = *dim < 0 ? *dim + tensor.dim() : *dim;
  // The stride of a dimension of size 1 means nothing.
  if (tensor.size(d) == 1) return {1, 1, numel};
  return {numel / (tensor.size(d) * tensor.stride(d)), tensor.size(d), tensor.stride(d)};
}

std::string demand_on_dim(const std::string& name, const at::Tensor& tensor) {
  return c10::str("in [", -dimensions(tensor), ", ", dimensions(tensor) - 1, "] for ", name, " of shape ",
                  tensor.sizes());
}

}  // namespace regfused
