// Strengths that schedulers lead to zero: what rounding has put below it is zero.
#pragma once

#include "portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

// A strength, or zero where it is below zero by no more than `rounding`.
REGFUSED_RULE double rounded_up_to_zero(double strength, double rounding) {
  return strength < 0 && strength >= -rounding ? 0 : strength;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
