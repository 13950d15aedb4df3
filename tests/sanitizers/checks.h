// What the program checks, and how results are held against plain loops in double.
#pragma once

#include <string>
#include <vector>

#include "array.h"
#include "rule/slice_rule.h"

namespace regfused {

// Sizes around the registers (2 to 16 elements), a row of 32 lanes and a chunk of 16384 elements, of every dtype, and a
// large array.
struct Kind {
  DType dtype;
  int64_t numel;
};
const std::vector<Kind>& kinds_of_arrays();

// Slices that make whole chunks, and slices that do not.
inline const std::vector<SliceLayout> kWholeSlices = {{1, 5, 1},     {1, 0, 3},     {1, 1100, 2}, {1, 33, 31},
                                                      {1, 5, 32},    {1, 7, 33},    {1, 3, 1025}, {1, 2, 8191},
                                                      {1, 3, 16383}, {1, 2, 16384}, {1, 300, 350}};
inline const std::vector<SliceLayout> kOtherSlices = {
    {3, 0, 5},    {5, 3, 1},    {33, 31, 1},   {129, 1, 7},   {17, 6, 9},    {3, 2, 9},    {65, 2, 1023},
    {3, 2, 1024}, {2, 5, 1025}, {1, 2, 16385}, {2, 1, 40000}, {150, 700, 1}, {70, 11, 130}};

// What is not as expected is counted, and printed the first few times.
void expect(bool right, const std::string& what);
void expect_near(double got, double want, const std::string& what);
// `scale`: no smaller than any term of the sums that elements were made of; `roundings`: to the dtype.
void expect_near(const Array& got, const std::vector<double>& want, double scale, const std::string& what,
                 int roundings = 1);

// Each slice times the factor that `factor_of` makes of its norm.
template <class F>
void scale_slices(std::vector<double>& w, const SliceLayout& layout, const F& factor_of) {
  std::vector<double> squares(layout.count);
  const auto slice_of = [&](int64_t i) { return i / layout.inner % layout.count; };
  for (int64_t i = 0; i < layout.numel(); ++i) squares[slice_of(i)] += w[i] * w[i];
  for (int64_t i = 0; i < layout.numel(); ++i) w[i] *= factor_of(std::sqrt(squares[slice_of(i)]));
}

// Each runs its passes on one thread and on four, which must agree bit for bit, and against a loop.
void check_step();
void check_foreach();
void check_max_norm();
void check_dropout();

// f() on one thread, then on four.
void allow_threads(int64_t count);
template <class F>
auto on_one_and_on_four(const F& f) {
  allow_threads(1);
  auto one = f();
  allow_threads(4);
  return std::pair(std::move(one), f());
}

}  // namespace regfused
