// Strengths that schedulers lead to zero: what rounding has put below it is zero.
#pragma once

#include <c10/core/ScalarType.h>

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

inline double rounded_up_to_zero(double strength, double rounding) {
  return strength < 0 && strength >= -rounding ? 0 : strength;
}

}  // namespace regfused
