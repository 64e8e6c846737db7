// Sixteen float lanes on AVX-512, AVX2 and plain C++, with one set of names.
//
// Included by one translation unit an instruction set, which defines ZK_AVX512, ZK_AVX2 or neither.
// Everything sits in an unnamed namespace, so that no function compiled for one instruction set can
// be picked by the linker for another. Only operations that are exact or correctly rounded on all
// three are offered: the three paths produce equal bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numeric.h"

#if defined(ZK_AVX512) || defined(ZK_AVX2)
#include <immintrin.h>
#endif

#if defined(ZK_AVX512) || defined(ZK_AVX2)
#define ZK_INLINE inline __attribute__((always_inline))
#else
#define ZK_INLINE inline  // lanes are loops here: inlining all of them costs minutes of compilation
#endif

namespace zk {
namespace {

constexpr int kLanes = 16;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

#if defined(ZK_AVX512)

// F: 16 floats. U: 16 x 32 bits. W: 8 x 64 bits, one 32-bit word in each low half (the high halves
// hold garbage unless said otherwise). D: 16 doubles.
struct F {
  __m512 v;
};
struct U {
  __m512i v;
};
struct W {
  __m512i v;
};
struct D {
  __m512d lo, hi;
};

ZK_INLINE F splat(float x) { return {_mm512_set1_ps(x)}; }
ZK_INLINE U splat(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
ZK_INLINE W wide(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
ZK_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
ZK_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
ZK_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZK_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ZK_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
// b where a is NaN or not greater.
ZK_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
ZK_INLINE U bits(F a) { return {_mm512_castps_si512(a.v)}; }
ZK_INLINE F floats(U a) { return {_mm512_castsi512_ps(a.v)}; }
ZK_INLINE U operator+(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
ZK_INLINE U operator-(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
ZK_INLINE U operator&(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
ZK_INLINE U operator|(U a, U b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n>
ZK_INLINE U shr(U a) {
  return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
ZK_INLINE U shl(U a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
ZK_INLINE U sar(U a) {
  return {_mm512_srai_epi32(a.v, n)};
}
ZK_INLINE F to_float(U a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Unsigned; the bits of a that float32 cannot hold must be zero.
ZK_INLINE F to_float_unsigned(U a) { return {_mm512_cvtepu32_ps(a.v)}; }
ZK_INLINE U and_xor(U a, U m, U x) { return {_mm512_ternarylogic_epi32(a.v, m.v, x.v, 0x6A)}; }
ZK_INLINE U and_or(U a, U m, U x) { return {_mm512_ternarylogic_epi32(a.v, m.v, x.v, 0xEA)}; }
template <int n>
ZK_INLINE F flip_sign_by_bit(F a, U b) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(a.v), _mm512_slli_epi32(b.v, 31 - n), splat(0x80000000u).v, 0x78))};
}
template <int n>
ZK_INLINE F select_by_bit(U b, F set, F clear) {
  return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(b.v, splat(1u << n).v), clear.v, set.v)};
}
ZK_INLINE F floor_positive(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
ZK_INLINE F select_less(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// `yes` where the exponent of a is not all ones.
ZK_INLINE F select_finite(F a, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_fpclass_ps_mask(a.v, 0x99), yes.v, no.v)};
}
// Exponent and mantissa of a positive a = m 2^e, m in [3/4, 3/2); e - 32 is returned.
ZK_INLINE void split(F a, F& e, F& m) {
  const U i = bits(a) - splat(0x3F400000u + (32u << 23));
  e = to_float(sar<23>(i));
  m = {_mm512_getmant_ps(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero)};
}
// Sixteen bits of sign: a lane is negated where its bit is set.
ZK_INLINE F flip_signs(F a, const void* mask16) {
  uint16_t m;
  memcpy(&m, mask16, 2);
  return {_mm512_mask_xor_ps(a.v, m, a.v, _mm512_set1_ps(-0.0f))};
}

ZK_INLINE W multiply(W a, W b) { return {_mm512_mul_epu32(a.v, b.v)}; }
ZK_INLINE W high(W a) { return {_mm512_srli_epi64(a.v, 32)}; }
ZK_INLINE W operator^(W a, W b) { return {_mm512_xor_si512(a.v, b.v)}; }
ZK_INLINE W xor3(W a, W b, W c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
// factor * (base + step * lane) in 64 bits.
ZK_INLINE W products(uint32_t factor, uint32_t base, uint32_t step) {
  const long long f = static_cast<long long>(factor) * step;
  const __m512i ramp = _mm512_set_epi64(7 * f, 6 * f, 5 * f, 4 * f, 3 * f, 2 * f, f, 0);
  const auto start = static_cast<long long>(static_cast<uint64_t>(factor) * base);
  return {_mm512_add_epi64(_mm512_set1_epi64(start), ramp)};
}
// Words of even and odd counters in counter order.
ZK_INLINE U interleave(W even, W odd) {
  return {_mm512_castps_si512(
      _mm512_mask_moveldup_ps(_mm512_castsi512_ps(even.v), 0xAAAA, _mm512_castsi512_ps(odd.v)))};
}
ZK_INLINE void store_words(uint32_t* p, W a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a.v));
}

ZK_INLINE __mmask16 lane_mask(int lo, int hi) {
  return static_cast<__mmask16>((0xFFFFu >> (16 - (hi - lo))) << lo);
}
ZK_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
ZK_INLINE F widen(__m256i h, Bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
ZK_INLINE F widen(__m256i h, Fp16) { return {_mm512_cvtph_ps(h)}; }
template <class T>
ZK_INLINE F load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
// Lanes [lo, hi) only: nothing outside p[lo..hi) is touched, other lanes are zero.
ZK_INLINE F load(const float* p, int lo, int hi) {
  return {_mm512_maskz_loadu_ps(lane_mask(lo, hi), p)};
}
template <class T>
ZK_INLINE F load(const T* p, int lo, int hi) {
  return widen(_mm256_maskz_loadu_epi16(lane_mask(lo, hi), p), T{});
}
// The upper halves of the lanes, in order.
ZK_INLINE __m256i upper_halves(U a) {
  const __m512i index =
      _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x001F001D, 0x001B0019, 0x00170015, 0x00130011,
                       0x000F000D, 0x000B0009, 0x00070005, 0x00030001);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(index, a.v));
}
// narrow: the 16-bit form of a value that the type holds exactly.
ZK_INLINE __m256i narrow(F a, Bf16) { return upper_halves(bits(a)); }
ZK_INLINE __m256i narrow(F a, Fp16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ZK_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
template <class T>
ZK_INLINE void store(T* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
ZK_INLINE void store(float* p, F a, int lo, int hi) {
  _mm512_mask_storeu_ps(p, lane_mask(lo, hi), a.v);
}
template <class T>
ZK_INLINE void store(T* p, F a, int lo, int hi) {
  _mm256_mask_storeu_epi16(p, lane_mask(lo, hi), narrow(a, T{}));
}
ZK_INLINE U bf16_nearest_bits(F a) {
  const U u = bits(a);
  const U half = u + splat(0x7FFFu);
  const U t{_mm512_mask_add_epi32(half.v, _mm512_test_epi32_mask(u.v, splat(0x00010000u).v), half.v,
                                  splat(1u).v)};
  // NaN: quiet bit set and no carry, so that it stays NaN.
  return {_mm512_mask_or_epi32(t.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), u.v,
                               splat(0x00400000u).v)};
}
// Upper halves: a plus sixteen random bits below them; NaN is made quiet, infinities stay.
ZK_INLINE U bf16_stochastic_bits(F a, U r16) {
  const __m512i u = bits(a).v;
  const __mmask16 special = _mm512_fpclass_ps_mask(a.v, 0x99);
  const __m512i t = _mm512_mask_add_epi32(u, _knot_mask16(special), u, r16.v);
  return {
      _mm512_mask_or_epi32(t, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), t, splat(0x00400000u).v)};
}
ZK_INLINE F fp16_round(F a) { return {_mm512_cvtph_ps(narrow(a, Fp16{}))}; }

// v[i] lane j becomes v[j] lane i.
ZK_INLINE void transpose16(F v[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
  const auto pair = [](__m512 x, __m512 y, bool upper) {
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
  };
  // b[i + c]: column c, 4 + c, 8 + c, 12 + c of rows i .. i + 3 in its four quarters.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = pair(a[i], a[i + 2], false);
    b[i + 1] = pair(a[i], a[i + 2], true);
    b[i + 2] = pair(a[i + 1], a[i + 3], false);
    b[i + 3] = pair(a[i + 1], a[i + 3], true);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xEE);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xEE);
    v[c] = {_mm512_shuffle_f32x4(low01, low23, 0x88)};
    v[4 + c] = {_mm512_shuffle_f32x4(low01, low23, 0xDD)};
    v[8 + c] = {_mm512_shuffle_f32x4(high01, high23, 0x88)};
    v[12 + c] = {_mm512_shuffle_f32x4(high01, high23, 0xDD)};
  }
}

ZK_INLINE D zero_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
// c + a b in double.
ZK_INLINE D fma_double(F a, F b, D c) {
  const auto upper = [](F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)); };
  const auto lower = [](F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)); };
  return {_mm512_fmadd_pd(lower(a), lower(b), c.lo), _mm512_fmadd_pd(upper(a), upper(b), c.hi)};
}
ZK_INLINE D load_doubles(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
ZK_INLINE void store_doubles(double* p, D a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}

#elif defined(ZK_AVX2)

struct F {
  __m256 a, b;
};
struct U {
  __m256i a, b;
};
struct W {
  __m256i a, b;
};
struct D {
  __m256d v[4];
};

ZK_INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ZK_INLINE U splat(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
ZK_INLINE W wide(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
ZK_INLINE F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
ZK_INLINE F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
ZK_INLINE F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
ZK_INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
ZK_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
ZK_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
ZK_INLINE U bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
ZK_INLINE F floats(U x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
ZK_INLINE U operator+(U x, U y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
ZK_INLINE U operator-(U x, U y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
ZK_INLINE U operator&(U x, U y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
ZK_INLINE U operator|(U x, U y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
ZK_INLINE U operator^(U x, U y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int n>
ZK_INLINE U shr(U x) {
  return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
}
template <int n>
ZK_INLINE U shl(U x) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
template <int n>
ZK_INLINE U sar(U x) {
  return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)};
}
ZK_INLINE F to_float(U x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
ZK_INLINE F to_float_unsigned(U x) { return to_float(shr<1>(x)) * splat(2.0f); }
ZK_INLINE U and_xor(U x, U m, U y) { return (x & m) ^ y; }
ZK_INLINE U and_or(U x, U m, U y) { return (x & m) | y; }
template <int n>
ZK_INLINE F flip_sign_by_bit(F x, U b) {
  return floats(bits(x) ^ (shl<31 - n>(b) & splat(0x80000000u)));
}
template <int n>
ZK_INLINE F select_by_bit(U b, F set, F clear) {
  const F s = floats(shl<31 - n>(b));
  return {_mm256_blendv_ps(clear.a, set.a, s.a), _mm256_blendv_ps(clear.b, set.b, s.b)};
}
ZK_INLINE F floor_positive(F x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
ZK_INLINE F select_less(F x, F y, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
ZK_INLINE F select_finite(F x, F yes, F no) {
  const U exponent = splat(0x7F800000u);
  const U e = bits(x) & exponent;
  const __m256 special_a = _mm256_castsi256_ps(_mm256_cmpeq_epi32(e.a, exponent.a));
  const __m256 special_b = _mm256_castsi256_ps(_mm256_cmpeq_epi32(e.b, exponent.b));
  return {_mm256_blendv_ps(yes.a, no.a, special_a), _mm256_blendv_ps(yes.b, no.b, special_b)};
}
ZK_INLINE void split(F x, F& e, F& m) {
  const U i = bits(x) - splat(0x3F400000u + (32u << 23));
  e = to_float(sar<23>(i));
  m = floats((i & splat(0x007FFFFFu)) + splat(0x3F400000u));
}
ZK_INLINE F flip_signs(F x, const void* mask16) {
  uint16_t m;
  memcpy(&m, mask16, 2);
  const __m256i all = _mm256_set1_epi32(m);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  const __m256i lo = _mm256_sllv_epi32(all, _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31));
  const __m256i hi = _mm256_sllv_epi32(all, _mm256_set_epi32(16, 17, 18, 19, 20, 21, 22, 23));
  return {_mm256_xor_ps(x.a, _mm256_castsi256_ps(_mm256_and_si256(lo, sign))),
          _mm256_xor_ps(x.b, _mm256_castsi256_ps(_mm256_and_si256(hi, sign)))};
}

ZK_INLINE W multiply(W x, W y) { return {_mm256_mul_epu32(x.a, y.a), _mm256_mul_epu32(x.b, y.b)}; }
ZK_INLINE W high(W x) { return {_mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32)}; }
ZK_INLINE W operator^(W x, W y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
ZK_INLINE W xor3(W x, W y, W z) { return x ^ y ^ z; }
ZK_INLINE W products(uint32_t factor, uint32_t base, uint32_t step) {
  const long long f = static_cast<long long>(factor) * step;
  const auto start = static_cast<long long>(static_cast<uint64_t>(factor) * base);
  const __m256i s = _mm256_set1_epi64x(start);
  return {_mm256_add_epi64(s, _mm256_set_epi64x(3 * f, 2 * f, f, 0)),
          _mm256_add_epi64(s, _mm256_set_epi64x(7 * f, 6 * f, 5 * f, 4 * f))};
}
ZK_INLINE U interleave(W even, W odd) {
  return {_mm256_blend_epi32(even.a, _mm256_slli_epi64(odd.a, 32), 0xAA),
          _mm256_blend_epi32(even.b, _mm256_slli_epi64(odd.b, 32), 0xAA)};
}
ZK_INLINE void store_words(uint32_t* p, W x) {
  alignas(32) uint64_t t[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(t), x.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(t + 4), x.b);
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint32_t>(t[i]);
}

ZK_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ZK_INLINE F widen(__m128i lo, __m128i hi, Bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
}
ZK_INLINE F widen(__m128i lo, __m128i hi, Fp16) {
  return {_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)};
}
template <class T>
ZK_INLINE F load(const T* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return widen(_mm_loadu_si128(q), _mm_loadu_si128(q + 1), T{});
}
ZK_INLINE __m256i upper_halves(U x) {
  const __m256i packed =
      _mm256_packus_epi32(_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16));
  return _mm256_permute4x64_epi64(packed, 0xD8);
}
ZK_INLINE __m256i narrow(F x, Bf16) { return upper_halves(bits(x)); }
ZK_INLINE __m256i narrow(F x, Fp16) {
  const __m128i lo = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i hi = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_set_m128i(hi, lo);
}
ZK_INLINE void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
template <class T>
ZK_INLINE void store(T* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <class T>
ZK_INLINE F load(const T* p, int lo, int hi) {
  T t[kLanes] = {};
  for (int i = lo; i < hi; ++i) t[i] = p[i];
  return load(t);
}
template <class T>
ZK_INLINE void store(T* p, F x, int lo, int hi) {
  T t[kLanes];
  store(t, x);
  for (int i = lo; i < hi; ++i) p[i] = t[i];
}
ZK_INLINE U bf16_nearest_bits(F x) {
  const U u = bits(x);
  const U t = u + splat(0x7FFFu) + (shr<16>(u) & splat(1u));
  const F nan = floats(u | splat(0x00400000u));
  return bits(F{_mm256_blendv_ps(floats(t).a, nan.a, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
                _mm256_blendv_ps(floats(t).b, nan.b, _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))});
}
ZK_INLINE U bf16_stochastic_bits(F x, U r16) {
  const F nan = floats(bits(x) | splat(0x00400000u));
  const F kept{_mm256_blendv_ps(x.a, nan.a, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
               _mm256_blendv_ps(x.b, nan.b, _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))};
  return bits(select_finite(x, floats(bits(x) + r16), kept));
}
ZK_INLINE F fp16_round(F x) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
          _mm256_cvtph_ps(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// Rows and columns of eight: v[i] lane j becomes v[j] lane i.
ZK_INLINE void transpose8(__m256 v[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}
ZK_INLINE void transpose16(F v[16]) {
  __m256 q[4][8];
  for (int i = 0; i < 8; ++i) {
    q[0][i] = v[i].a;
    q[1][i] = v[i].b;
    q[2][i] = v[8 + i].a;
    q[3][i] = v[8 + i].b;
  }
  for (auto& block : q) transpose8(block);
  for (int i = 0; i < 8; ++i) {
    v[i] = {q[0][i], q[2][i]};
    v[8 + i] = {q[1][i], q[3][i]};
  }
}

ZK_INLINE D zero_doubles() {
  const __m256d z = _mm256_setzero_pd();
  return {{z, z, z, z}};
}
ZK_INLINE D fma_double(F x, F y, D c) {
  const auto part = [](F f, int i) {
    const __m256 h = i < 2 ? f.a : f.b;
    return _mm256_cvtps_pd(i % 2 ? _mm256_extractf128_ps(h, 1) : _mm256_castps256_ps128(h));
  };
  for (int i = 0; i < 4; ++i) c.v[i] = _mm256_fmadd_pd(part(x, i), part(y, i), c.v[i]);
  return c;
}
ZK_INLINE D load_doubles(const double* p) {
  D d;
  for (int i = 0; i < 4; ++i) d.v[i] = _mm256_loadu_pd(p + 4 * i);
  return d;
}
ZK_INLINE void store_doubles(double* p, D d) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, d.v[i]);
}

#else  // plain C++

struct F {
  float v[kLanes];
};
struct U {
  uint32_t v[kLanes];
};
struct W {
  uint64_t v[8];
};
struct D {
  double v[kLanes];
};

template <class V, class Fn>
ZK_INLINE V each(Fn fn) {
  V r;
  for (int i = 0; i < static_cast<int>(sizeof(V::v) / sizeof(V::v[0])); ++i) r.v[i] = fn(i);
  return r;
}

ZK_INLINE F splat(float x) {
  return each<F>([&](int) { return x; });
}
ZK_INLINE U splat(uint32_t x) {
  return each<U>([&](int) { return x; });
}
ZK_INLINE W wide(uint32_t x) {
  return each<W>([&](int) { return x; });
}
ZK_INLINE F operator+(F a, F b) {
  return each<F>([&](int i) { return a.v[i] + b.v[i]; });
}
ZK_INLINE F operator-(F a, F b) {
  return each<F>([&](int i) { return a.v[i] - b.v[i]; });
}
ZK_INLINE F operator*(F a, F b) {
  return each<F>([&](int i) { return a.v[i] * b.v[i]; });
}
ZK_INLINE F fma(F a, F b, F c) {
  return each<F>([&](int i) { return fma32(a.v[i], b.v[i], c.v[i]); });
}
ZK_INLINE F sqrt(F a) {
  return each<F>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
ZK_INLINE F max(F a, F b) {
  return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
ZK_INLINE U bits(F a) {
  return each<U>([&](int i) { return float_bits(a.v[i]); });
}
ZK_INLINE F floats(U a) {
  return each<F>([&](int i) { return bits_float(a.v[i]); });
}
ZK_INLINE U operator+(U a, U b) {
  return each<U>([&](int i) { return a.v[i] + b.v[i]; });
}
ZK_INLINE U operator-(U a, U b) {
  return each<U>([&](int i) { return a.v[i] - b.v[i]; });
}
ZK_INLINE U operator&(U a, U b) {
  return each<U>([&](int i) { return a.v[i] & b.v[i]; });
}
ZK_INLINE U operator|(U a, U b) {
  return each<U>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int n>
ZK_INLINE U shr(U a) {
  return each<U>([&](int i) { return a.v[i] >> n; });
}
template <int n>
ZK_INLINE U shl(U a) {
  return each<U>([&](int i) { return a.v[i] << n; });
}
template <int n>
ZK_INLINE U sar(U a) {
  return each<U>([&](int i) { return static_cast<uint32_t>(static_cast<int32_t>(a.v[i]) >> n); });
}
ZK_INLINE F to_float(U a) {
  return each<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
ZK_INLINE F to_float_unsigned(U a) {
  return each<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
ZK_INLINE U and_xor(U a, U m, U x) {
  return each<U>([&](int i) { return (a.v[i] & m.v[i]) ^ x.v[i]; });
}
ZK_INLINE U and_or(U a, U m, U x) {
  return each<U>([&](int i) { return (a.v[i] & m.v[i]) | x.v[i]; });
}
template <int n>
ZK_INLINE F flip_sign_by_bit(F a, U b) {
  return each<F>(
      [&](int i) { return bits_float(float_bits(a.v[i]) ^ ((b.v[i] << (31 - n)) & 0x80000000u)); });
}
template <int n>
ZK_INLINE F select_by_bit(U b, F set, F clear) {
  return each<F>([&](int i) { return (b.v[i] >> n) & 1u ? set.v[i] : clear.v[i]; });
}
ZK_INLINE F floor_positive(F a) {
  return each<F>([&](int i) { return __builtin_floorf(a.v[i]); });
}
ZK_INLINE F select_less(F a, F b, F yes, F no) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
ZK_INLINE F select_finite(F a, F yes, F no) {
  return each<F>([&](int i) {
    return (float_bits(a.v[i]) & 0x7F800000u) == 0x7F800000u ? no.v[i] : yes.v[i];
  });
}
ZK_INLINE void split(F a, F& e, F& m) {
  const U i = bits(a) - splat(0x3F400000u + (32u << 23));
  e = to_float(sar<23>(i));
  m = floats((i & splat(0x007FFFFFu)) + splat(0x3F400000u));
}
ZK_INLINE F flip_signs(F a, const void* mask16) {
  uint16_t m;
  memcpy(&m, mask16, 2);
  return each<F>([&](int i) {
    return bits_float(float_bits(a.v[i]) ^ ((static_cast<uint32_t>(m) >> i) << 31));
  });
}

ZK_INLINE W multiply(W a, W b) {
  return each<W>([&](int i) { return (a.v[i] & 0xFFFFFFFFu) * (b.v[i] & 0xFFFFFFFFu); });
}
ZK_INLINE W high(W a) {
  return each<W>([&](int i) { return a.v[i] >> 32; });
}
ZK_INLINE W operator^(W a, W b) {
  return each<W>([&](int i) { return a.v[i] ^ b.v[i]; });
}
ZK_INLINE W xor3(W a, W b, W c) { return a ^ b ^ c; }
ZK_INLINE W products(uint32_t factor, uint32_t base, uint32_t step) {
  return each<W>([&](int i) {
    return static_cast<uint64_t>(factor) * (base + step * static_cast<uint32_t>(i));
  });
}
ZK_INLINE U interleave(W even, W odd) {
  return each<U>(
      [&](int i) { return static_cast<uint32_t>(i % 2 ? odd.v[i / 2] : even.v[i / 2]); });
}
ZK_INLINE void store_words(uint32_t* p, W a) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint32_t>(a.v[i]);
}

ZK_INLINE float value(float x) { return x; }
ZK_INLINE float value(Bf16 x) { return bf16_float(x.bits); }
ZK_INLINE float value(Fp16 x) { return fp16_float(x.bits); }
ZK_INLINE void assign(float& t, float x) { t = x; }
ZK_INLINE void assign(Bf16& t, float x) { t.bits = static_cast<uint16_t>(float_bits(x) >> 16); }
ZK_INLINE void assign(Fp16& t, float x) { t.bits = fp16_nearest(x); }
template <class T>
ZK_INLINE F load(const T* p) {
  return each<F>([&](int i) { return value(p[i]); });
}
template <class T>
ZK_INLINE F load(const T* p, int lo, int hi) {
  return each<F>([&](int i) { return i >= lo && i < hi ? value(p[i]) : 0.0f; });
}
template <class T>
ZK_INLINE void store(T* p, F a) {
  for (int i = 0; i < kLanes; ++i) assign(p[i], a.v[i]);
}
template <class T>
ZK_INLINE void store(T* p, F a, int lo, int hi) {
  for (int i = lo; i < hi; ++i) assign(p[i], a.v[i]);
}
ZK_INLINE U bf16_nearest_bits(F a) {
  return each<U>([&](int i) {
    const uint32_t u = float_bits(a.v[i]);
    return is_nan(a.v[i]) ? u | 0x00400000u : u + 0x7FFFu + ((u >> 16) & 1u);
  });
}
ZK_INLINE U bf16_stochastic_bits(F a, U r16) {
  return each<U>([&](int i) {
    const uint32_t u = float_bits(a.v[i]);
    if (is_nan(a.v[i])) return u | 0x00400000u;
    return (u & 0x7F800000u) == 0x7F800000u ? u : u + r16.v[i];
  });
}
ZK_INLINE F fp16_round(F a) {
  return each<F>([&](int i) { return fp16_float(fp16_nearest(a.v[i])); });
}

ZK_INLINE D zero_doubles() { return {}; }
ZK_INLINE D fma_double(F a, F b, D c) {
  // The product of two floats is exact in double, so this is the fused form.
  return each<D>(
      [&](int i) { return static_cast<double>(a.v[i]) * static_cast<double>(b.v[i]) + c.v[i]; });
}
ZK_INLINE D load_doubles(const double* p) {
  return each<D>([&](int i) { return p[i]; });
}
ZK_INLINE void store_doubles(double* p, D a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}

#endif

// Rounding to the type's values, kept in float32; `store` then narrows exactly.
ZK_INLINE F quantize(F a, float) { return a; }
ZK_INLINE F quantize(F a, Bf16) { return floats(bf16_nearest_bits(a) & splat(0xFFFF0000u)); }
ZK_INLINE F quantize(F a, Fp16) { return fp16_round(a); }

ZK_INLINE F quantize(F a, U, float) { return a; }
ZK_INLINE F quantize(F a, U r16, Bf16) {
  return floats(bf16_stochastic_bits(a, r16) & splat(0xFFFF0000u));
}
ZK_INLINE F quantize(F a, U r16, Fp16) {
  const U sign = bits(a) & splat(0x80000000u);
  const F mag = floats(bits(a) & splat(0x7FFFFFFFu));
  const F moved = floats((bits(a) + shr<3>(r16)) & splat(0xFFFFE000u));
  const F steps = floor_positive(mag * splat(0x1p24f) + to_float(r16) * splat(0x1p-16f));
  const F small = floats(bits(steps * splat(0x1p-24f)) | sign);
  const F y = select_less(mag, splat(0x1p-14f), small, moved);
  return fp16_round(select_finite(a, y, a));
}

// Rounds to nearest and stores: `quantize` and `store` in one, without the needless masking.
ZK_INLINE void store_nearest(float* p, F a) { store(p, a); }
ZK_INLINE void store_nearest(Bf16* p, F a) { store(p, floats(bf16_nearest_bits(a))); }
ZK_INLINE void store_nearest(Fp16* p, F a) { store(p, a); }
template <class T>
ZK_INLINE void store_nearest(T* p, F a, int lo, int hi) {
  store(p, quantize(a, T{}), lo, hi);
}

}  // namespace
}  // namespace zk
