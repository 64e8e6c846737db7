// Box-Muller polynomials and roundings of the noise contract: coefficients for every backend and
// scalar code for host and device. Everything is IEEE float32 with explicit fma.
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace zk {

// -2 ln(1 + f) ~= f * (kLog[0] + f * (kLog[1] + ...)), f in [-1/4, 1/2). Weighted minimax: the
// error of the radius sqrt(-2 ln u) stays below 5e-7, and is relative to f next to f = 0.
constexpr float kLog[7] = {-2.000004768371582f,  0.9999775886535645f,   -0.6661038398742676f,
                           0.500836193561554f,   -0.41541042923927307f, 0.34259092807769775f,
                           -0.17070826888084412f};
constexpr float kMinus2Ln2 = -1.3862943611198906f;

// sin(pi/2 s) ~= s * poly(s^2) and cos(pi/2 s) ~= poly(s^2), s in (-1/2, 1/2): 1.2e-9 and 2.8e-8.
constexpr float kSin[4] = {1.5707963050854572f, -0.6459629381673255f, 0.07967590297003356f,
                           -0.004592289076045072f};
constexpr float kCos[4] = {0.9999999724233207f, -1.2336970142479016f, 0.2535986441112713f,
                           -0.020408352539511364f};

// exp(r) for |r| <= ln(2)/2: relative error 2e-9 before rounding.
constexpr float kExp[7] = {1.0000000005993215f,   1.0000000385049637f,  0.4999999159972003f,
                           0.16666410358226463f,  0.04166828800475349f, 0.008375635572304172f,
                           0.0013835813580790164f};

// The words' low nine bits are replaced by 0x100: the result times 2^-32 is the contract's uniform.
constexpr uint32_t kUniformMask = 0xFFFFFE00u, kUniformHalf = 0x00000100u;

ZK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

ZK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

ZK_HD float fma32(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ZK_HD bool is_nan(float x) { return (float_bits(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// Two normals from two Philox words; the bits of every CPU path are those of this function.
ZK_HD void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  // 2^32 uniform(a) = m 2^(e + 32), m in [3/4, 3/2).
  const float v = static_cast<float>((a & kUniformMask) | kUniformHalf);
  const uint32_t i = float_bits(v) - 0x3F400000u;
  const float e = static_cast<float>((static_cast<int32_t>(i) >> 23) - 32);
  const float f = bits_float((i & 0x007FFFFFu) + 0x3F400000u) - 1.0f;
  float q = kLog[6];
  for (int n = 5; n >= 0; --n) q = fma32(q, f, kLog[n]);
  const float r = sqrtf(fma32(e, kMinus2Ln2, f * q));
  // s = uniform(b) - 1/2 as a signed fixed-point number.
  const int32_t fixed = static_cast<int32_t>((b & kUniformMask) ^ (0x80000000u | kUniformHalf));
  const float s = static_cast<float>(fixed) * 0x1p-32f;
  const float t = s * s;
  float cosine = kCos[3], sine = kSin[3];
  for (int n = 2; n >= 0; --n) {
    cosine = fma32(cosine, t, kCos[n]);
    sine = fma32(sine, t, kSin[n]);
  }
  sine *= s;
  const float signed_r = bits_float(float_bits(r) ^ ((b << 30) & 0x80000000u));
  first = signed_r * ((b & 1u) ? sine : cosine);
  second = signed_r * ((b & 1u) ? cosine : sine);
}

// Round float32 to bfloat16: to nearest even, NaN stays NaN.
ZK_HD uint16_t bf16_nearest(float x) {
  const uint32_t u = float_bits(x);
  if (is_nan(x)) return static_cast<uint16_t>((u | 0x00400000u) >> 16);
  return static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

// Sixteen random bits are added below the kept ones, then the low half is dropped.
ZK_HD uint16_t bf16_stochastic(float x, uint32_t r16) {
  const uint32_t u = float_bits(x);
  if (is_nan(x)) return static_cast<uint16_t>((u | 0x00400000u) >> 16);
  if ((u & 0x7F800000u) == 0x7F800000u) return static_cast<uint16_t>(u >> 16);
  return static_cast<uint16_t>((u + r16) >> 16);
}

ZK_HD float bf16_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round float32 to float16 by bits: to nearest even, overflow to infinity, NaN stays NaN.
ZK_HD uint16_t fp16_nearest(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t mag = u & 0x7FFFFFFFu;
  if (mag > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((mag >> 13) & 0x1FFu));
  if (mag >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above
  if (mag >= 0x38800000u) {
    const uint32_t rounded = mag + 0xFFFu + ((mag >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Below 2^-14 float16 is a grid of 2^-24; adding 2^-1 puts that grid on float32's last bit.
  const float shifted = bits_float(mag) + 0.5f;
  return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3F000000u));
}

ZK_HD float fp16_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t e = (h >> 10) & 31u, m = h & 0x3FFu;
  if (e == 31u) return bits_float(sign | 0x7F800000u | (m << 13) | (m ? 0x00400000u : 0u));
  if (e) return bits_float(sign | ((e + 112u) << 23) | (m << 13));
  return bits_float(float_bits(static_cast<float>(m) * 0x1p-24f) | sign);
}

// A float32 that float16 holds exactly (or that overflows it), moved by random bits.
ZK_HD float fp16_stochastic(float x, uint32_t r16) {
  const uint32_t u = float_bits(x);
  const uint32_t mag = u & 0x7FFFFFFFu;
  if (mag >= 0x7F800000u) return x;
  if (mag >= 0x38800000u) return bits_float((u + (r16 >> 3)) & 0xFFFFE000u);
  const float t = floorf(bits_float(mag) * 0x1p24f + static_cast<float>(r16 >> 3) * 0x1p-13f);
  return bits_float(float_bits(t * 0x1p-24f) | (u & 0x80000000u));
}

}  // namespace zk
