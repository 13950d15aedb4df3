// The choice of instruction set, at run time.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>

#include <c10/util/Exception.h>

namespace regfused {

namespace plain {
const Kernels* kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels* kernels();
}
#if !defined(REGFUSED_WITHOUT_AVX512)  // builds for tests alone
namespace avx512 {
const Kernels* kernels();
}
#endif
#endif

namespace {

struct Isa {
  const char* name;
  bool usable;
  const Kernels* (*kernels)();
};

#if defined(__x86_64__)
// Older clang has no name for it.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Worst first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> table = [] {
    std::vector<Isa> isas = {{"plain", true, plain::kernels}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Each test also asks the operating system whether it saves the registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                         __builtin_cpu_supports("avx512vl");
    isas.push_back({"avx2", avx2, avx2::kernels});
#if !defined(REGFUSED_WITHOUT_AVX512)
    isas.push_back({"avx512", avx512, avx512::kernels});
#endif
#endif
    return isas;
  }();
  return table;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.usable) names.emplace_back(isa.name);
  return names;
}

const Kernels* choose_kernels() {
  const char* asked = std::getenv("REGFUSED_ISA");
  const bool any = asked == nullptr || *asked == '\0';
  const Isa* chosen = nullptr;
  std::string usable;
  for (const Isa& isa : isas()) {
    if (!isa.usable) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
    if (any || std::string(asked) == isa.name) chosen = &isa;
  }
  TORCH_CHECK(chosen, "regfused: REGFUSED_ISA must be one of ", usable, " on this machine, but is '", asked, "'");
  return chosen->kernels();
}

}  // namespace regfused
