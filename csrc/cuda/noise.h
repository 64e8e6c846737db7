// The noise of one thread. A thread owns columns l .. l + V - 1 of each of the four 64-wide
// quarters of a group of 256 columns: V 16-byte accesses of adjacent threads meet, and one Philox
// call gives the four normals of column l + v, one a quarter.
//
// In the machine code for sm_80 a normal costs 37 instructions, 5 of them wide multiplications, and
// a sign 9 where a thread draws 32 (the eight threads of a group draw the same two calls).
#pragma once

#include "device.h"

namespace zk {

// A seed's key and what a row fixes of Philox's first two rounds.
struct RowState {
  uint32_t k0, k1;
  PhiloxRow row;
};

ZK_DEVICE RowState row_state(uint64_t seed, uint32_t row, uint32_t param_id, Stream stream) {
  RowState s;
  s.k0 = static_cast<uint32_t>(seed);
  s.k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t p1 = dev::wide(kPhiloxM1, param_id);
  const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row ^ s.k0;
  const uint64_t p0 = dev::wide(kPhiloxM0, c0);
  s.row = {static_cast<uint32_t>(stream) ^ s.k1, static_cast<uint32_t>(p1) ^ (s.k0 + kPhiloxW0),
           static_cast<uint32_t>(p0 >> 32) ^ (s.k1 + kPhiloxW1), static_cast<uint32_t>(p0)};
  return s;
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
  for (uint32_t r = 2; r < static_cast<uint32_t>(kPhiloxRounds); ++r) {
    const uint64_t a = dev::wide(kPhiloxM0, w0);
    const uint64_t b = dev::wide(kPhiloxM1, w2);
    w0 = static_cast<uint32_t>(b >> 32) ^ w1 ^ (s.k0 + r * kPhiloxW0);
    w2 = static_cast<uint32_t>(a >> 32) ^ w3 ^ (s.k1 + r * kPhiloxW1);
    w1 = static_cast<uint32_t>(b);
    w3 = static_cast<uint32_t>(a);
  }
  return {{w0, w1, w2, w3}};
}

// numeric.h's box_muller with the same results and fewer conversions: a uniform is made in [1, 2)
// and shifted, which is exact; its exponent becomes a float by adding it to 1.5 * 2^23.
ZK_DEVICE void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  constexpr float l0 = kLog[0], l1 = kLog[1], l2 = kLog[2], l3 = kLog[3], l4 = kLog[4],
                  l5 = kLog[5], l6 = kLog[6], s0 = kSin[0], s1 = kSin[1], s2 = kSin[2],
                  s3 = kSin[3], c0 = kCos[0], c1 = kCos[1], c2 = kCos[2], c3 = kCos[3],
                  ln = kMinus2Ln2;
  const float u = dev::one_to_two(a) - (1.0f - 0x1p-24f);
  const uint32_t i = float_bits(u) - 0x3F400000u;
  const auto magic = static_cast<uint32_t>((static_cast<int32_t>(i) >> 23) + 0x4B400000);
  const float e = bits_float(magic) - 12582912.0f;
  const float f = bits_float((i & 0x007FFFFFu) + 0x3F400000u) - 1.0f;
  float q = l6;
  q = fma32(q, f, l5);
  q = fma32(q, f, l4);
  q = fma32(q, f, l3);
  q = fma32(q, f, l2);
  q = fma32(q, f, l1);
  q = fma32(q, f, l0);
  const float r = dev::root(fma32(e, ln, f * q));
  const float s = (dev::one_to_two(b) - 1.5f) + 0x1p-24f;
  const float t = s * s;
  float cosine = fma32(fma32(fma32(c3, t, c2), t, c1), t, c0);
  float sine = fma32(fma32(fma32(s3, t, s2), t, s1), t, s0) * s;
  const float signed_r = bits_float(float_bits(r) ^ ((b << 30) & 0x80000000u));
  const bool swap = (b & 1u) != 0;
  first = signed_r * (swap ? sine : cosine);
  second = signed_r * (swap ? cosine : sine);
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
