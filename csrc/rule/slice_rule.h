// Slices of a tensor along one dimension, such as rows, columns or filters, and what a rule that
// looks at their L2 norm makes of them.
#pragma once

#include <cstdint>

#include "portable.h"

namespace regfused {

// A dense tensor as it lies in memory, [outer][count][inner], whatever its memory format: element m
// belongs to slice (m / inner) % count.
struct SliceLayout {
  int64_t outer = 1;
  int64_t count = 0;  // of slices
  int64_t inner = 0;  // elements of a run: what of a slice lies together

  REGFUSED_RULE int64_t numel() const { return outer * count * inner; }
};

enum class SliceRule : uint8_t {
  group_lasso,  // w * max(1 - bound/||w||, 0): the proximal map of bound*||w||; exact zeros where ||w|| <= bound
  max_norm,     // w * bound/||w|| where ||w|| > bound
};

// A bound that depends on the length of a step: per_length*length / (1 + growth*length).
struct SliceBound {
  double per_length = 0;
  double growth = 0;

  REGFUSED_RULE double at(double length) const { return per_length * length / (1 + growth * length); }
};

// Whether the rule leaves every slice as it is.
REGFUSED_RULE bool is_neutral(SliceRule rule, double bound) {
  return rule == SliceRule::group_lasso ? bound == 0 : bound > 1.7976931348623157e308;
}

inline namespace REGFUSED_ISA {

// The factor of a slice with this norm. 1 leaves the bits of the slice as they are. A NaN norm makes
// the group lasso's slice NaN, and is not above any max_norm, as in torch.renorm.
REGFUSED_RULE double slice_factor(SliceRule rule, double bound, double norm) {
  if (is_neutral(rule, bound)) return 1;
  if (rule == SliceRule::max_norm) return norm > bound ? bound / norm : 1;
  return norm <= bound ? 0 : 1 - bound / norm;
}

// One element, given the factor of its slice, in the type of arithmetic.
template <class V>
REGFUSED_RULE V slice_scaled(V w, V factor) {
  return w * factor;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
