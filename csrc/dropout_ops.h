// The doors to dropout: torch.ops.regfused.dropout, and a shorter way for eager training.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace regfused {

// Dropout by a seed that is drawn from torch's generator; p in (0, 1] and the dtype are the caller's to check.
// The input itself where it has no elements. Nothing where Python has to decide: no kernels for such a tensor,
// transforms, forward-mode AD, torch.jit.trace, a TorchFunctionMode.
std::optional<at::Tensor> dropout_eagerly(const at::Tensor& input, double p, bool inplace);

}  // namespace regfused
