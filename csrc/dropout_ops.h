// The doors to dropout: torch.ops.regfused.dropout, and a shorter way for eager training.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace regfused {

// Dropout by a seed that is drawn from torch's generator; p in (0, 1] and the dtype are the caller's to check.
// Nothing where torch has to do it: no kernels for such a tensor, transforms of torch.func, forward-mode AD.
std::optional<at::Tensor> dropout_eagerly(const at::Tensor& input, double p, bool inplace);

}  // namespace regfused
