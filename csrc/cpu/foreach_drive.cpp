// Runs passes over lists of tensors on the CPU.
#include "foreach_drive.h"

#include <ATen/ops/empty.h>

#include "chunks.h"
#include "isa.h"

namespace regfused {

namespace {

at::Tensor doubles(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kDouble)); }

Chunks cut(const ForeachList& list) {
  Chunks chunks;
  for (size_t t = 0; t < list.size(); ++t) chunks.add(static_cast<int32_t>(t), list[t].numel);
  return chunks;
}

// part(tensor, chunk) of every chunk.
template <class Part>
at::Tensor parts(const ForeachList& list, const Part& part) {
  const Chunks chunks = cut(list);
  at::Tensor parts = doubles({static_cast<int64_t>(chunks.size())});
  auto* out = static_cast<double*>(parts.data_ptr());
  chunks.for_each([&](size_t c) { out[c] = part(list[chunks[c].tensor], chunks[c]); });
  return parts;
}

}  // namespace

at::Tensor ForeachOnCpu::norms(const ForeachList& list, NormType type) const {
  const auto kernel = choose_kernels()->foreach.norm;
  return parts(list, [&](const ForeachTensor& tensor, const Chunk& chunk) { return kernel(tensor, chunk, type); });
}

at::Tensor ForeachOnCpu::penalties(const ForeachList& list, double l1, double l2) const {
  const auto kernel = choose_kernels()->foreach.penalty;
  return parts(list, [&](const ForeachTensor& tensor, const Chunk& chunk) { return kernel(tensor, chunk, l1, l2); });
}

at::Tensor ForeachOnCpu::clip(const ForeachList& list, const at::Tensor& norms, NormType type, double max_norm) const {
  const auto* parts = static_cast<const double*>(norms.data_ptr());
  double accumulated = 0;
  for (int64_t i = 0; i < norms.numel(); ++i) accumulated = norm_combine(type, accumulated, parts[i]);
  at::Tensor norm = doubles({});
  const double value = norm_finish(type, accumulated);
  *static_cast<double*>(norm.data_ptr()) = value;
  const double factor = clip_coefficient(max_norm, value);
  if (factor == 1) return norm;  // every bit stays as it is
  const auto kernel = choose_kernels()->foreach.scale;
  const Chunks chunks = cut(list);
  chunks.for_each([&](size_t c) { kernel(list[chunks[c].tensor], chunks[c], factor); });
  return norm;
}

void ForeachOnCpu::penalty_gradients(const ForeachList& list, double l1, double l2, const at::Tensor& gain) const {
  const auto kernel = choose_kernels()->foreach.penalty_gradient;
  const double value = gain.item().toDouble();
  const Chunks chunks = cut(list);
  chunks.for_each([&](size_t c) { kernel(list[chunks[c].tensor], chunks[c], l1, l2, value); });
}

}  // namespace regfused
