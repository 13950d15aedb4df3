// Numbers among the arguments of a kernel. No torch and no CUDA in here.
#pragma once

#include "../rule/strength_rule.h"

namespace regfused {

// A number of the host, or one in the memory of the device, float32 or float64.
struct DeviceNumber {
  double value = 0;
  const void* at = nullptr;
  bool is_double = false;
  float rounding = 0;  // how far below zero is zero, where it is in the memory of the device

  REGFUSED_RULE double get() const {
    if (!at) return value;
    const double there = is_double ? *static_cast<const double*>(at) : double(*static_cast<const float*>(at));
    return rounded_up_to_zero(there, rounding);
  }
};

}  // namespace regfused
