// Philox4x32-10 (Salmon et al. 2011) and the counter layout of the noise contract, version 1.
//
// counter = (column block, row, parameter id, stream), key = the 64-bit seed, low word first. The
// prose is in zokernels/noise.py. Scalar code, shared by host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZK_HD __host__ __device__ __forceinline__
#else
#define ZK_HD inline __attribute__((always_inline))
#endif

namespace zk {

constexpr int kContractVersion = 1;

enum class Stream : uint32_t { direction = 0, update_rounding = 1, probe_rounding = 2, seed = 3 };

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Columns that share one counter word 0 and its neighbours: the unit the kernels walk in.
constexpr int64_t kGaussianGroup = 256;    // 64 counters, 4 columns each
constexpr int64_t kRademacherBlock = 128;  // 1 counter
constexpr int64_t kRoundingGroup = 512;    // 64 counters, 8 columns each

struct PhiloxWords {
  uint32_t w[4];
};

// The key of every round, expanded once a seed.
struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds];
  uint32_t k1[kPhiloxRounds];
};

ZK_HD PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    keys.k0[r] = k0;
    keys.k1[r] = k1;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return keys;
}

ZK_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// What the first two rounds leave once counter words 1 to 3 are fixed, as they are along a row.
// With P = M0 * c0 (64 bits):
//   x2 = hi(P) ^ stream_key;  x3 = lo(P);  Q = M1 * x2;
//   words after round 2: (hi(Q) ^ q_key, lo(Q), x3 ^ row_hi, row_lo).
struct PhiloxRow {
  uint32_t stream_key;
  uint32_t q_key;
  uint32_t row_hi;
  uint32_t row_lo;
};

ZK_HD PhiloxRow philox_row(const PhiloxKeys& keys, uint32_t row, uint32_t param_id, Stream stream) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * param_id;
  const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row ^ keys.k0[0];
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
  return {static_cast<uint32_t>(stream) ^ keys.k1[0], static_cast<uint32_t>(p1) ^ keys.k0[1],
          static_cast<uint32_t>(p0 >> 32) ^ keys.k1[1], static_cast<uint32_t>(p0)};
}

}  // namespace zk
