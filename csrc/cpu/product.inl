// Products with displaced weights for few tokens, included after kernels.inl:
//
//   c[g, r, t] = sum_k W_g[r, k] x[g, t, k],   y[g, t, r] = round(c[g, r, t] + bias[g, r])
//
// Tokens lie in lanes and weights are broadcast, so weights are used row by row as they are stored:
// a few rows are displaced for all branches into scratch that fits the first or second level cache
// and multiplied from there. No displaced tile reaches memory, and nothing but x is packed.
//
// Packed x of a branch: blocks of 64 tokens; inside a block word k of all its tokens is adjacent
// (a word: a float32, or bfloat16 values 2k and 2k + 1). The last block holds a multiple of 16.

#include "micro.h"

namespace zk {
namespace {

ZK_INLINE int64_t words_of(int64_t count, DType compute) {
  return compute == DType::bf16 ? (count + 1) / 2 : count;
}

// Sixteen words of one token from word `first` on, as the compute dtype; zero past the end.
template <class T, bool pairs>
ZK_INLINE F token_words(const T* x, int64_t fan_in, int64_t first) {
  constexpr int per_word = pairs ? 2 : 1;
  const int64_t begin = first * per_word, left = fan_in - begin;
  T part[kLanes * per_word] = {};
  const T* from = x + begin;
  if (left < kLanes * per_word) {
    memcpy(part, from, static_cast<size_t>(left) * sizeof(T));
    from = part;
  }
  if constexpr (pairs) {
    float words[kLanes];
    memcpy(words, from, sizeof(words));
    return load(words);
  } else {
    return load(from);
  }
}

template <class T, bool pairs>
void pack_group(const T* x, int64_t tokens, int64_t fan_in, int64_t group, float* packed) {
  const int64_t words = pairs ? (fan_in + 1) / 2 : fan_in;
  const int64_t block = group / 4, width = smaller(64, padded_tokens(tokens) - 64 * block);
  const int64_t t0 = group * kLanes, count = smaller(kLanes, tokens - t0);
  float* out = packed + block * 64 * words + group % 4 * kLanes;
  for (int64_t k = 0; k < words; k += kLanes) {
    F v[kLanes];
    for (int i = 0; i < kLanes; ++i)
      v[i] = i < count ? token_words<T, pairs>(x + (t0 + i) * fan_in, fan_in, k) : splat(0.0f);
    transpose16(v);
    const auto stop = static_cast<int>(smaller(kLanes, words - k));
    for (int j = 0; j < stop; ++j) store(out + (k + j) * width, v[j]);
  }
}

void pack_tokens(const void* x, DType dtype, int64_t tokens, int64_t fan_in, int64_t group,
                 DType compute, float* packed) {
  switch (dtype) {
    case DType::f32:
      return pack_group<float, false>(static_cast<const float*>(x), tokens, fan_in, group, packed);
    case DType::bf16:
      if (compute == DType::bf16)
        return pack_group<Bf16, true>(static_cast<const Bf16*>(x), tokens, fan_in, group, packed);
      return pack_group<Bf16, false>(static_cast<const Bf16*>(x), tokens, fan_in, group, packed);
    case DType::f16:
      return pack_group<Fp16, false>(static_cast<const Fp16*>(x), tokens, fan_in, group, packed);
  }
}

#if defined(ZK_AVX512)
constexpr Micro kMicroF32[kMicroVectors + 1] = {nullptr, micro<FloatDot, 1>, micro<FloatDot, 2>,
                                                micro<FloatDot, 3>, micro<FloatDot, 4>};
#else
// Six rows fill the sixteen registers with one vector.
constexpr Micro kMicroF32[kMicroVectors + 1] = {nullptr, micro<FloatDot, 1>, nullptr, nullptr,
                                                nullptr};
#endif

// Words summed before they are added to c: bounds the error of a long sum, and keeps the part of x
// that the rows share in the second level cache.
constexpr int64_t kSumDepth = 256;

// All tokens against `rows` (a multiple of six) displaced rows of one branch.
ZK_INLINE void multiply_rows(const ProductArgs& a, const float* x, int64_t x_words, int64_t k_word,
                             const uint32_t* w, int64_t depth, int64_t rows, bool first, float* c) {
  const int64_t padded = padded_tokens(a.tokens);
  const Micro* table = a.micro ? a.micro : kMicroF32;
  for (int64_t t = 0; t < padded; t += 64) {
    const int64_t width = smaller(64, padded - t);
    const auto vectors = static_cast<int>(width / kLanes);
    const int step = table[vectors] ? vectors : 1;
    const float* block = x + t * x_words + k_word * width;
    for (int64_t k = 0; k < depth; k += kSumDepth)
      for (int64_t r = 0; r < rows; r += kMicroRows)
        for (int v = 0; v < vectors; v += step)
          table[step]({block + k * width + v * kLanes, width, w + r * depth + k, depth,
                       smaller(kSumDepth, depth - k), c + r * padded + t + v * kLanes, padded,
                       first && k == 0});
  }
}

// Asks for rows of w while the ones before are multiplied.
ZK_INLINE void prefetch_rows(const MatrixView& w, const Region& r) {
  if (w.col_stride != 1 || w.leading > 1) return;
  const int64_t size = dtype_size(w.dtype);
  for (int64_t row = r.row_begin; row < r.row_end; ++row) {
    const char* p = w.data + (row_start(w, row) + r.col_begin) * size;
    for (int64_t i = 0; i < (r.col_end - r.col_begin) * size; i += 64)
      __builtin_prefetch(p + i, 0, 2);
  }
}

void product(const ProductArgs& a, int64_t begin, int64_t end, void* scratch, float* c) {
  const DisplaceArgs& d = a.weights;
  const int64_t fan_in = d.w.cols, padded = padded_tokens(a.tokens);
  const int64_t size = dtype_size(d.out_dtype), x_words = words_of(fan_in, d.out_dtype);
  const int64_t c_branch = micro_rows(end - begin) * padded;
  for (int64_t k = 0; k < fan_in; k += kProductDepth) {
    const int64_t count = smaller(kProductDepth, fan_in - k);
    const int64_t depth = words_of(count, d.out_dtype);
    const int64_t stride = depth * 4 / size;  // elements
    const int64_t branch = a.fill * stride;
    for (int64_t r = begin; r < end; r += a.fill) {
      const int64_t n = smaller(a.fill, end - r), rows = micro_rows(n);
      if (a.update) update(*a.update, d.w, d.place, {r, r + n, k, k + count});
      displace(d, {r, r + n, k, k + count}, scratch, stride, branch);
      prefetch_rows(d.w, {r + n, smaller(r + 2 * n, d.w.rows), k, k + count});
      for (int64_t g = 0; g < d.branches; ++g) {
        char* w = static_cast<char*>(scratch) + g * branch * size;
        for (int64_t i = 0; stride > count && i < n; ++i)
          memset(w + (i * stride + count) * size, 0, static_cast<size_t>(size));
        memset(w + n * stride * size, 0, static_cast<size_t>((rows - n) * stride * size));
        multiply_rows(a, a.x + (a.shared ? 0 : g * padded * x_words), x_words,
                      words_of(k, d.out_dtype), reinterpret_cast<const uint32_t*>(w), depth, rows,
                      k == 0, c + g * c_branch + (r - begin) * padded);
      }
    }
  }
  if (fan_in == 0) memset(c, 0, static_cast<size_t>(d.branches * c_branch) * sizeof(float));
}

template <class T, class B>
void write_rows(const float* c, int64_t rows, int64_t tokens, T* y, int64_t stride, const B* bias) {
  const int64_t padded = padded_tokens(tokens);
  for (int64_t r = 0; r < rows; r += kLanes) {
    const auto n = static_cast<int>(smaller(kLanes, rows - r));
    const F b = !bias ? splat(0.0f) : n == kLanes ? load(bias + r) : load(bias + r, 0, n);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      F v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = i < n ? load(c + (r + i) * padded + t) : b;
      transpose16(v);
      const auto m = static_cast<int>(smaller(kLanes, tokens - t));
      for (int j = 0; j < m; ++j) {
        const F out = bias ? v[j] + b : v[j];
        T* to = y + (t + j) * stride + r;
        if (n == kLanes)
          store_nearest(to, out);
        else
          store_nearest(to, out, 0, n);
      }
    }
  }
}

template <class T>
void write_rows_to(const float* c, int64_t rows, int64_t tokens, T* y, int64_t stride,
                   const void* bias, DType bias_dtype) {
  switch (bias_dtype) {
    case DType::f32:
      return write_rows(c, rows, tokens, y, stride, static_cast<const float*>(bias));
    case DType::bf16:
      return write_rows(c, rows, tokens, y, stride, static_cast<const Bf16*>(bias));
    case DType::f16:
      return write_rows(c, rows, tokens, y, stride, static_cast<const Fp16*>(bias));
  }
}

void write_product(const float* c, int64_t rows, int64_t tokens, void* y, DType dtype,
                   int64_t stride, const void* bias, DType bias_dtype) {
  switch (dtype) {
    case DType::f32:
      return write_rows_to(c, rows, tokens, static_cast<float*>(y), stride, bias, bias_dtype);
    case DType::bf16:
      return write_rows_to(c, rows, tokens, static_cast<Bf16*>(y), stride, bias, bias_dtype);
    case DType::f16:
      return write_rows_to(c, rows, tokens, static_cast<Fp16*>(y), stride, bias, bias_dtype);
  }
}

template <class B>
void add_row_bias_of(float* c, int64_t rows, int64_t padded, const B* bias) {
  for (int64_t r = 0; r < rows; ++r, c += padded) {
    const F one = load(bias + r, 0, 1);
    float lanes[kLanes];
    store(lanes, one);
    const F b = splat(lanes[0]);
    for (int64_t t = 0; t < padded; t += kLanes) store(c + t, load(c + t) + b);
  }
}

void add_row_bias(float* c, int64_t rows, int64_t padded, const void* bias, DType bias_dtype) {
  switch (bias_dtype) {
    case DType::f32:
      return add_row_bias_of(c, rows, padded, static_cast<const float*>(bias));
    case DType::bf16:
      return add_row_bias_of(c, rows, padded, static_cast<const Bf16*>(bias));
    case DType::f16:
      return add_row_bias_of(c, rows, padded, static_cast<const Fp16*>(bias));
  }
}

void softmax_rows(const float* c, int64_t rows, int64_t tokens, float* top, float* total) {
  const int64_t padded = padded_tokens(tokens);
  const F lowest = splat(bits_float(0xFF800000u));
  for (int64_t t = 0; t < padded; t += kLanes) {
    const F before = load(top + t);
    F best = before;
    for (int64_t r = 0; r < rows; ++r) best = max(load(c + r * padded + t), best);
    const F origin = select_less(lowest, best, best, splat(0.0f));
    // Nothing so far: the total is 0 and stays 0, whatever its factor.
    F sum = load(total + t) * exp16(select_less(lowest, before, before, origin) - origin);
    for (int64_t r = 0; r < rows; ++r) sum = sum + exp16(load(c + r * padded + t) - origin);
    store(top + t, best);
    store(total + t, sum);
  }
}

}  // namespace

#define ZK_PRODUCT_TABLE pack_tokens, product, write_product, add_row_bias, softmax_rows

}  // namespace zk
