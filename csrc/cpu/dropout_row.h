// The random bits of a row of elements, for one instruction set.
#pragma once

#include "../rule/dropout_rule.h"
#include "vector.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

// The words of a row in one stream of counters: see ../dropout_rule.h.
struct DropoutWords {
  static constexpr int kOfRun = kDropoutRun / kFloats;  // vectors
  FloatBits words[2][kOfRun];                           // for the first 32 elements, for the others

  REGFUSED_RULE DropoutWords(int64_t row, uint64_t seed, DropoutStream stream) {
    for (int v = 0; v < kOfRun; ++v) {
      const DoubleBits counter = splat<DoubleBits>(uint64_t(row * kDropoutCounters + v * kDoubles)) + consecutive();
      const PhiloxWords<DoubleBits> random = dropout_words(counter, seed, stream);
      words[0][v] = interleave_low(random.word[0], random.word[1]);
      words[1][v] = interleave_low(random.word[2], random.word[3]);
    }
  }
  REGFUSED_RULE bool any_half_is(uint16_t half) const {
    bool any = false;
    for (int v = 0; v < kOfRun; ++v) {
      any |= REGFUSED_ISA::any_half_is(words[0][v], half);
      any |= REGFUSED_ISA::any_half_is(words[1][v], half);
    }
    return any;
  }
  // The vector at position i of the row.
  REGFUSED_RULE FloatBits upper(int i) const {
    const int run = i / kOfRun;
    return dropout_half(words[run / 2][i % kOfRun], run);
  }
};

struct DropoutRow {
  static constexpr int kVectors = kDropoutRow / kFloats;
  FloatBits bits[kVectors];

  // `upper`: see DropoutRule.
  REGFUSED_RULE DropoutRow(int64_t row, uint64_t seed, uint16_t upper) {
    const DropoutWords words(row, seed, kUpperBits);
    for (int i = 0; i < kVectors; ++i) bits[i] = words.upper(i);
    if (__builtin_expect(words.any_half_is(upper), false)) {
      const DropoutWords lower(row, seed, kLowerBits);
      for (int i = 0; i < kVectors; ++i) bits[i] |= lower.upper(i) >> 16;
    }
  }

  // For the vector at position I, in lanes as wide as those of S in arithmetic.
  template <class S, int I>
  REGFUSED_RULE auto at() const {
    if constexpr (sizeof(typename Storage<S>::T) == 4)
      return bits[I];
    else
      return I % 2 ? widen_high(bits[I / 2]) : widen_low(bits[I / 2]);
  }
};

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
