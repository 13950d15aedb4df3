// Every kernel, compiled for what any machine of this architecture has.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#define REGFUSED_ISA plain
#define REGFUSED_VECTOR_BYTES 16

#include "isa_kernels.h"
