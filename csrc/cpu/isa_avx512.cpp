// Every kernel, compiled for AVX-512.
//
// System headers come first, under the compiler's default target: what they define inline may be
// the one copy that the linker keeps. Everything after the pragma lives in a namespace of its own.
#if defined(__x86_64__)

// g++ 12 warns of the undefined registers in its own header, wherever they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define REGFUSED_ISA avx512
#define REGFUSED_VECTOR_BYTES 64

#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
