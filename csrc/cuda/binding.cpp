// Ops of the CUDA backend over LibTorch's stable ABI, in the namespace `zokernels_cuda`. They write
// into tensors that zokernels/_cuda_ops.py allocated; arguments have passed zokernels/_checks.py.
// With ZK_EMULATE the same file binds the kernels' emulation to CPU tensors, for the tests.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../abi.h"
#include "kernels.h"

#if defined(ZK_EMULATE)
#define ZK_NAMESPACE zokernels_cuda_emulated
#else
#include <torch/csrc/stable/accelerator.h>
#define ZK_NAMESPACE zokernels_cuda
#endif

namespace zk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(ZK_EMULATE)
struct Guard {
  explicit Guard(const Tensor&) {}
};
#else
struct Guard {
  explicit Guard(const Tensor& t) : guard(t.get_device()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("zokernels: CUDA: ") + error);
}

void* stream_of(int64_t stream) { return reinterpret_cast<void*>(static_cast<uintptr_t>(stream)); }

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw std::runtime_error("zokernels: a tensor is not float32, bfloat16 or float16");
  }
}

int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

Place place_of(int64_t param_id, int64_t row_offset, int64_t col_offset) {
  return {col_offset, static_cast<uint32_t>(row_offset), static_cast<uint32_t>(param_id)};
}

// Whether runs of `columns` columns that begin at multiples of `columns` in the parameter are
// adjacent and aligned.
bool aligned_runs(const void* data, DType dtype, int64_t col_stride, int64_t col_offset,
                  int64_t columns, std::initializer_list<int64_t> strides) {
  if (col_stride != 1) return false;
  const auto start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) -
                     col_offset % columns * size_of(dtype);
  bool fits = start % (columns * size_of(dtype)) == 0;
  for (const int64_t s : strides) fits = fits && s % columns == 0;
  return fits;
}

// A tensor as the contract's matrix; its rows must have one stride.
Matrix matrix_of(const Tensor& t, int64_t col_offset, int64_t columns) {
  Matrix m;
  const int64_t dims = t.dim();
  m.data = static_cast<char*>(t.data_ptr());
  m.dtype = dtype_of(t);
  m.cols = dims ? t.size(dims - 1) : 1;
  m.col_stride = dims && m.cols != 1 ? t.stride(dims - 1) : 1;
  m.rows = 1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (m.rows == 1)
      m.row_stride = stride;
    else if (stride != m.rows * m.row_stride)
      throw std::runtime_error("zokernels: the rows of a tensor have no single stride");
    m.rows *= size;
  }
  m.vec = aligned_runs(m.data, m.dtype, m.col_stride, col_offset, columns,
                       {m.rows == 1 ? 0 : m.row_stride});
  return m;
}

Seeds seeds_of(const Tensor& seeds) {
  return {static_cast<const int64_t*>(seeds.data_ptr()), seeds.numel()};
}

const float* floats_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

// out [branches, rows, cols] with adjacent columns; w none: zeros; ids choose rows of w.
void displace_(Tensor out, std::optional<Tensor> w, Tensor seeds, std::optional<Tensor> coeffs,
               std::optional<Tensor> ids, bool own_ids, std::optional<Tensor> flag,
               int64_t param_id, int64_t row_offset, int64_t col_offset, int64_t distribution,
               bool stochastic, int64_t stream) {
  const Guard guard(out);
  DisplaceArgs a;
  a.out_dtype = dtype_of(out);
  const bool wide = a.out_dtype == DType::f32 || (w && dtype_of(*w) == DType::f32);
  const int64_t columns = wide ? 4 : 8;
  if (w)
    a.w = matrix_of(*w, col_offset, columns);
  else
    a.w.cols = out.size(2);
  a.place = place_of(param_id, row_offset, col_offset);
  a.cut = cut_columns(col_offset, a.w.cols, false);
  a.distribution = static_cast<Distribution>(distribution);
  a.out = static_cast<char*>(out.data_ptr());
  a.out_rows = out.size(1);
  a.out_row_stride = out.stride(1);
  a.out_branch_stride = out.stride(0);
  a.out_vec = aligned_runs(
      a.out, a.out_dtype, 1, col_offset, columns,
      {a.out_rows == 1 ? 0 : a.out_row_stride, out.size(0) == 1 ? 0 : a.out_branch_stride});
  if (ids) {
    a.ids = ids->data_ptr();
    a.wide_ids = ids->scalar_type() == ScalarType::Long;
    a.own_ids = own_ids;
    a.flag = flag ? static_cast<int64_t*>(flag->data_ptr()) : nullptr;
  }
  a.terms = seeds_of(seeds);
  a.coeffs = floats_of(coeffs);
  a.branches = out.size(0);
  a.stochastic = stochastic;
  check(displace(a, stream_of(stream)));
}

// logits [branches, tokens, cols] and targets [tokens], contiguous; state float32 [2, branches,
// tokens], losses float32 [branches, tokens], flag int64 [2].
void chunk_loss_(Tensor logits, Tensor targets, Tensor state, Tensor losses, Tensor flag,
                 int64_t start, int64_t vocab, int64_t ignored, int64_t stream) {
  const Guard guard(logits);
  LossArgs a;
  a.logits = static_cast<const char*>(logits.data_ptr());
  a.dtype = dtype_of(logits);
  a.rows = logits.size(0) * logits.size(1);
  a.tokens = logits.size(1);
  a.cols = logits.size(2);
  a.aligned = aligned_runs(a.logits, a.dtype, 1, 0, 16 / size_of(a.dtype), {a.cols});
  a.targets = static_cast<const int64_t*>(targets.data_ptr());
  a.state = static_cast<float*>(state.data_ptr());
  a.losses = static_cast<float*>(losses.data_ptr());
  a.flag = static_cast<int64_t*>(flag.data_ptr());
  a.start = start;
  a.vocab = vocab;
  a.ignored = ignored;
  check(chunk_loss(a, stream_of(stream)));
}

// The entries of one column width, numbered through.
struct Tables {
  Tables() = default;
  Tables(const std::vector<Tensor>& tensors, const std::vector<int64_t>& param_ids,
         const std::vector<int64_t>& row_offsets, const std::vector<int64_t>& col_offsets,
         int columns, bool pairs) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (columns_of(dtype_of(tensors[i])) != columns) continue;
      Entry e;
      const int64_t col0 = col_offsets.empty() ? 0 : col_offsets[i];
      e.m = matrix_of(tensors[i], col0, columns);
      e.place = place_of(param_ids[i], row_offsets.empty() ? 0 : row_offsets[i], col0);
      e.cut = cut_columns(col0, e.m.cols, pairs);
      e.first_tile = tiles;
      const int64_t own = tiles_of(e.m.rows, e.cut, columns);
      if (own == 0) continue;
      tiles += own;
      entries.push_back(e);
    }
  }
  Table to_device(char* memory, void* stream) const {
    auto* device = reinterpret_cast<Entry*>(memory);
    const int count = static_cast<int>(entries.size());
    check(fill_table(entries.data(), count, device, stream));
    return {device, count, tiles};
  }
  std::vector<Entry> entries;
  int64_t tiles = 0;
};

constexpr int kColumns[2] = {8, 4};

// `table`: scratch of table_bytes(len(params)).
void update_(std::vector<Tensor> params, Tensor seeds, Tensor coeffs, std::optional<Tensor> decay,
             std::optional<Tensor> ends, std::vector<int64_t> param_ids,
             std::vector<int64_t> row_offsets, std::vector<int64_t> col_offsets,
             int64_t distribution, bool stochastic, Tensor table, int64_t stream) {
  const Guard guard(table);
  UpdateArgs a;
  a.distribution = static_cast<Distribution>(distribution);
  a.terms = seeds_of(seeds);
  a.coeffs = static_cast<const float*>(coeffs.data_ptr());
  a.decay = floats_of(decay);
  a.ends = ends ? static_cast<const uint8_t*>(ends->data_ptr()) : nullptr;
  a.stochastic = stochastic;
  if (a.terms.count == 0) return;
  // Both tables are made before anything is written: a layout that is refused changes nothing.
  const Tables tables[2] = {{params, param_ids, row_offsets, col_offsets, kColumns[0], stochastic},
                            {params, param_ids, row_offsets, col_offsets, kColumns[1], false}};
  auto* memory = static_cast<char*>(table.data_ptr());
  for (int i = 0; i < 2; ++i) {
    if (tables[i].tiles == 0) continue;
    a.table = tables[i].to_device(memory, stream_of(stream));
    memory += tables[i].entries.size() * sizeof(Entry);
    check(update(a, kColumns[i], stream_of(stream)));
  }
}

// Rows of the scratch `partial` that project_ needs.
int64_t project_rows(std::vector<Tensor> vectors, std::vector<int64_t> col_offsets) {
  const std::vector<int64_t> none(vectors.size(), 0);
  int64_t rows = 0;
  for (const int columns : kColumns)
    rows += project_blocks(Tables(vectors, none, {}, col_offsets, columns, false).tiles);
  return rows;
}

// out float32 [K]; partial float64 [project_rows, K].
void project_(Tensor out, std::vector<Tensor> vectors, Tensor seeds, std::vector<int64_t> param_ids,
              std::vector<int64_t> row_offsets, std::vector<int64_t> col_offsets,
              int64_t distribution, Tensor table, Tensor partial, int64_t stream) {
  const Guard guard(out);
  ProjectArgs a;
  a.distribution = static_cast<Distribution>(distribution);
  a.terms = seeds_of(seeds);
  auto* sums = static_cast<double*>(partial.data_ptr());
  auto* memory = static_cast<char*>(table.data_ptr());
  int64_t blocks = 0;
  for (const int columns : kColumns) {
    const Tables t(vectors, param_ids, row_offsets, col_offsets, columns, false);
    if (t.tiles == 0) continue;
    a.table = t.to_device(memory, stream_of(stream));
    memory += t.entries.size() * sizeof(Entry);
    a.partial = sums + blocks * a.terms.count;
    check(project(a, columns, stream_of(stream)));
    blocks += project_blocks(t.tiles);
  }
  check(project_sum(sums, blocks, a.terms.count, static_cast<float*>(out.data_ptr()),
                    stream_of(stream)));
}

// A table of vectors: contiguous tensors, or the masked elements of contiguous tensors.
Tables vectors_of(const std::vector<Tensor>& tensors, const std::vector<Tensor>& indices,
                  const std::vector<Tensor>& shadows, const std::vector<int64_t>& param_ids,
                  int64_t offset) {
  Tables t;
  int64_t out_at = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Entry e;
    e.m.data = static_cast<char*>(tensors[i].data_ptr());
    e.m.dtype = dtype_of(tensors[i]);
    e.m.rows = 1;
    e.m.cols = (indices.empty() ? tensors[i] : indices[i]).numel();
    e.m.vec = aligned_runs(e.m.data, e.m.dtype, 1, offset, 4, {});
    e.place = place_of(param_ids[i], 0, offset);
    e.cut = cut_columns(offset, e.m.cols, false);
    e.first_tile = t.tiles;
    e.out_at = out_at;
    if (!indices.empty()) {
      e.indices = static_cast<const int64_t*>(indices[i].data_ptr());
      e.shadow = static_cast<float*>(shadows[i].data_ptr());
    }
    out_at += e.m.cols;
    const int64_t own = tiles_of(1, e.cut, 4);
    if (own == 0) continue;
    t.tiles += own;
    t.entries.push_back(e);
  }
  return t;
}

// out float32, flat: for vector after vector its [branches, n]. indices and shadows may be empty;
// less_held, what the weights hold is taken off.
void displace_vectors_(Tensor out, std::vector<Tensor> tensors, std::vector<Tensor> indices,
                       std::vector<Tensor> shadows, Tensor seeds, Tensor coeffs,
                       std::vector<int64_t> param_ids, int64_t offset, int64_t distribution,
                       bool less_held, Tensor table, int64_t stream) {
  const Guard guard(table);
  VectorArgs a;
  a.distribution = static_cast<Distribution>(distribution);
  a.terms = seeds_of(seeds);
  a.coeffs = static_cast<const float*>(coeffs.data_ptr());
  a.out = static_cast<float*>(out.data_ptr());
  a.branches = coeffs.size(0);
  a.less_held = less_held && !indices.empty();
  a.table = vectors_of(tensors, indices, shadows, param_ids, offset)
                .to_device(static_cast<char*>(table.data_ptr()), stream_of(stream));
  check(displace_vectors(a, stream_of(stream)));
}

void sparse_update_(std::vector<Tensor> params, std::vector<Tensor> indices,
                    std::vector<Tensor> shadows, Tensor seeds, Tensor coeffs,
                    std::optional<Tensor> decay, std::vector<int64_t> param_ids,
                    int64_t distribution, Tensor table, int64_t stream) {
  const Guard guard(table);
  VectorArgs a;
  a.distribution = static_cast<Distribution>(distribution);
  a.terms = seeds_of(seeds);
  a.coeffs = static_cast<const float*>(coeffs.data_ptr());
  a.decay = floats_of(decay);
  a.table = vectors_of(params, indices, shadows, param_ids, 0)
                .to_device(static_cast<char*>(table.data_ptr()), stream_of(stream));
  check(sparse_update(a, stream_of(stream)));
}

// y [branches, tokens, outputs] and plain [branches or 1, tokens, outputs] contiguous; x [branches
// or 1, tokens, inputs] of any strides; difference [branches, count]; order none: as indices.
void sparse_correct_(Tensor y, Tensor plain, Tensor x, std::optional<Tensor> bias,
                     Tensor difference, Tensor indices, std::optional<Tensor> order, bool shared,
                     int64_t stream) {
  const Guard guard(y);
  CorrectArgs a;
  a.dtype = dtype_of(y);
  a.branches = y.size(0);
  a.tokens = y.size(1);
  a.outputs = y.size(2);
  a.inputs = x.size(2);
  a.plain = static_cast<const char*>(plain.data_ptr());
  a.plain_branch_stride = shared ? 0 : a.tokens * a.outputs;
  a.y = static_cast<char*>(y.data_ptr());
  a.x = static_cast<const char*>(x.data_ptr());
  a.x_branch_stride = shared ? 0 : x.stride(0);
  a.x_token_stride = x.stride(1);
  a.x_column_stride = x.stride(2);
  a.indices = static_cast<const int64_t*>(indices.data_ptr());
  a.order = order ? static_cast<const int64_t*>(order->data_ptr()) : nullptr;
  a.difference = static_cast<const float*>(difference.data_ptr());
  a.count = indices.numel();
  if (bias) {
    a.bias = bias->data_ptr();
    a.bias_dtype = dtype_of(*bias);
  }
  check(sparse_correct(a, stream_of(stream)));
}

// out [branches, tokens, cols], contiguous, holds the rows; values [branches, count].
void sparse_rows_(Tensor out, Tensor ids, Tensor values, Tensor indices, bool own_ids,
                  int64_t stream) {
  const Guard guard(out);
  RowsArgs a;
  a.out = static_cast<char*>(out.data_ptr());
  a.dtype = dtype_of(out);
  a.ids = ids.data_ptr();
  a.wide_ids = ids.scalar_type() == ScalarType::Long;
  a.own_ids = own_ids;
  a.indices = static_cast<const int64_t*>(indices.data_ptr());
  a.values = static_cast<const float*>(values.data_ptr());
  a.count = indices.numel();
  a.branches = out.size(0);
  a.tokens = out.size(1);
  a.cols = out.size(2);
  check(sparse_rows(a, stream_of(stream)));
}

// y [branches, tokens, rows], x [branches or 1, tokens, cols], all contiguous; w aligned.
LinearArgs linear_args(const Tensor& y, const Tensor& x, const Tensor& w,
                       const std::optional<Tensor>& bias, const Tensor& seeds, const Tensor& coeffs,
                       int64_t param_id, int64_t row_offset, int64_t col_offset,
                       int64_t distribution, bool shared) {
  LinearArgs a;
  const int columns = columns_of(dtype_of(w));
  a.w = matrix_of(w, col_offset, columns);
  if (!a.w.vec || a.w.cols % columns || col_offset % kGaussianGroup)
    throw std::runtime_error("zokernels: the fused product does not take this weight");
  a.place = place_of(param_id, row_offset, col_offset);
  a.distribution = static_cast<Distribution>(distribution);
  a.x = static_cast<const char*>(x.data_ptr());
  a.tokens = y.size(1);
  a.branches = y.size(0);
  a.x_branch_stride = shared ? 0 : a.tokens * a.w.cols;
  if (bias) {
    a.bias = bias->data_ptr();
    a.bias_dtype = dtype_of(*bias);
  }
  a.y = static_cast<char*>(y.data_ptr());
  a.terms = seeds_of(seeds);
  a.coeffs = static_cast<const float*>(coeffs.data_ptr());
  return a;
}

// partial float32 [parts, branches, tokens, rows], parts from linear_parts; none: one part.
void linear_(Tensor y, Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
             std::optional<Tensor> partial, std::optional<Tensor> pending_seeds,
             std::optional<Tensor> pending_coeffs, std::optional<Tensor> pending_decay,
             bool pending_stochastic, int64_t param_id, int64_t row_offset, int64_t col_offset,
             int64_t distribution, bool shared, int64_t multiprocessors, int64_t stream) {
  const Guard guard(y);
  LinearArgs a = linear_args(y, x, w, bias, seeds, coeffs, param_id, row_offset, col_offset,
                             distribution, shared);
  if (pending_seeds) {
    a.pending = seeds_of(*pending_seeds);
    a.pending_coeffs = floats_of(pending_coeffs);
    a.pending_decay = floats_of(pending_decay);
    a.pending_stochastic = pending_stochastic;
  }
  a.multiprocessors = static_cast<int>(multiprocessors);
  auto* const sums = partial ? static_cast<float*>(partial->data_ptr()) : nullptr;
  const int parts = partial ? static_cast<int>(partial->size(0)) : 1;
  check(a.w.dtype == DType::f32 ? linear_few(a, sums, parts, stream_of(stream))
                                : linear(a, sums, parts, stream_of(stream)));
}

int64_t linear_parts_(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                      bool sixteen_bit, int64_t multiprocessors) {
  const auto count = static_cast<int>(multiprocessors);
  return sixteen_bit ? linear_parts(rows, cols, tokens, branches, count)
                     : linear_few_parts(rows, cols, branches, count);
}

// partial float32 [parts, branches, tokens, rows], parts from linear_sm90_parts; none: one part.
void linear_sm90_(Tensor y, Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds,
                  Tensor coeffs, std::optional<Tensor> partial, int64_t param_id,
                  int64_t row_offset, int64_t col_offset, int64_t distribution, bool shared,
                  int64_t stream) {
  const Guard guard(y);
  const LinearArgs a = linear_args(y, x, w, bias, seeds, coeffs, param_id, row_offset, col_offset,
                                   distribution, shared);
  auto* const sums = partial ? static_cast<float*>(partial->data_ptr()) : nullptr;
  if (a.w.dtype == DType::f32) throw std::runtime_error("zokernels: wgmma takes 16-bit weights");
  check(linear_sm90(a, sums, partial ? static_cast<int>(partial->size(0)) : 1, stream_of(stream)));
}

int64_t linear_sm90_parts_(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                           int64_t multiprocessors) {
  return linear_sm90_parts(rows, cols, tokens, branches, static_cast<int>(multiprocessors));
}

// y [branches, tokens, cols], x [branches or 1, tokens, rows], all contiguous; w aligned, its
// columns the outputs. partial float32 [parts, branches, tokens, cols], parts from
// linear_transposed_parts; none: one part.
void linear_transposed_(Tensor y, Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds,
                        Tensor coeffs, std::optional<Tensor> partial, int64_t param_id,
                        int64_t row_offset, int64_t col_offset, int64_t distribution, bool shared,
                        int64_t multiprocessors, int64_t stream) {
  const Guard guard(y);
  LinearArgs a = linear_args(y, x, w, bias, seeds, coeffs, param_id, row_offset, col_offset,
                             distribution, shared);
  if (a.w.rows % columns_of(a.w.dtype))
    throw std::runtime_error("zokernels: the fused product does not take this weight");
  a.x_branch_stride = shared ? 0 : a.tokens * a.w.rows;
  a.multiprocessors = static_cast<int>(multiprocessors);
  auto* const sums = partial ? static_cast<float*>(partial->data_ptr()) : nullptr;
  const int parts = partial ? static_cast<int>(partial->size(0)) : 1;
  check(a.w.dtype == DType::f32 ? linear_few_transposed(a, sums, parts, stream_of(stream))
                                : linear_transposed(a, sums, parts, stream_of(stream)));
}

int64_t linear_transposed_parts_(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                                 bool sixteen_bit, int64_t multiprocessors) {
  const auto count = static_cast<int>(multiprocessors);
  return sixteen_bit ? linear_transposed_parts(rows, cols, tokens, branches, count)
                     : linear_few_transposed_parts(rows, cols, branches, count);
}

int64_t table_bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(Entry)); }

}  // namespace
}  // namespace zk

STABLE_TORCH_LIBRARY(ZK_NAMESPACE, m) {
  m.def(
      "displace_(Tensor(a!) out, Tensor? w, Tensor seeds, Tensor? coeffs, Tensor? ids, "
      "bool own_ids, Tensor(b!)? flag, int param_id, int row_offset, int col_offset, "
      "int distribution, bool stochastic, int stream) -> ()");
  m.def(
      "chunk_loss_(Tensor logits, Tensor targets, Tensor(a!) state, Tensor(b!) losses, "
      "Tensor(c!) flag, int start, int vocab, int ignored, int stream) -> ()");
  m.def(
      "update_(Tensor(a!)[] params, Tensor seeds, Tensor coeffs, Tensor? decay, Tensor? ends, "
      "int[] param_ids, int[] row_offsets, int[] col_offsets, int distribution, bool stochastic, "
      "Tensor(b!) table, int stream) -> ()");
  m.def("project_rows(Tensor[] vectors, int[] col_offsets) -> int");
  m.def(
      "project_(Tensor(a!) out, Tensor[] vectors, Tensor seeds, int[] param_ids, "
      "int[] row_offsets, int[] col_offsets, int distribution, Tensor(b!) table, "
      "Tensor(c!) partial, int stream) -> ()");
  m.def(
      "displace_vectors_(Tensor(a!) out, Tensor[] tensors, Tensor[] indices, Tensor[] shadows, "
      "Tensor seeds, Tensor coeffs, int[] param_ids, int offset, int distribution, bool less_held, "
      "Tensor(b!) table, int stream) -> ()");
  m.def(
      "sparse_update_(Tensor(a!)[] params, Tensor[] indices, Tensor(b!)[] shadows, Tensor seeds, "
      "Tensor coeffs, Tensor? decay, int[] param_ids, int distribution, Tensor(c!) table, "
      "int stream) -> ()");
  m.def(
      "sparse_correct_(Tensor(a!) y, Tensor plain, Tensor x, Tensor? bias, Tensor difference, "
      "Tensor indices, Tensor? order, bool shared, int stream) -> ()");
  m.def(
      "sparse_rows_(Tensor(a!) out, Tensor ids, Tensor values, Tensor indices, bool own_ids, "
      "int stream) -> ()");
  m.def(
      "linear_(Tensor(a!) y, Tensor x, Tensor(b!) w, Tensor? bias, Tensor seeds, Tensor coeffs, "
      "Tensor(c!)? partial, Tensor? pending_seeds, Tensor? pending_coeffs, Tensor? pending_decay, "
      "bool pending_stochastic, int param_id, int row_offset, int col_offset, int distribution, "
      "bool shared, int multiprocessors, int stream) -> ()");
  m.def(
      "linear_parts(int rows, int cols, int tokens, int branches, bool sixteen_bit, "
      "int multiprocessors) -> int");
  m.def(
      "linear_sm90_(Tensor(a!) y, Tensor x, Tensor w, Tensor? bias, Tensor seeds, Tensor coeffs, "
      "Tensor(b!)? partial, int param_id, int row_offset, int col_offset, int distribution, "
      "bool shared, int stream) -> ()");
  m.def(
      "linear_sm90_parts(int rows, int cols, int tokens, int branches, int multiprocessors) -> "
      "int");
  m.def(
      "linear_transposed_(Tensor(a!) y, Tensor x, Tensor w, Tensor? bias, Tensor seeds, "
      "Tensor coeffs, Tensor(b!)? partial, int param_id, int row_offset, int col_offset, "
      "int distribution, bool shared, int multiprocessors, int stream) -> ()");
  m.def(
      "linear_transposed_parts(int rows, int cols, int tokens, int branches, bool sixteen_bit, "
      "int multiprocessors) -> int");
  m.def("has_sm90a() -> bool");
  m.def("table_bytes(int count) -> int");
}

// Composite kernels run under every dispatch key, so autograd's fallback is not in the way; nothing
// here is differentiable.
STABLE_TORCH_LIBRARY_IMPL(ZK_NAMESPACE, CompositeImplicitAutograd, m) {
  m.impl("displace_", TORCH_BOX(&zk::displace_));
  m.impl("chunk_loss_", TORCH_BOX(&zk::chunk_loss_));
  m.impl("update_", TORCH_BOX(&zk::update_));
  m.impl("project_rows", TORCH_BOX(&zk::project_rows));
  m.impl("project_", TORCH_BOX(&zk::project_));
  m.impl("displace_vectors_", TORCH_BOX(&zk::displace_vectors_));
  m.impl("sparse_update_", TORCH_BOX(&zk::sparse_update_));
  m.impl("sparse_correct_", TORCH_BOX(&zk::sparse_correct_));
  m.impl("sparse_rows_", TORCH_BOX(&zk::sparse_rows_));
  m.impl("linear_", TORCH_BOX(&zk::linear_));
  m.impl("linear_parts", TORCH_BOX(&zk::linear_parts_));
  m.impl("linear_sm90_", TORCH_BOX(&zk::linear_sm90_));
  m.impl("linear_sm90_parts", TORCH_BOX(&zk::linear_sm90_parts_));
  m.impl("linear_transposed_", TORCH_BOX(&zk::linear_transposed_));
  m.impl("linear_transposed_parts", TORCH_BOX(&zk::linear_transposed_parts_));
  m.impl("has_sm90a", TORCH_BOX(&zk::has_sm90a));
  m.impl("table_bytes", TORCH_BOX(&zk::table_bytes));
}

// Called by zokernels/_load.py and zokernels/cuda.py through ctypes.
extern "C" {
__attribute__((visibility("default"))) int zokernels_abi_version() { return zk::kAbiVersion; }
__attribute__((visibility("default"))) int zokernels_contract_version() {
  return zk::kContractVersion;
}
// Null when this build has code that the current device runs; else what is wrong.
__attribute__((visibility("default"))) const char* zokernels_cuda_probe() { return zk::probe(); }
}
