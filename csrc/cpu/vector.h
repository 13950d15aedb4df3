// Vectors of one instruction set: load, store and conversion of every storage type. The only
// place that knows dtypes, and the only one with intrinsics (conversions that the compiler does
// not find by itself).
//
// Included once per instruction set, by the isa_*.cpp files, after REGFUSED_ISA and
// REGFUSED_VECTOR_BYTES are set; system headers must be included before the target pragma.
#pragma once

#include <cstdint>

#include "../rule/philox_rule.h"
#include "../rule/portable.h"

namespace regfused {
inline namespace REGFUSED_ISA {

// Lanes of a reduction: element i of a chunk is added into lane i % kLanes, on every instruction
// set, so that a norm has the same bits on all of them.
constexpr int kLanes = 32;

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

constexpr int kDoubles = REGFUSED_VECTOR_BYTES / 8;
constexpr int kFloats = REGFUSED_VECTOR_BYTES / 4;
using Doubles = Vector<double, kDoubles>;
using Floats = Vector<float, kFloats>;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using HalfBits = Vector<uint16_t, kFloats>;
using FloatBits = Vector<uint32_t, kFloats>;
using DoubleBits = Vector<uint64_t, kDoubles>;

// --- Conversions ------------------------------------------------------------------------------
//
// With intrinsics where the compiler makes many instructions of __builtin_convertvector.

// 16 bits to 32, and back: the upper 16 bits must be zero.
#if REGFUSED_VECTOR_BYTES == 64
REGFUSED_RULE FloatBits widen_bits(HalfBits x) { return (FloatBits)_mm512_cvtepu16_epi32((__m256i)x); }
REGFUSED_RULE HalfBits narrow_bits(FloatBits x) { return (HalfBits)_mm512_cvtepi32_epi16((__m512i)x); }
#elif REGFUSED_VECTOR_BYTES == 32
REGFUSED_RULE FloatBits widen_bits(HalfBits x) { return (FloatBits)_mm256_cvtepu16_epi32((__m128i)x); }
REGFUSED_RULE HalfBits narrow_bits(FloatBits x) {
  return (HalfBits)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
#elif defined(__SSE2__)
REGFUSED_RULE FloatBits widen_bits(HalfBits x) {
  return (FloatBits)_mm_unpacklo_epi16(_mm_cvtsi64_si128((long long)x), _mm_setzero_si128());
}
REGFUSED_RULE HalfBits narrow_bits(FloatBits x) {
  const __m128i sign_extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)x, 16), 16);
  return (HalfBits)_mm_cvtsi128_si64(_mm_packs_epi32(sign_extended, sign_extended));
}
#else
REGFUSED_RULE FloatBits widen_bits(HalfBits x) { return __builtin_convertvector(x, FloatBits); }
REGFUSED_RULE HalfBits narrow_bits(FloatBits x) { return __builtin_convertvector(x, HalfBits); }
#endif

// The lower and the upper half of a float vector as doubles.
#if REGFUSED_VECTOR_BYTES == 64
REGFUSED_RULE Doubles widen_low(Floats x) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
REGFUSED_RULE Doubles widen_high(Floats x) { return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }
#elif REGFUSED_VECTOR_BYTES == 32
REGFUSED_RULE Doubles widen_low(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
REGFUSED_RULE Doubles widen_high(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
#elif defined(__SSE2__)
REGFUSED_RULE Doubles widen_low(Floats x) { return (Doubles)_mm_cvtps_pd((__m128)x); }
REGFUSED_RULE Doubles widen_high(Floats x) { return (Doubles)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x)); }
#else
REGFUSED_RULE Doubles widen_low(Floats x) { return Doubles{double(x[0]), double(x[1])}; }
REGFUSED_RULE Doubles widen_high(Floats x) { return Doubles{double(x[2]), double(x[3])}; }
#endif

REGFUSED_RULE Floats to_float(Floats x) { return x; }
REGFUSED_RULE Doubles to_float(Doubles x) { return x; }
REGFUSED_RULE void from_float(Floats x, Floats& out) { out = x; }
REGFUSED_RULE void from_float(Doubles x, Doubles& out) { out = x; }

// bfloat16 is the upper half of a float; rounded to nearest, ties to even, NaN kept.
struct BFloat16Bits {
  HalfBits bits;
};
REGFUSED_RULE Floats to_float(BFloat16Bits x) { return (Floats)(widen_bits(x.bits) << 16); }
REGFUSED_RULE void from_float(Floats x, BFloat16Bits& out) {
  FloatBits bits = (FloatBits)x;
  FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  FloatBits quiet_nan = (bits >> 16) | 0x40;
  out.bits = narrow_bits(x != x ? quiet_nan : rounded);
}

struct Float16Bits {
  HalfBits bits;
};
#if REGFUSED_VECTOR_BYTES == 64
REGFUSED_RULE Floats to_float(Float16Bits x) { return (Floats)_mm512_cvtph_ps((__m256i)x.bits); }
REGFUSED_RULE void from_float(Floats x, Float16Bits& out) {
  out.bits = (HalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif REGFUSED_VECTOR_BYTES == 32
REGFUSED_RULE Floats to_float(Float16Bits x) { return (Floats)_mm256_cvtph_ps((__m128i)x.bits); }
REGFUSED_RULE void from_float(Floats x, Float16Bits& out) {
  out.bits = (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// IEEE half without hardware: integer arithmetic, to nearest, ties to even.
REGFUSED_RULE Floats to_float(Float16Bits x) {
  FloatBits half = widen_bits(x.bits);
  FloatBits sign = (half & 0x8000) << 16;
  FloatBits rest = half & 0x7fff;
  FloatBits normal = (rest << 13) + (112u << 23);
  FloatBits special = (rest << 13) | (255u << 23);  // inf, NaN
  special |= (FloatBits)((rest > 0x7c00) & 0x00400000);
  // A subnormal half is a multiple of 2^-24: 0.5 + it, minus 0.5, is exact in float.
  FloatBits half_bits = splat<FloatBits>(uint32_t(126) << 23);
  Floats subnormal = (Floats)(rest | half_bits) - (Floats)half_bits;
  FloatBits magnitude = rest >= 0x7c00 ? special : (rest < 0x0400 ? (FloatBits)subnormal : normal);
  return (Floats)(magnitude | sign);
}
REGFUSED_RULE void from_float(Floats x, Float16Bits& out) {
  FloatBits bits = (FloatBits)x;
  FloatBits sign = (bits >> 16) & 0x8000;
  FloatBits rest = bits & 0x7fffffff;
  FloatBits normal = (rest - (112u << 23) + 0x0fff + ((rest >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 lets the float adder round to a multiple of 2^-24.
  FloatBits half_bits = splat<FloatBits>(uint32_t(126) << 23);
  FloatBits subnormal = (FloatBits)((Floats)rest + (Floats)half_bits) - half_bits;
  FloatBits infinity = splat<FloatBits>(uint32_t(0x7c00));
  FloatBits nan = 0x7e00 | ((rest >> 13) & 0x3ff);
  FloatBits half = rest < (113u << 23) ? subnormal : normal;
  half = rest >= 0x477ff000 ? infinity : half;  // 65520 and above round to infinity
  half = rest > 0x7f800000 ? nan : half;
  out.bits = narrow_bits(half | sign);
}
#endif

// --- Roots ------------------------------------------------------------------------------------

// See portable.h. Vectors have no operator for it.
#if REGFUSED_VECTOR_BYTES == 64
template <>
REGFUSED_RULE Floats square_root(Floats x) {
  return (Floats)_mm512_sqrt_ps((__m512)x);
}
template <>
REGFUSED_RULE Doubles square_root(Doubles x) {
  return (Doubles)_mm512_sqrt_pd((__m512d)x);
}
#elif REGFUSED_VECTOR_BYTES == 32
template <>
REGFUSED_RULE Floats square_root(Floats x) {
  return (Floats)_mm256_sqrt_ps((__m256)x);
}
template <>
REGFUSED_RULE Doubles square_root(Doubles x) {
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
}
#elif defined(__SSE2__)
template <>
REGFUSED_RULE Floats square_root(Floats x) {
  return (Floats)_mm_sqrt_ps((__m128)x);
}
template <>
REGFUSED_RULE Doubles square_root(Doubles x) {
  return (Doubles)_mm_sqrt_pd((__m128d)x);
}
#else
template <>
REGFUSED_RULE Floats square_root(Floats x) {
  for (int j = 0; j < kFloats; ++j) x[j] = sqrtf(x[j]);
  return x;
}
template <>
REGFUSED_RULE Doubles square_root(Doubles x) {
  for (int j = 0; j < kDoubles; ++j) x[j] = sqrt(x[j]);
  return x;
}
#endif

// --- Integers ---------------------------------------------------------------------------------

REGFUSED_RULE DoubleBits consecutive() {
  DoubleBits lanes{};
  for (int j = 0; j < kDoubles; ++j) lanes[j] = uint64_t(j);
  return lanes;
}

// The lower halves of 64-bit lanes, a's at even and b's at odd positions.
REGFUSED_RULE FloatBits interleave_low(DoubleBits a, DoubleBits b) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  return (FloatBits)((a & 0xffffffffu) | (b << 32));
}

// See philox_rule.h. The compiler would multiply all 64 bits.
#if REGFUSED_VECTOR_BYTES == 64
template <>
REGFUSED_RULE DoubleBits low_product(DoubleBits a, uint32_t m) {
  return (DoubleBits)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
}
#elif REGFUSED_VECTOR_BYTES == 32
template <>
REGFUSED_RULE DoubleBits low_product(DoubleBits a, uint32_t m) {
  return (DoubleBits)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
}
#elif defined(__SSE2__)
template <>
REGFUSED_RULE DoubleBits low_product(DoubleBits a, uint32_t m) {
  return (DoubleBits)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
}
#endif

// Whether an upper or a lower half of any lane is this.
#if REGFUSED_VECTOR_BYTES == 64
REGFUSED_RULE bool any_half_is(FloatBits x, uint16_t half) {
  return _mm512_cmpeq_epi16_mask((__m512i)x, _mm512_set1_epi16(int16_t(half))) != 0;
}
#elif REGFUSED_VECTOR_BYTES == 32
REGFUSED_RULE bool any_half_is(FloatBits x, uint16_t half) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi16((__m256i)x, _mm256_set1_epi16(int16_t(half)))) != 0;
}
#elif defined(__SSE2__)
REGFUSED_RULE bool any_half_is(FloatBits x, uint16_t half) {
  return _mm_movemask_epi8(_mm_cmpeq_epi16((__m128i)x, _mm_set1_epi16(int16_t(half)))) != 0;
}
#else
REGFUSED_RULE bool any_half_is(FloatBits x, uint16_t half) {
  bool any = false;
  for (int j = 0; j < kFloats; ++j) any |= (x[j] >> 16) == half || (x[j] & 0xffff) == half;
  return any;
}
#endif

// The lower and the upper half of a vector of 32-bit integers in 64 bits.
#if REGFUSED_VECTOR_BYTES == 64
REGFUSED_RULE DoubleBits widen_low(FloatBits x) {
  return (DoubleBits)_mm512_cvtepu32_epi64(_mm512_castsi512_si256((__m512i)x));
}
REGFUSED_RULE DoubleBits widen_high(FloatBits x) {
  return (DoubleBits)_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64((__m512i)x, 1));
}
#elif REGFUSED_VECTOR_BYTES == 32
REGFUSED_RULE DoubleBits widen_low(FloatBits x) {
  return (DoubleBits)_mm256_cvtepu32_epi64(_mm256_castsi256_si128((__m256i)x));
}
REGFUSED_RULE DoubleBits widen_high(FloatBits x) {
  return (DoubleBits)_mm256_cvtepu32_epi64(_mm256_extracti128_si256((__m256i)x, 1));
}
#else
REGFUSED_RULE DoubleBits widen_low(FloatBits x) { return DoubleBits{x[0], x[1]}; }
REGFUSED_RULE DoubleBits widen_high(FloatBits x) { return DoubleBits{x[2], x[3]}; }
#endif

// --- Storage types ----------------------------------------------------------------------------

// For a storage type S: the type of arithmetic T, its vector V, and the bits as they lie in memory.
template <class S>
struct Storage;

template <>
struct Storage<float> {
  using T = float;
  using V = Floats;
  using Bits = Floats;
};
template <>
struct Storage<double> {
  using T = double;
  using V = Doubles;
  using Bits = Doubles;
};
template <>
struct Storage<BFloat16> {
  using T = float;
  using V = Floats;
  using Bits = BFloat16Bits;
};
template <>
struct Storage<Float16> {
  using T = float;
  using V = Floats;
  using Bits = Float16Bits;
};

template <class S>
REGFUSED_RULE typename Storage<S>::V load(const S* from) {
  typename Storage<S>::Bits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return to_float(bits);
}
template <class S, class V>
REGFUSED_RULE void store(S* to, V x) {
  typename Storage<S>::Bits bits;
  from_float(x, bits);
  __builtin_memcpy(to, &bits, sizeof bits);
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
