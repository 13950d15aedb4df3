// Dropout: which elements are dropped, and what the others become.
#pragma once

#include <cstdint>

#include "portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

// Which random word an element has depends on its offset in memory alone. A row of 32 elements has
// eight counters of philox_rule.h. Its counter j gives words 0 and 1 to elements 2j and 2j + 1, and
// words 2 and 3 to elements 16 + 2j and 17 + 2j: so two vectors of 64-bit lanes become one of 32-bit
// lanes by a shift and a blend, and a CUDA thread uses up all words of its counters in two accesses.
constexpr int kDropoutRow = 32;
constexpr int kDropoutCounters = 8;  // of a row

// y = x * factor, where factor is 0 with probability p and 1/(1 - p) otherwise. A multiplication, as
// in torch: a NaN or an infinity that is dropped is NaN.
//
// p counts as the nearest multiple of 2^-32. An element is kept where its word is not below
// threshold = p * 2^32, which fits no word where p rounds to 1: then the other factor is 0 too.
template <class T>
struct DropoutRule {
  uint32_t threshold;
  T scale;

  REGFUSED_RULE explicit DropoutRule(double p) {
    const double exact = p * 4294967296.0 + 0.5;
    const bool keeps = exact < 4294967296.0;
    threshold = keeps ? uint32_t(exact) : 0;
    scale = keeps ? T(1 / (1 - p)) : T(0);
  }

  // V: of T. W: of unsigned integers as wide as T, with a random word in each.
  template <class V, class W>
  REGFUSED_RULE V operator()(V x, W word) const {
    return x * (word >= threshold ? splat<V>(scale) : V{});
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
