// Which tensors the kernels can take, and how they must lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "chunk.h"

namespace regfused {

// Why there are no kernels for such a tensor, wherever it lies in memory, or an empty string: they are for
// strided float32, float64, bfloat16 and float16 tensors on a device that has kernels.
std::string why_no_kernels(const at::Tensor& tensor);

// Why the kernels cannot work on the memory of such a tensor as it is, or an empty string.
std::string why_not_in_place(const at::Tensor& tensor);

// Why the kernels cannot take this parameter, or an empty string. They take dense, strided,
// non-overlapping float32, float64, bfloat16 and float16 tensors on a device that has kernels.
std::string why_not_fused(const at::Tensor& param);

// Whether torch.func is at work (vmap, grad, jvp), or the older vmap of torch.autograd.grad(is_grads_batched=True):
// they take no autograd function written in C++.
bool in_functional_transform();

// Whether a tensor has to do with one of them, or carries a tangent of forward-mode AD: only what torch itself has a
// formula for can be done to it.
bool is_transformed(const at::Tensor& tensor);

// What is done while it is there is done outside of all transforms: to tensors that are no part of them.
struct OutsideOfTransforms {
  c10::impl::ExcludeDispatchKeyGuard guard;
  OutsideOfTransforms();
};

// The storage type of an eligible tensor.
DType dtype_of(const at::Tensor& tensor);

// Whether both tensors have the same sizes and pair equal indices at equal offsets in memory.
bool same_layout(const at::Tensor& a, const at::Tensor& b);

// Where a dense tensor lies: [begin, end) in bytes.
using MemoryRange = std::pair<uintptr_t, uintptr_t>;
MemoryRange memory_of(const at::Tensor& tensor);

bool any_overlap(std::vector<MemoryRange> ranges);

}  // namespace regfused
