// The correction of a product by a few moving elements, once, over simd.h. Included by one
// translation unit an instruction set, which defines ZK_CORRECT, the function's name.
//
//   y[t, target_e] += difference_e x[t, source_e]
//
// Walk: 32 tokens at a time. The columns of x that are used are transposed into scratch, so that
// an element costs two loads, two fused multiply-adds and two stores of sixteen tokens; the sums go
// back through a transposition, are added to y (and to a bias) in float32 and rounded once.
// At a density of 0.1% an element of x is used about once: the transpositions, a pass over x and
// one over y, are most of the cost, and both are small beside the product.
//
// Source: the sparse products of Meerkat (arXiv 2506.03337) have no public kernel; this one is
// ours.

#include "simd.h"
#include "sparse.h"

namespace zk {
namespace {

constexpr int kVectors = static_cast<int>(kCorrectionTokens) / kLanes;

#if !defined(ZK_AVX512) && !defined(ZK_AVX2)
// Rows and columns of sixteen vectors exchanged; simd.h has it for the vector instruction sets.
ZK_INLINE void transpose16(F r[16]) {
  float rows[16][kLanes], columns[16][kLanes];
  for (int i = 0; i < 16; ++i) store(rows[i], r[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < 16; ++i) r[i] = load(columns[i]);
}
#endif

// The rows of a block lie far apart, more of them than the hardware follows: their next cache lines
// are asked for this many columns ahead.
constexpr int64_t kAhead = 128;

// Sixteen columns of sixteen tokens of x, transposed: out[c, kCorrectionTokens].
template <class T>
void gather_chunk(const T* x, int64_t row, int64_t columns, int64_t tokens, float* out) {
  F r[16];
  for (int t = 0; t < 16; ++t) {
    __builtin_prefetch(x + t * row + kAhead, 0, 2);
    if (t >= tokens)
      r[t] = splat(0.0f);
    else if (columns == kLanes)
      r[t] = load(x + t * row);
    else
      r[t] = load(x + t * row, 0, static_cast<int>(columns));
  }
  transpose16(r);
  for (int c = 0; c < 16; ++c) store(out + c * kCorrectionTokens, r[c]);
}

// The sums of sixteen columns and sixteen tokens, [c, kCorrectionTokens], into y.
template <class T, class B>
void add_chunk(const float* sums, T* y, int64_t row, int64_t columns, int64_t tokens,
               const B* bias) {
  F r[16];
  for (int c = 0; c < 16; ++c) r[c] = load(sums + c * kCorrectionTokens);
  transpose16(r);
  const int width = static_cast<int>(columns);
  const bool whole = width == kLanes;
  F b = splat(0.0f);
  if (bias) b = whole ? load(bias) : load(bias, 0, width);
  for (int64_t t = 0; t < tokens; ++t, y += row) {
    __builtin_prefetch(y + kAhead, 1, 2);
    F v = (whole ? load(y) : load(y, 0, width)) + r[t];
    if (bias) v = v + b;
    if (whole)
      store_nearest(y, v);
    else
      store_nearest(y, v, 0, width);
  }
}

template <class T, class B>
void correct_rows(const CorrectionArgs& a, const T* x, T* y, int64_t tokens,
                  const float* difference, const B* bias, float* scratch) {
  const int64_t in_chunks = (a.fan_in + 15) / 16, out_chunks = (a.fan_out + 15) / 16;
  float* columns = scratch;                                    // [fan_in, 32]
  float* sums = scratch + in_chunks * 16 * kCorrectionTokens;  // [fan_out, 32]
  for (int64_t i = 0; i < in_chunks; ++i) {
    if (!a.source_chunks[i]) continue;
    const int64_t width = a.fan_in - i * 16 < 16 ? a.fan_in - i * 16 : 16;
    for (int v = 0; v < kVectors; ++v)
      gather_chunk(x + v * 16 * a.fan_in + i * 16, a.fan_in, width, tokens - v * 16,
                   columns + i * 16 * kCorrectionTokens + v * 16);
  }
  for (int64_t o = 0; o < out_chunks; ++o) {
    if (!a.target_chunks[o]) continue;
    float* p = sums + o * 16 * kCorrectionTokens;
    for (int64_t j = 0; j < 16 * kCorrectionTokens; j += kLanes) store(p + j, splat(0.0f));
  }
  for (int64_t e = 0; e < a.count; ++e) {
    const F d = splat(difference[e]);
    const float* from = columns + int64_t{a.source[e]} * kCorrectionTokens;
    float* to = sums + int64_t{a.target[e]} * kCorrectionTokens;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      store(to + v * kLanes, fma(d, load(from + v * kLanes), load(to + v * kLanes)));
  }
  alignas(64) static const float zeros[16 * kCorrectionTokens] = {};
  for (int64_t o = 0; o < out_chunks; ++o) {
    if (!a.target_chunks[o] && !bias) continue;
    const int64_t width = a.fan_out - o * 16 < 16 ? a.fan_out - o * 16 : 16;
    const float* p = a.target_chunks[o] ? sums + o * 16 * kCorrectionTokens : zeros;
    for (int v = 0; v < kVectors && v * 16 < tokens; ++v) {
      const int64_t count = tokens - v * 16 < 16 ? tokens - v * 16 : 16;
      add_chunk(p + v * 16, y + v * 16 * a.fan_out + o * 16, a.fan_out, width, count,
                bias ? bias + o * 16 : nullptr);
    }
  }
}

template <class T>
void correct_bias(const CorrectionArgs& a, const void* x, void* y, int64_t tokens,
                  const float* difference, const void* bias, DType bias_dtype, float* scratch) {
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(y);
  switch (bias_dtype) {
    case DType::f32:
      return correct_rows(a, from, to, tokens, difference, static_cast<const float*>(bias),
                          scratch);
    case DType::bf16:
      return correct_rows(a, from, to, tokens, difference, static_cast<const Bf16*>(bias), scratch);
    case DType::f16:
      return correct_rows(a, from, to, tokens, difference, static_cast<const Fp16*>(bias), scratch);
  }
}

}  // namespace

void ZK_CORRECT(const CorrectionArgs& a, const void* x, void* y, int64_t tokens,
                const float* difference, const void* bias, DType bias_dtype, float* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return correct_bias<float>(a, x, y, tokens, difference, bias, bias_dtype, scratch);
    case DType::bf16:
      return correct_bias<Bf16>(a, x, y, tokens, difference, bias, bias_dtype, scratch);
    case DType::f16:
      return correct_bias<Fp16>(a, x, y, tokens, difference, bias, bias_dtype, scratch);
  }
}

}  // namespace zk
