// The CPU's kernels and drivers without torch and Python: checks all of them, or plants a bug that a sanitizer must
// see.
#include <ATen/Parallel.h>

#include <algorithm>
#include <iostream>

#include "checks.h"
#include "cpu/isa.h"
#include "planted.h"

namespace regfused {

namespace {

int wrong_so_far = 0;

void wrong(const std::string& what) {
  if (++wrong_so_far <= 20) std::cout << "wrong: " << what << "\n";
}

}  // namespace

void expect(bool right, const std::string& what) {
  if (!right) wrong(what);
}

void expect_near(double got, double want, const std::string& what) {
  if (!(std::abs(got - want) <= 1e-6 * std::abs(want)))
    wrong(what + " is " + std::to_string(got) + " instead of " + std::to_string(want));
}

void expect_near(const Array& got, const std::vector<double>& want, double scale, const std::string& what,
                 int roundings) {
  const double arithmetic = got.dtype() == DType::float64 ? 0x1p-52 : 0x1p-23;
  const double storage = got.dtype() == DType::bfloat16 ? 0x1p-8 : got.dtype() == DType::float16 ? 0x1p-11 : 0;
  // Half the spacing of the smallest float16 numbers.
  const double absolute = 16 * arithmetic * scale + (storage > 0 ? 0x1p-25 : 0) + (roundings - 1) * storage * scale;
  for (size_t i = 0; i < want.size(); ++i) {
    const double x = got[static_cast<int64_t>(i)];
    if (!(std::abs(x - want[i]) <= absolute + storage * std::abs(want[i])))
      return wrong(what + ": element " + std::to_string(i) + " is " + std::to_string(x) + " instead of " +
                   std::to_string(want[i]));
  }
}

const std::vector<Kind>& kinds_of_arrays() {
  static const std::vector<Kind> kinds = [] {
    std::vector<Kind> kinds;
    for (const int64_t numel : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 4099, 16383, 16384, 16385})
      for (const DType dtype : kDTypes) kinds.push_back({dtype, numel});
    kinds.push_back({DType::float32, 300000});
    return kinds;
  }();
  return kinds;
}

void allow_threads(int64_t count) { at::threads_allowed = count; }

namespace {

void check(const char* name, void (*all)()) {
  const int64_t before = at::threads_started;
  all();
  expect(at::threads_started > before, std::string(name) + " started no thread");
  std::cout << choose_kernels()->isa << ": " << name << " checked" << std::endl;
}

int check_all() {
  check("step", check_step);
  check("foreach", check_foreach);
  check("max norm", check_max_norm);
  check("dropout", check_dropout);
  std::cout << wrong_so_far << " wrong" << std::endl;
  return wrong_so_far > 0;
}

}  // namespace

}  // namespace regfused

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc == 2 && what == "check") return regfused::check_all();
  if (argc == 2 && what == "isas") {
    for (const std::string& isa : regfused::usable_isas()) std::cout << isa << "\n";
    return 0;
  }
  if (argc == 3 && what == "plant" && regfused_plant(argv[2])) return 0;
  std::cerr << "usage: program isas | check | plant NAME\n";
  return 2;
}
