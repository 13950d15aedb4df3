// How far below zero rounding can bring a strength that schedulers lead to zero.
#pragma once

#include <c10/core/ScalarType.h>

#include "rule/strength_rule.h"

namespace regfused {

// Some thousand products and sums, each rounded to a part in 2^53 of rates up to about 100. regfused/options.py has the
// same numbers.
constexpr double kRounding = 1e-12;

// How far below zero rounding alone can bring a number of this type.
inline double rounding_of(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Float: return 0x1p-23;
    case c10::ScalarType::Half: return 0x1p-10;
    case c10::ScalarType::BFloat16: return 0x1p-7;
    default: return kRounding;
  }
}

}  // namespace regfused
