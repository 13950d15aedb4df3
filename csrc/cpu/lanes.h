// How a kernel goes over an array: rows of a fixed number of lanes, and sums over those lanes whose bits
// do not depend on the instruction set.
#pragma once

#include <utility>

#include "../chunk.h"
#include "../rule/norm_rule.h"
#include "vector.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

// A sum (or maximum) over kLanes fixed lanes of doubles. Doubles hold the square of any float:
// no overflow, no underflow, and the order of additions does not depend on the vector width.
struct NormLanes {
  NormType type;
  Doubles lanes[kLanes / kDoubles] = {};

  explicit NormLanes(NormType type) : type(type) {}

  // The vector at position I of a row of kLanes elements.
  template <int I>
  REGFUSED_RULE void add(Floats x) {
    lanes[2 * I] = norm_accumulate(type, lanes[2 * I], widen_low(x));
    lanes[2 * I + 1] = norm_accumulate(type, lanes[2 * I + 1], widen_high(x));
  }
  template <int I>
  REGFUSED_RULE void add(Doubles x) {
    lanes[I] = norm_accumulate(type, lanes[I], x);
  }
  REGFUSED_RULE double total() const {
    double parts[kLanes];
    __builtin_memcpy(parts, lanes, sizeof parts);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) parts[j] = norm_combine(type, parts[j], parts[j + half]);
    return parts[0];
  }
};

// A sum of small numbers for the record: each row in the type of arithmetic, the rows in doubles.
struct RowSum {
  Doubles sums[2] = {};

  REGFUSED_RULE void add(Floats row) {
    sums[0] += widen_low(row);
    sums[1] += widen_high(row);
  }
  REGFUSED_RULE void add(Doubles row) { sums[0] += row; }
  REGFUSED_RULE double total() const {
    double total = 0;
    for (int j = 0; j < kDoubles; ++j) total += sums[0][j] + sums[1][j];
    return total;
  }
};

template <int I>
using Position = std::integral_constant<int, I>;

// Calls body(Position<I>, offset) for each vector of a row of kLanes elements.
template <int N, class Body, int... I>
REGFUSED_RULE void for_each_vector(Body&& body, std::integer_sequence<int, I...>) {
  (body(Position<I>{}, I * N), ...);
}
template <class S, class Body>
REGFUSED_RULE void for_each_vector(Body&& body) {
  constexpr int N = sizeof(typename Storage<S>::V) / sizeof(typename Storage<S>::T);
  for_each_vector<N>(body, std::make_integer_sequence<int, kLanes / N>{});
}

// Row after row of one array; the last, short row is worked on in a copy filled up with zeros, so
// that there is no second formula for the tail.
template <class S>
class Rows {
 public:
  Rows(void* array, const Chunk& chunk) : at_(static_cast<S*>(array) + chunk.begin) {}

  REGFUSED_RULE S* row(int64_t i, int64_t n) {
    if (n - i >= kLanes) return at_ + i;
    __builtin_memset(last_, 0, sizeof last_);
    __builtin_memcpy(last_, at_ + i, (n - i) * sizeof(S));
    return last_;
  }
  REGFUSED_RULE void write_back(int64_t i, int64_t n) {
    if (n - i < kLanes) __builtin_memcpy(at_ + i, last_, (n - i) * sizeof(S));
  }

 private:
  S* at_;
  S last_[kLanes];
};

// Asks for the row that is worked on a little later: a core's own prefetcher leaves part of the memory's
// speed unused, in the norm pass, which only reads, more than a quarter of it. Twice or four times
// the distance makes no difference.
template <class S>
REGFUSED_RULE void prefetch(const S* row) {
  constexpr int kBytesAhead = 1024, kCacheLine = 64;
  const char* ahead = reinterpret_cast<const char*>(row) + kBytesAhead;
  for (int i = 0; i < int(kLanes * sizeof(S)); i += kCacheLine) __builtin_prefetch(ahead + i);
}

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
