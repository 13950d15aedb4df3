// Which slices a tensor has, and how they lie in memory.
#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include "rule/slice_rule.h"

namespace regfused {

// Whether a tensor has this dimension, counted from the front, or, where negative, from the back. A tensor
// without dimensions is one slice along 0, as in torch.
bool has_slices(const at::Tensor& tensor, int64_t dim);

// Slices of a dense tensor along a dimension that it has; no dimension: it is one slice.
SliceLayout slices_along(const at::Tensor& tensor, std::optional<int64_t> dim);

// "in [-2, 1] for params[3] of shape [4, 5]": what a dimension must be.
std::string demand_on_dim(const std::string& name, const at::Tensor& tensor);

}  // namespace regfused
