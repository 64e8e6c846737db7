// The noise of one thread. A thread owns columns l .. l + V - 1 of each of the four 64-wide
// quarters of a group of 256 columns: V 16-byte accesses of adjacent threads meet, and one Philox
// call gives the four normals of column l + v, one a quarter.
//
// In the machine code for sm_90 a normal costs 24 instructions, 4 of them wide multiplications and
// 1 for the special function unit, and a sign 6 where a thread draws 32 (the eight threads of a
// group draw the same two calls). The round keys are summed up once a seed: summed up where they
// are used they are not shared, 4 instructions more a normal.
#pragma once

#include "device.h"

namespace zk {

// The round keys of a seed and what a row fixes of Philox's first two rounds.
struct RowState {
  PhiloxKeys keys;
  PhiloxRow row;
};

ZK_DEVICE RowState row_state(const PhiloxKeys& keys, uint32_t row, uint32_t param_id,
                             Stream stream) {
  return {keys, philox_row(keys, row, param_id, stream)};
}

ZK_DEVICE RowState row_state(uint64_t seed, uint32_t row, uint32_t param_id, Stream stream) {
  return row_state(philox_keys(seed), row, param_id, stream);
}

// Philox's four words for counter word 0 = c0; equal to philox4x32 of philox.h.
ZK_DEVICE PhiloxWords philox_words(const RowState& s, uint32_t c0) {
  const uint64_t p = dev::wide(kPhiloxM0, c0);
  const uint32_t x2 = static_cast<uint32_t>(p >> 32) ^ s.row.stream_key;
  const uint64_t q = dev::wide(kPhiloxM1, x2);
  uint32_t w0 = static_cast<uint32_t>(q >> 32) ^ s.row.q_key;
  uint32_t w1 = static_cast<uint32_t>(q);
  uint32_t w2 = static_cast<uint32_t>(p) ^ s.row.row_hi;
  uint32_t w3 = s.row.row_lo;
  ZK_UNROLL
  for (int r = 2; r < kPhiloxRounds; ++r) {
    const uint64_t a = dev::wide(kPhiloxM0, w0);
    const uint64_t b = dev::wide(kPhiloxM1, w2);
    w0 = static_cast<uint32_t>(b >> 32) ^ w1 ^ s.keys.k0[r];
    w2 = static_cast<uint32_t>(a >> 32) ^ w3 ^ s.keys.k1[r];
    w1 = static_cast<uint32_t>(b);
    w3 = static_cast<uint32_t>(a);
  }
  return {{w0, w1, w2, w3}};
}

// -2 ln(1 - v) ~= v (2 + kNear v) for v < kNearOne.
constexpr float kNear = 1.0085f, kNearOne = 0.0145f;

// The contract's normals by the special function unit's logarithm and square root: within 2e-6 of
// numeric.h's box_muller when both are as far off as the PTX manual allows. The logarithm is good
// to 2^-22 absolute, which the root blows up next to u = 1: a series in v = 1 - u (exact) serves
// there. Sine and cosine are polynomials: the unit's own are off by 5e-7, times a radius of up
// to 5.77.
ZK_DEVICE void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  constexpr float s0 = kSin[0], s1 = kSin[1], s2 = kSin[2], s3 = kSin[3], c0 = kCos[0],
                  c1 = kCos[1], c2 = kCos[2], c3 = kCos[3];
  const float u = dev::one_to_two(a) - (1.0f - 0x1p-24f), v = 1.0f - u;
  const float near = v * fma32(v, kNear, 2.0f), far = dev::log2(u) * kMinus2Ln2;
  const float r = dev::root(v < kNearOne ? near : far);
  const float s = (dev::one_to_two(b) - 1.5f) + 0x1p-24f;
  const float t = s * s;
  const float cosine = fma32(fma32(fma32(c3, t, c2), t, c1), t, c0);
  const float sine = fma32(fma32(fma32(s3, t, s2), t, s1), t, s0) * s;
  const float signed_r = bits_float(float_bits(r) ^ ((b << 30) & 0x80000000u));
  first = signed_r * cosine;
  second = signed_r * sine;
  dev::swap_if_odd(b, first, second);
}

// z of columns l + v + {0, 64, 128, 192} of a group, for v = 0 .. V - 1 with l + V <= 64 and l a
// multiple of V, V a divisor of 32.
template <Distribution kind>
struct Draw {
  RowState state;
  uint32_t base;     // gaussian: counter word 0 of column l
  uint32_t sign[4];  // rademacher: bit v of word j is the sign of column l + v of quarter j

  ZK_DEVICE Draw(const RowState& s, uint32_t group, uint32_t l) : state(s) {
    if constexpr (kind == Distribution::gaussian) {
      base = group * 64u + l;
      dev::opaque(base);
    } else {
      const PhiloxWords low = philox_words(s, group * 2u), high = philox_words(s, group * 2u + 1u);
      const bool upper = l >= 32u;
      // Columns l of quarters 0 and 1 are bits l % 32 of words l / 32 and 2 + l / 32.
      sign[0] = (upper ? low.w[1] : low.w[0]) >> (l % 32u);
      sign[1] = (upper ? low.w[3] : low.w[2]) >> (l % 32u);
      sign[2] = (upper ? high.w[1] : high.w[0]) >> (l % 32u);
      sign[3] = (upper ? high.w[3] : high.w[2]) >> (l % 32u);
    }
  }

  ZK_DEVICE void column(uint32_t v, float z[4]) const {
    if constexpr (kind == Distribution::gaussian) {
      const PhiloxWords w = philox_words(state, base + v);
      normal_pair(w.w[0], w.w[1], z[0], z[1]);
      normal_pair(w.w[2], w.w[3], z[2], z[3]);
    } else {
      ZK_UNROLL
      for (int j = 0; j < 4; ++j)
        z[j] = bits_float(0x3F800000u | ((sign[j] << (31u - v)) & 0x80000000u));
    }
  }
};

// The words that hold the rounding bits of column l of a group: quarter j's sixteen bits are half
// group % 2 of word j.
ZK_DEVICE PhiloxWords rounding_words(const RowState& s, uint32_t group, uint32_t l) {
  return philox_words(s, group / 2u * 64u + l);
}

}  // namespace zk
