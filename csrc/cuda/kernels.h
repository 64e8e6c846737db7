// Torch-free interface of the CUDA kernels: plain device pointers and a stream. Every function
// launches and returns null, or says what went wrong.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "types.h"

namespace zk {

// A matrix in device memory; strides count elements. `vec`: every run of V columns that starts at a
// multiple of V in the parameter is adjacent and aligned.
struct Matrix {
  char* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;
  DType dtype = DType::f32;
  bool vec = false;
};

// Where a matrix sits in the noise.
struct Place {
  int64_t col_offset = 0;
  uint32_t row_offset = 0;
  uint32_t param_id = 0;
};

// The groups of 256 columns that a row meets; n / groups = (n * factor) >> shift for n < 2^31.
struct Cut {
  uint32_t first_group = 0, groups = 0;
  uint32_t factor = 0, shift = 0;
};

// A tensor of a table: tiles [first_tile, first_tile of the next) are its.
struct Entry {
  Matrix m;
  Place place;
  Cut cut;
  int64_t first_tile = 0;
  // vectors.cu: where the vector's outputs begin, and its mask.
  int64_t out_at = 0;
  const int64_t* indices = nullptr;
  float* shadow = nullptr;
};

constexpr int kThreads = 256;
// Entries that travel as the arguments of one launch (4 KB of arguments are safe on every driver).
constexpr int kEntriesALaunch = 36;

struct Table {
  const Entry* entries = nullptr;  // device
  int count = 0;
  int64_t tiles = 0;
};

struct Seeds {
  const int64_t* seeds = nullptr;  // [count]
  int64_t count = 0;
};

// out[g, r, c] = round(w[row, c] + sum_k coeffs[g, k] z_k[row, c]), row = r or ids[(g,) r].
struct DisplaceArgs {
  Matrix w;  // data null: zeros
  Place place;
  Cut cut;
  Distribution distribution = Distribution::gaussian;
  char* out = nullptr;
  DType out_dtype = DType::f32;
  bool out_vec = false;
  int64_t out_rows = 0, out_row_stride = 0, out_branch_stride = 0;
  const void* ids = nullptr;  // null: row = r
  bool wide_ids = true;
  bool own_ids = false;  // [branches, out_rows] instead of [out_rows]
  // [2], may lie in pinned host memory: an id outside of w leaves itself and w's rows there, and
  // its row is NaN.
  int64_t* flag = nullptr;
  Seeds terms;
  const float* coeffs = nullptr;  // [branches, terms.count]; null: ones
  int64_t branches = 1;
  bool stochastic = false;
};

// w = round(w * decay_k + coeffs[k] z_k) for every k in order, rounding at every end.
struct UpdateArgs {
  Table table;
  Distribution distribution = Distribution::gaussian;
  Seeds terms;
  const float* coeffs = nullptr;
  const float* decay = nullptr;   // null: 1
  const uint8_t* ends = nullptr;  // null: every term; the last one always ends
  bool stochastic = false;
};

struct ProjectArgs {
  Table table;
  Distribution distribution = Distribution::gaussian;
  Seeds terms;
  double* partial = nullptr;  // [project_blocks(tiles), terms.count]
};

// Vectors, tiles of 4 columns a quarter. displace_vectors: out[out_at * branches + g * n + i] =
// v[i] + sum_k coeffs[g, k] z_k[i], less what the weight holds if so asked. sparse_update: v = v *
// decay_k + coeffs[k] z_k for every k, into the shadow and, rounded, into the weight.
struct VectorArgs {
  Table table;
  Distribution distribution = Distribution::gaussian;
  Seeds terms;
  const float* coeffs = nullptr;
  const float* decay = nullptr;
  float* out = nullptr;
  int64_t branches = 1;
  bool less_held = false;
};

// y[g, t, o] = round(plain[g, t, o] + sum_e difference[g, e] x[g, t, i] + bias[g, o]), e the
// elements (o, i) of a mask in order; y may be plain.
struct CorrectArgs {
  DType dtype = DType::f32;  // of x, plain and y
  const char* plain = nullptr;
  int64_t plain_branch_stride = 0;
  char* y = nullptr;  // [branches, tokens, outputs], contiguous
  const char* x = nullptr;
  int64_t x_branch_stride = 0, x_token_stride = 0, x_column_stride = 0;
  const int64_t* indices = nullptr;   // [count], o * inputs + i, increasing
  const int64_t* order = nullptr;     // [count], columns of difference; null: as they come
  const float* difference = nullptr;  // [branches, count]
  int64_t count = 0;
  const void* bias = nullptr;  // [branches, outputs], contiguous, or null
  DType bias_dtype = DType::f32;
  int64_t tokens = 0, branches = 0, inputs = 0, outputs = 0;
};

// out[g, t, i] = round(values[g, e]), e the elements (ids[(g,) t], i) of a mask.
struct RowsArgs {
  char* out = nullptr;  // [branches, tokens, cols], contiguous
  DType dtype = DType::f32;
  const void* ids = nullptr;
  bool wide_ids = true;
  bool own_ids = false;              // [branches, tokens] instead of [tokens]
  const int64_t* indices = nullptr;  // [count], row * cols + i, increasing
  const float* values = nullptr;     // [branches, count]
  int64_t count = 0, tokens = 0, branches = 0, cols = 0;
};

// One chunk [start, start + cols) of the vocabulary, in order from the first to the last.
struct LossArgs {
  const char* logits = nullptr;  // [rows, cols], contiguous, row = branch * tokens + token
  DType dtype = DType::f32;
  bool aligned = false;              // rows begin at multiples of 16 bytes
  const int64_t* targets = nullptr;  // [tokens]
  float* state = nullptr;            // [2, rows]: what goes from chunk to chunk
  float* losses = nullptr;           // [rows]: there with the last chunk; 0 where ignored
  int64_t* flag = nullptr;           // as of DisplaceArgs, of targets outside of the vocabulary
  int64_t rows = 0, tokens = 1, cols = 0, start = 0, vocab = 0, ignored = 0;
};

// y[g, t, n] = sum_c x[g, t, c] round(w[n, c] + sum_k coeffs[g, k] z_k[n, c]) + bias[g, n].
// With `pending`, w is updated in place by it first, as by UpdateArgs with these terms.
struct LinearArgs {
  Matrix w;
  Place place;
  Distribution distribution = Distribution::gaussian;
  const char* x = nullptr;  // [branches or 1, tokens, cols], contiguous
  int64_t x_branch_stride = 0;
  const void* bias = nullptr;  // [branches, rows], contiguous, or null
  DType bias_dtype = DType::f32;
  char* y = nullptr;  // [branches, tokens, rows], contiguous
  int64_t tokens = 0, branches = 0;
  Seeds terms;
  const float* coeffs = nullptr;
  Seeds pending;
  const float* pending_coeffs = nullptr;
  const float* pending_decay = nullptr;
  bool pending_stochastic = false;
  int multiprocessors = 1;
};

// The groups a row meets; whole pairs of groups (512 columns) when rounding bits are shared.
inline Cut cut_columns(int64_t col_offset, int64_t cols, bool pairs) {
  if (cols == 0) return {};
  int64_t first = col_offset / kGaussianGroup;
  int64_t last = (col_offset + cols + kGaussianGroup - 1) / kGaussianGroup;
  if (pairs) {
    first = first / 2 * 2;
    last = (last + 1) / 2 * 2;
  }
  Cut cut;
  cut.first_group = static_cast<uint32_t>(first);
  cut.groups = static_cast<uint32_t>(last - first);
  // factor = ceil(2^shift / groups), which is below 2^32.
  cut.shift = 31;
  while (uint64_t{1} << (cut.shift - 31) < cut.groups) ++cut.shift;
  cut.factor = static_cast<uint32_t>(((uint64_t{1} << cut.shift) + cut.groups - 1) / cut.groups);
  return cut;
}

// Columns a thread takes of each quarter: sixteen bytes of the narrower type.
inline int columns_of(DType t) { return t == DType::f32 ? 4 : 8; }

inline int64_t units_of(int64_t rows, Cut cut, int columns) {
  return rows * cut.groups * (64 / columns);
}
inline int64_t tiles_of(int64_t rows, Cut cut, int columns) {
  return (units_of(rows, cut, columns) + kThreads - 1) / kThreads;
}

int64_t project_blocks(int64_t tiles);

// Copies entries from the host into a table in device memory, by launches alone: no host memory has
// to outlive the call, and a CUDA graph keeps the values.
const char* fill_table(const Entry* host, int count, Entry* device, void* stream);

const char* displace(const DisplaceArgs&, void* stream);
// All entries have columns_of(dtype) == columns.
const char* update(const UpdateArgs&, int columns, void* stream);
const char* project(const ProjectArgs&, int columns, void* stream);
// out[k] = sum over blocks of partial[block, k].
const char* project_sum(const double* partial, int64_t blocks, int64_t terms, float* out,
                        void* stream);
const char* displace_vectors(const VectorArgs&, void* stream);
const char* sparse_update(const VectorArgs&, void* stream);
const char* sparse_correct(const CorrectArgs&, void* stream);
const char* sparse_rows(const RowsArgs&, void* stream);
const char* chunk_loss(const LossArgs&, void* stream);
// Into how many parts of the columns a product is split, and the product. `partial`: float32
// [parts, branches, tokens, rows] unless parts is 1.
int linear_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches, int multiprocessors);
const char* linear(const LinearArgs&, float* partial, int parts, void* stream);
// The same for float32 weights and up to kFewTokens tokens a branch, without a pending update.
constexpr int kFewTokens = 8;
int linear_few_parts(int64_t rows, int64_t cols, int64_t branches, int multiprocessors);
const char* linear_few(const LinearArgs&, float* partial, int parts, void* stream);
// y[g, t, n] = sum_k x[g, t, k] round(w[k, n] + sum_s coeffs[g, s] z_s[k, n]) + bias[g, n]: weights
// whose columns are the outputs (y and bias [.., cols], x [.., rows]), without a pending update: 16
// bits; and float32, up to kFewTokens tokens a branch. Parts are of the rows; `partial`: [parts,
// branches, tokens, cols] unless parts is 1.
int linear_transposed_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                            int multiprocessors);
const char* linear_transposed(const LinearArgs&, float* partial, int parts, void* stream);
int linear_few_transposed_parts(int64_t rows, int64_t cols, int64_t branches, int multiprocessors);
const char* linear_few_transposed(const LinearArgs&, float* partial, int parts, void* stream);
// y = the parts' sums, in order, and the bias.
const char* add_parts(const LinearArgs&, const float* partial, int parts, void* stream);
// The same by wgmma, for devices of compute capability 9.0: whether this build has it; into how
// many parts of the columns a product is split; and the product, without a pending update.
// `partial`: [parts, branches, tokens, rows] unless parts is 1.
bool has_sm90a();
int linear_sm90_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                      int multiprocessors);
const char* linear_sm90(const LinearArgs&, float* partial, int parts, void* stream);

// Null when this build has code that the current device runs; else what is wrong.
const char* probe();

}  // namespace zk
