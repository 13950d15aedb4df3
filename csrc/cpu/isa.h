// The choice of instruction set, at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace regfused {

// Names of the instruction sets that were compiled and that this machine runs, best last.
std::vector<std::string> usable_isas();

// The kernels of REGFUSED_ISA (plain, avx2 or avx512) where that environment variable is set,
// otherwise the best that this machine runs. Raises where the machine cannot run what is asked.
const Kernels* choose_kernels();

}  // namespace regfused
