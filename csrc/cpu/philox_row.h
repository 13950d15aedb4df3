// A row of random words, one for each element, for one instruction set.
#pragma once

#include "../dropout_rule.h"
#include "../philox_rule.h"
#include "vector.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

struct PhiloxRow {
  static constexpr int kVectors = kDropoutRow / kFloats;
  FloatBits words[kVectors];

  // Row `row` of an array: see dropout_rule.h for who gets which word.
  REGFUSED_RULE PhiloxRow(int64_t row, uint64_t key) {
    for (int v = 0; v < kVectors / 2; ++v) {
      const DoubleBits index = splat<DoubleBits>(uint64_t(row) * kDropoutCounters + v * kDoubles) + consecutive();
      const PhiloxWords<DoubleBits> random = philox(philox_counter(index), key);
      words[v] = interleave_low(random.word[0], random.word[1]);
      words[v + kVectors / 2] = interleave_low(random.word[2], random.word[3]);
    }
  }

  // The words of the vector at position I of the row, in lanes as wide as those of S in arithmetic.
  template <class S, int I>
  REGFUSED_RULE auto at() const {
    if constexpr (sizeof(typename Storage<S>::T) == 4)
      return words[I];
    else
      return I % 2 ? widen_high(words[I / 2]) : widen_low(words[I / 2]);
  }
};

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
