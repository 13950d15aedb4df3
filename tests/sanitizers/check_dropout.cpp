// Dropout of every dtype and size against a loop over single elements, with a generator of its own.
#include <array>

#include "checks.h"
#include "devices.h"

namespace regfused {

namespace {

// Philox4x32-10, word by word.
std::array<uint32_t, 4> random_words(uint64_t counter, uint32_t stream, uint64_t key) {
  std::array<uint32_t, 4> w = {uint32_t(counter), uint32_t(counter >> 32), stream, 0};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t left = uint64_t(w[0]) * 0xd2511f53u, right = uint64_t(w[2]) * 0xcd9e8d57u;
    w = {uint32_t(right >> 32) ^ w[1] ^ k0, uint32_t(right), uint32_t(left >> 32) ^ w[3] ^ k1, uint32_t(left)};
  }
  return w;
}

// The random bits of an element, as csrc/dropout_rule.h describes them.
uint32_t random_bits(int64_t element, uint64_t seed) {
  const int64_t row = element / 64, place = element % 64;
  const uint64_t counter = row * 8 + place % 16 / 2;
  const int64_t word = place / 32 * 2 + place % 2;
  const auto half = [&](uint32_t stream) {
    const uint32_t bits = random_words(counter, stream, seed)[word];
    return place / 16 % 2 == 0 ? bits >> 16 : bits & 0xffff;
  };
  return half(0) << 16 | half(1);
}

void check(DType dtype, int64_t numel, double p, bool in_place) {
  const Array input = gradients(dtype, numel, numel);
  const int64_t seed = 0x1234567 + numel;
  const auto [one, four] = on_one_and_on_four([&] {
    Array copy = input;
    Array output = in_place ? std::move(copy) : Array(dtype, numel);
    DropoutJob job;
    job.input = in_place ? output.data() : input.data();
    job.output = output.data();
    job.seed = &seed;
    job.numel = numel;
    job.p = p;
    job.dtype = dtype;
    run_dropout(job, {});
    return output;
  });
  const std::string what = "dropout of " + std::to_string(numel) + ", p " + std::to_string(p);
  expect(one == four, what + ": other bits on four threads");
  std::vector<double> want = input.values();
  for (int64_t i = 0; i < numel; ++i)
    want[i] = p < 1 && random_bits(i, uint64_t(seed)) >= p * 4294967296.0 ? want[i] / (1 - p) : 0;
  expect_near(one, want, 16, what);
}

}  // namespace

void check_dropout() {
  for (const Kind& kind : kinds_of_arrays()) check(kind.dtype, kind.numel, 0.3, kind.numel % 2 == 0);
  for (const DType dtype : kDTypes) {
    check(dtype, 40000, 0.3, false);
    for (const double p : {0.0, 0.5, 1.0}) check(dtype, 4099, p, false);
  }
}

}  // namespace regfused
