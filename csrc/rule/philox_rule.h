// The counter-based random generator Philox4x32-10: four words of 32 random bits for each counter.
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include <cstdint>

#include "portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

// The product of the lower 32 bits of each 64-bit lane and m. What machines have an instruction for,
// and the reason that every word of 32 bits stands in a lane of 64 here, with anything in its upper half.
template <class V>
REGFUSED_RULE V low_product(V a, uint32_t m) {
  return (a & 0xffffffffu) * m;
}

// Four words, each in the lower 32 bits of a lane. V is uint64_t, or a vector of them.
template <class V>
struct PhiloxWords {
  V word[4];
};

// The random words of a counter, or of a vector of counters.
template <class V>
REGFUSED_RULE PhiloxWords<V> philox(const PhiloxWords<V>& counter, uint64_t key) {
  V a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const V left = low_product(a, 0xd2511f53u);
    const V right = low_product(c, 0xcd9e8d57u);
    a = (right >> 32) ^ b ^ k0;
    b = right;
    c = (left >> 32) ^ d ^ k1;
    d = left;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{a, b, c, d}};
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
