// Dropout: which elements are dropped, and what the others become.
#pragma once

#include <cstdint>

#include "philox_rule.h"
#include "portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

// Each element has 32 random bits, which depend on the seed and its offset in memory alone: sixteen
// upper ones and sixteen lower ones, each the half of a word of philox_rule.h, from two streams of
// counters. The lower ones matter only where the upper ones are those of the threshold, in one element
// of 65536, and are computed nowhere else: words are what takes the time.
//
// A row of 64 elements has eight counters of each stream. Words 0 and 1 of counter j are for elements
// 2j, 2j + 1 (their upper halves) and 16 + 2j, 17 + 2j (their lower halves), words 2 and 3 for those that
// stand 32 further on. So two vectors of 64-bit lanes become one of 32-bit lanes by a shift and a blend,
// and a CUDA thread uses up its counters in four accesses of 16 bytes.
constexpr int kDropoutRow = 64;
constexpr int kDropoutCounters = 8;  // of a row, in a stream
constexpr int kDropoutRun = 16;      // consecutive elements that have the same half of a word

enum DropoutStream : uint32_t { kUpperBits, kLowerBits };

template <class V>
REGFUSED_RULE PhiloxWords<V> dropout_words(V counter, uint64_t seed, DropoutStream stream) {
  return philox<V>({{counter, counter >> 32, splat<V>(uint64_t(stream)), V{}}}, seed);
}

// The half of a word that a run of elements has, as the upper half of their bits.
template <class W>
REGFUSED_RULE W dropout_half(W word, int run) {
  return run % 2 == 0 ? word & 0xffff0000u : word << 16;
}

// y = x * factor, where factor is 0 with probability p and 1/(1 - p) otherwise. A multiplication, as
// in torch: a NaN or an infinity that is dropped is NaN.
//
// p counts as the nearest multiple of 2^-32. An element is kept where its bits are not below
// threshold = p * 2^32, which fits no 32 bits where p rounds to 1: then the other factor is 0 too.
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

  // Where the upper bits are these, the lower ones matter.
  REGFUSED_RULE uint16_t upper() const { return uint16_t(threshold >> 16); }

  // Whether the elements with these bits are kept, and what becomes of them. V: of T; W: of unsigned integers.
  template <class W>
  REGFUSED_RULE auto keeps(W bits) const {
    return bits >= threshold;
  }
  template <class V, class Kept>
  REGFUSED_RULE V operator()(V x, Kept kept) const {
    return x * (kept ? splat<V>(scale) : V{});
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
