// Hyperparameters as data: what a table of options says of each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace regfused {

enum class OptionKind : uint8_t {
  strength,   // a double, finite and >= 0
  finite,     // a double, finite
  fractions,  // two doubles, each in [0, 1)
  flag        // a bool
};

struct OptionInfo {
  const char* name;
  OptionKind kind;
  size_t where;  // offset in the struct of hyperparameters
};

}  // namespace regfused
