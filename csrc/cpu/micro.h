// The innermost loop of a product for few tokens: six rows of weights, broadcast, against vectors
// of tokens. One 32-bit word holds a float32 or two neighbouring bfloat16 values.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace zk {
namespace {

struct FloatDot {
  ZK_INLINE static F add(F c, U w, F x) { return fma(floats(w), x, c); }
};

// c[r, 16 v + i] (+)= sum_k w[r, k] . x[k, 16 v + i] for kMicroRows rows and `vectors` vectors. The
// sum over k is taken first, in order, and added to c once.
//
// On AVX-512 4 vectors keep 24 sums in registers: a step of k is 24 multiply-adds, 4 loads and 6
// broadcasts, so the multiply-adds are the limit (measured: 97 % of the peak).
template <class Dot, int vectors>
void micro(const MicroArgs& a) {
  F c[kMicroRows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) c[r][v] = splat(0.0f);
  const float* x = a.x;
  for (int64_t k = 0; k < a.depth; ++k, x += a.x_stride) {
    F t[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) t[v] = load(x + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kMicroRows; ++r) {
      const U w = splat(a.w[r * a.w_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) c[r][v] = Dot::add(c[r][v], w, t[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = a.c + r * a.c_stride + v * kLanes;
      store(to, a.first ? c[r][v] : c[r][v] + load(to));
    }
}

}  // namespace
}  // namespace zk
