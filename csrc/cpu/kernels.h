// Torch-free CPU kernels: plain pointers in, plain pointers out, one table of functions an
// instruction set. Threads are the caller's business; every function works on the region it is
// given.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace zk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Distribution : int { gaussian = 0, rademacher = 1 };
enum class Rounding : int { nearest = 0, stochastic = 1 };

inline int64_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

// A parameter seen as a matrix: leading dimensions (outermost first) are folded into rows, the last
// dimension is the column. Strides count elements.
struct MatrixView {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t col_stride = 1;
  int leading = 0;  // 1 for anything that has a single row stride
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
};

// Where a matrix sits in the noise: `row_offset` and `col_offset` are those of element (0, 0).
struct Place {
  uint32_t param_id = 0;
  uint64_t row_offset = 0;
  uint64_t col_offset = 0;
  Distribution distribution = Distribution::gaussian;
};

// Half-open region of a matrix.
struct Region {
  int64_t row_begin, row_end, col_begin, col_end;
};

struct Terms {
  const PhiloxKeys* keys = nullptr;  // [count]
  int64_t count = 0;
};

// out[g, r, c] = round(w[r, c] + sum_k coeffs[g, k] z_k[r, c])
struct DisplaceArgs {
  MatrixView w;
  Place place;
  Terms terms;
  const float* coeffs = nullptr;  // [branches, terms.count]
  int64_t branches = 0;
  Rounding rounding = Rounding::nearest;
  DType out_dtype = DType::f32;
  // Round to the dtype of w first and store that value: float32 scratch that holds bfloat16
  // weights.
  bool round_to_input = false;
};

// w = w * decay_k + coeffs[k] z_k for every k in order, rounded to the dtype of w at every end.
struct UpdateArgs {
  Terms terms;
  const float* coeffs = nullptr;        // [terms.count]
  const float* decay = nullptr;         // [terms.count] or null: 1
  const unsigned char* ends = nullptr;  // [terms.count] or null: every term
  Rounding rounding = Rounding::nearest;
};

// One call of the innermost loop of a product: kMicroRows rows of weights, some vectors of tokens,
// all in 32-bit words (a float32, or two bfloat16).
constexpr int kMicroRows = 6, kMicroVectors = 4;

struct MicroArgs {
  const float* x;  // [depth, >= 16 vectors], rows x_stride words apart
  int64_t x_stride;
  const uint32_t* w;  // [kMicroRows, depth]
  int64_t w_stride, depth;
  float* c;  // [kMicroRows, >= 16 vectors]
  int64_t c_stride;
  bool first;  // c is written, not added to
};
using Micro = void (*)(const MicroArgs&);

inline int64_t padded_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }
inline int64_t micro_rows(int64_t rows) {
  return (rows + kMicroRows - 1) / kMicroRows * kMicroRows;
}

// Columns of a weight that are displaced and multiplied at a time.
constexpr int64_t kProductDepth = 2048;

// c[g, r, t] = sum_k W_g[r, k] x[g, t, k]
struct ProductArgs {
  DisplaceArgs weights;      // out_dtype: the type of the product, float32 or bfloat16
  const float* x = nullptr;  // packed, [branches or 1] times packed_words
  bool shared = false;       // one x for all branches
  int64_t tokens = 0;
  int64_t fill = kMicroRows;           // rows displaced at a time, a multiple of kMicroRows
  const Micro* micro = nullptr;        // by number of vectors; null: float32
  const UpdateArgs* update = nullptr;  // made of the weights, in place, before they are displaced

  int64_t packed_words() const {
    const bool pairs = weights.out_dtype == DType::bf16;
    return padded_tokens(tokens) * (pairs ? (weights.w.cols + 1) / 2 : weights.w.cols);
  }
  int64_t scratch_bytes() const {
    const int64_t cols = weights.w.cols < kProductDepth ? weights.w.cols : kProductDepth;
    return weights.branches * fill * ((cols + 1) / 2 * 2) * dtype_size(weights.out_dtype);
  }
  // Floats of c for a number of rows.
  int64_t sums(int64_t rows) const {
    return weights.branches * micro_rows(rows) * padded_tokens(tokens);
  }
};

struct Kernels {
  const char* name;
  // z of a region whose element (0, 0) has the place's offsets; float32, rows `out_stride` apart.
  void (*sample)(const Place&, const PhiloxKeys&, Region, float* out, int64_t out_stride);
  // A region of w; `out` points at the region's first element of branch 0.
  void (*displace)(const DisplaceArgs&, Region, void* out, int64_t row_stride,
                   int64_t branch_stride);
  void (*update)(const UpdateArgs&, const MatrixView&, const Place&, Region);
  // sums[k] += <v, z_k> over the region, in a fixed order.
  void (*project)(const MatrixView&, const Place&, const Terms&, Region, double* sums);
  // Fills `count` values and returns nothing: the bare generator, 256 columns a row, folded into
  // one float so that nothing is stored.
  float (*generate)(Distribution, const PhiloxKeys&, int64_t groups);
  // For every row of logits [rows, cols] (already with its bias): the maximum and the sum of
  // exp(logit - maximum).
  void (*softmax_stats)(const void* logits, DType, int64_t rows, int64_t cols, int64_t stride,
                        float* top, float* total, int64_t out_stride);
  // y[r, c] = round(y[r, c] + bias[c])
  void (*add_bias)(void* y, DType, int64_t rows, int64_t cols, int64_t stride, const void* bias,
                   DType bias_dtype);
  // Contiguous conversion with rounding to nearest.
  void (*convert)(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t count);

  // Products for few tokens; null where there is no kernel (portable).
  // Tokens 16 group .. 16 group + 15 of one branch's x [tokens, fan_in] into its packed form.
  void (*pack_tokens)(const void* x, DType, int64_t tokens, int64_t fan_in, int64_t group,
                      DType compute, float* packed) = nullptr;
  // Rows [begin, end) of all branches: c [branches, micro_rows(end - begin), padded tokens].
  void (*product)(const ProductArgs&, int64_t begin, int64_t end, void* scratch,
                  float* c) = nullptr;
  // y[t, r] = round(c[r, t] + bias[r]); rows of y `stride` apart; bias may be null.
  void (*write_product)(const float* c, int64_t rows, int64_t tokens, void* y, DType,
                        int64_t stride, const void* bias, DType bias_dtype) = nullptr;
  // c[r, t] += bias[r]
  void (*add_row_bias)(float* c, int64_t rows, int64_t padded, const void* bias,
                       DType bias_dtype) = nullptr;
  // Takes rows of logits c [rows, padded tokens] into the running maximum `top` (initially
  // -infinity) and sum of exp(logit - top) `total` (0) of every token.
  void (*softmax_rows)(const float* c, int64_t rows, int64_t tokens, float* top,
                       float* total) = nullptr;
};

const Kernels& kernels_portable();
#if defined(ZK_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Micro* micro_avx512bf16();
#endif

}  // namespace zk
