// Ops of the C++ backend over LibTorch's stable ABI, in the namespace `zokernels_cpp`. Arguments
// have passed zokernels/_checks.py; index ranges are checked here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../numeric.h"
#include "dispatch.h"

namespace zk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raised by zokernels_abi_version() and checked by the loader.
constexpr int kAbiVersion = 2;

void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("zokernels: torch failed in ") + what);
}

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

int32_t torch_dtype(DType t) {
  switch (t) {
    case DType::bf16:
      return aoti_torch_dtype_bfloat16();
    case DType::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

template <class T>
std::vector<T> read_vector(const Tensor& t) {
  const auto* p = static_cast<const T*>(t.data_ptr());
  const int64_t n = t.numel();
  std::vector<T> out(static_cast<size_t>(n));
  const int64_t stride = t.dim() ? t.stride(0) : 1;
  for (int64_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = p[i * stride];
  return out;
}

std::vector<float> read_matrix(const Tensor& t) {
  const auto* p = static_cast<const float*>(t.data_ptr());
  const int64_t rows = t.size(0), cols = t.size(1), rs = t.stride(0), cs = t.stride(1);
  std::vector<float> out(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[static_cast<size_t>(r * cols + c)] = p[r * rs + c * cs];
  return out;
}

// The seeds' key schedules.
struct SeedKeys {
  explicit SeedKeys(const Tensor& seeds) {
    for (int64_t s : read_vector<int64_t>(seeds))
      keys.push_back(philox_keys(static_cast<uint64_t>(s)));
  }
  Terms terms() const { return {keys.data(), static_cast<int64_t>(keys.size())}; }
  std::vector<PhiloxKeys> keys;
};

// A tensor as the contract's matrix. Leading dimensions that follow each other in memory are
// merged.
struct ViewOf {
  explicit ViewOf(const Tensor& t) {
    const int64_t dims = t.dim();
    view.data = static_cast<char*>(t.data_ptr());
    view.dtype = dtype_of(t);
    view.cols = dims ? t.size(dims - 1) : 1;
    view.col_stride = dims ? t.stride(dims - 1) : 1;
    if (view.cols == 1) view.col_stride = 1;
    view.rows = 1;
    for (int64_t d = 0; d + 1 < dims; ++d) {
      const int64_t size = t.size(d), stride = t.stride(d);
      view.rows *= size;
      if (size == 1) continue;
      if (!sizes.empty() && strides.back() == size * stride) {
        sizes.back() *= size;
        strides.back() = stride;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
    view.leading = static_cast<int>(sizes.size());
    view.sizes = sizes.data();
    view.strides = strides.data();
  }
  ViewOf(const ViewOf&) = delete;
  ViewOf(ViewOf&& other) noexcept
      : sizes(std::move(other.sizes)), strides(std::move(other.strides)), view(other.view) {
    view.sizes = sizes.data();
    view.strides = strides.data();
  }
  std::vector<int64_t> sizes, strides;
  MatrixView view;
};

// Runs fn(0), ..., fn(count - 1) on torch's threads; whoever is free takes the next one.
template <class Fn>
void parallel_tasks(int64_t count, const Fn& fn) {
  const auto threads =
      std::min<int64_t>(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) fn(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) fn(i);
  });
}

// Scratch that each thread keeps between calls: it grows to the largest tile and no further, and
// goes with its thread. Blocks above the kept size are released at the end of the call.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{16} << 20;
  ~Scratch() { release(); }
  char* get(size_t bytes) {
    if (bytes > size_) {
      release();
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(4096, rounded));
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKept) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;

struct TrimScratch {
  ~TrimScratch() { scratch.trim(); }
};

// Pieces of a matrix of about `target` elements, cut where noise panels begin.
struct Pieces {
  Pieces(int64_t rows, int64_t cols, uint64_t col_offset, int64_t target) : rows(rows), cols(cols) {
    if (rows == 0 || cols == 0) return;
    lead = static_cast<int64_t>(col_offset % 2048);
    col_step = std::max<int64_t>(2048, target / 2048 * 2048);
    col_pieces = cols <= col_step ? 1 : (lead + cols + col_step - 1) / col_step;
    row_step = col_pieces > 1 ? 1 : std::max<int64_t>(1, target / cols);
    count = (rows + row_step - 1) / row_step * col_pieces;
  }
  Region at(int64_t i) const {
    const int64_t r = i / col_pieces * row_step, c = i % col_pieces;
    if (col_pieces == 1) return {r, std::min(rows, r + row_step), 0, cols};
    return {r, r + 1, std::max<int64_t>(0, c * col_step - lead),
            std::min(cols, (c + 1) * col_step - lead)};
  }
  int64_t rows, cols, count = 0;
  int64_t lead = 0, col_step = 0, col_pieces = 1, row_step = 1;
};

Tensor new_tensor(std::initializer_list<int64_t> sizes, DType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[i]);
  }
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                 torch_dtype(dtype), aoti_torch_device_type_cpu(), 0, &handle),
        "empty_strided");
  return Tensor(handle);
}

Place place_of(int64_t param_id, int64_t row_offset, int64_t col_offset, int64_t distribution) {
  return {static_cast<uint32_t>(param_id), static_cast<uint64_t>(row_offset),
          static_cast<uint64_t>(col_offset), static_cast<Distribution>(distribution)};
}

constexpr int64_t kPiece = 1 << 15;

Tensor sample(int64_t rows, int64_t cols, Tensor seed, int64_t param_id, int64_t row_offset,
              int64_t col_offset, int64_t distribution) {
  const Kernels& k = kernels();
  Tensor out = new_tensor({rows, cols}, DType::f32);
  auto* data = static_cast<float*>(out.data_ptr());
  const PhiloxKeys keys =
      philox_keys(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr())));
  const Place place = place_of(param_id, row_offset, col_offset, distribution);
  const Pieces pieces(rows, cols, place.col_offset, kPiece);
  parallel_tasks(pieces.count, [&](int64_t i) {
    const Region r = pieces.at(i);
    k.sample(place, keys, r, data + r.row_begin * cols + r.col_begin, cols);
  });
  return out;
}

void displace_(Tensor out, Tensor w, Tensor seeds, Tensor coeffs, int64_t param_id,
               int64_t row_offset, int64_t col_offset, int64_t distribution, int64_t rounding) {
  const Kernels& k = kernels();
  const ViewOf view(w);
  const SeedKeys keys(seeds);
  const std::vector<float> c = read_matrix(coeffs);
  const DisplaceArgs args{view.view,      place_of(param_id, row_offset, col_offset, distribution),
                          keys.terms(),   c.data(),
                          coeffs.size(0), static_cast<Rounding>(rounding),
                          dtype_of(out),  false};
  auto* data = static_cast<char*>(out.data_ptr());
  const int64_t branch_stride = out.stride(0), row_stride = out.stride(1);
  const int64_t size = dtype_size(args.out_dtype);
  const Pieces pieces(view.view.rows, view.view.cols, args.place.col_offset, kPiece);
  parallel_tasks(pieces.count, [&](int64_t i) {
    const Region r = pieces.at(i);
    k.displace(args, r, data + (r.row_begin * row_stride + r.col_begin) * size, row_stride,
               branch_stride);
  });
}

// Several matrices cut into pieces that are numbered through.
struct Batch {
  Batch(const std::vector<Tensor>& tensors, const std::vector<int64_t>& param_ids,
        const std::vector<int64_t>& row_offsets, const std::vector<int64_t>& col_offsets,
        int64_t distribution, int64_t target) {
    views.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      views.emplace_back(tensors[i]);
      places.push_back(place_of(param_ids[i], row_offsets.empty() ? 0 : row_offsets[i],
                                col_offsets.empty() ? 0 : col_offsets[i], distribution));
      pieces.emplace_back(views[i].view.rows, views[i].view.cols, places[i].col_offset, target);
      count += pieces[i].count;
      ends.push_back(count);
    }
  }
  // The tensor of a piece; `piece` becomes the number inside that tensor.
  size_t find(int64_t& piece) const {
    const auto t =
        static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin());
    if (t) piece -= ends[t - 1];
    return t;
  }
  std::vector<ViewOf> views;
  std::vector<Place> places;
  std::vector<Pieces> pieces;
  std::vector<int64_t> ends;
  int64_t count = 0;
};

void update_(std::vector<Tensor> params, Tensor seeds, Tensor coeffs, std::optional<Tensor> decay,
             std::optional<Tensor> ends, std::vector<int64_t> param_ids,
             std::vector<int64_t> row_offsets, std::vector<int64_t> col_offsets,
             int64_t distribution, int64_t rounding) {
  const Kernels& k = kernels();
  const SeedKeys keys(seeds);
  if (keys.keys.empty()) return;
  const std::vector<float> c = read_vector<float>(coeffs);
  const std::vector<float> d = decay ? read_vector<float>(*decay) : std::vector<float>();
  std::vector<unsigned char> e =
      ends ? read_vector<unsigned char>(*ends) : std::vector<unsigned char>();
  if (!e.empty()) e.back() = 1;  // the last term always ends
  const UpdateArgs args{keys.terms(), c.data(), decay ? d.data() : nullptr,
                        ends ? e.data() : nullptr, static_cast<Rounding>(rounding)};
  const Batch batch(params, param_ids, row_offsets, col_offsets, distribution, kPiece);
  parallel_tasks(batch.count, [&](int64_t i) {
    const size_t t = batch.find(i);
    k.update(args, batch.views[t].view, batch.places[t], batch.pieces[t].at(i));
  });
}

Tensor project(std::vector<Tensor> vectors, Tensor seeds, std::vector<int64_t> param_ids,
               std::vector<int64_t> row_offsets, std::vector<int64_t> col_offsets,
               int64_t distribution) {
  const Kernels& k = kernels();
  const SeedKeys keys(seeds);
  const Terms terms = keys.terms();
  // The pieces depend on shapes alone and their sums are added in order: no thread count changes a
  // bit.
  const Batch batch(vectors, param_ids, row_offsets, col_offsets, distribution, int64_t{1} << 17);
  std::vector<double> sums(static_cast<size_t>(batch.count * terms.count), 0.0);
  parallel_tasks(batch.count, [&](int64_t i) {
    double* into = sums.data() + i * terms.count;
    const size_t t = batch.find(i);
    k.project(batch.views[t].view, batch.places[t], terms, batch.pieces[t].at(i), into);
  });
  Tensor out = new_tensor({terms.count}, DType::f32);
  auto* data = static_cast<float*>(out.data_ptr());
  for (int64_t s = 0; s < terms.count; ++s) {
    double total = 0.0;
    for (int64_t i = 0; i < batch.count; ++i)
      total += sums[static_cast<size_t>(i * terms.count + s)];
    data[s] = static_cast<float>(total);
  }
  return out;
}

// ---- products ----

// out[m, n] = a[m, k] b[k, n] by torch's matrix product, on as many threads as the caller's context
// gives it: one inside parallel_tasks.
struct Blob {
  Blob(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
       DType dtype) {
    const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
    check(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, torch_dtype(dtype),
                                             aoti_torch_device_type_cpu(), 0, &handle),
          "from_blob");
  }
  ~Blob() { aoti_torch_delete_tensor_object(handle); }
  Blob(const Blob&) = delete;
  AtenTensorHandle handle = nullptr;
};

void multiply(const Blob& a, const Blob& b, const Blob& out) {
  check(aoti_torch_cpu_mm_out(out.handle, a.handle, b.handle), "mm");
}

// Types whose vendor product is slower than converting to float32 and multiplying there (set by the
// loader from what torch reports).
std::atomic<bool> widen_bf16{false}, widen_f16{true};
std::atomic<int64_t> tile_bytes{int64_t{4} << 20};
std::atomic<int64_t> tile_rows_min{64};

bool widened(DType t) {
  return t == DType::bf16 ? widen_bf16.load() : t == DType::f16 ? widen_f16.load() : false;
}

constexpr int64_t kTokenBlock = 2048;
constexpr int64_t kLeastBlock = 512;

// Tasks of a product: outputs in tiles of `rows`, and tokens in blocks where the tiles alone would
// leave threads idle (the noise of a tile is then drawn once a block, which a block of 512 tokens
// outweighs twentyfold). Sizes are measured: see csrc/README.md.
struct Plan {
  int64_t rows, row_tiles, block, blocks;
};

Plan plan_tiles(int64_t fan_in, int64_t fan_out, int64_t tokens, int64_t branches, DType compute,
                bool transposed, int64_t threads) {
  const int64_t unit = transposed ? 256 : 16;
  const int64_t per_output = std::max<int64_t>(1, branches * fan_in * dtype_size(compute));
  const int64_t least = std::max(unit, tile_rows_min.load());
  // Many tokens: every tile reads the activations again, so tiles are larger.
  const bool many = tokens >= kLeastBlock;
  const int64_t most = many ? 1024 : compute == DType::f32 ? 256 : 512;
  const int64_t bytes = tile_bytes.load() * (many ? 2 : 1);
  int64_t rows = std::max(least, std::min(most, bytes / per_output));
  Plan plan{};
  plan.blocks = 1;
  const int64_t share = (fan_out + threads - 1) / threads;
  if (share < rows) {
    rows = std::max(share, tokens >= 2 * kLeastBlock ? least : unit);
    const int64_t tiles = (fan_out + rows - 1) / rows;
    plan.blocks = std::max<int64_t>(1, std::min(threads / tiles, tokens / kLeastBlock));
  }
  // A whole number of tiles a thread.
  int64_t tiles = (fan_out + rows - 1) / rows;
  if (tiles > threads) tiles = (tiles + threads - 1) / threads * threads;
  rows = (fan_out + tiles - 1) / tiles;
  plan.rows = (rows + unit - 1) / unit * unit;
  plan.row_tiles = (fan_out + plan.rows - 1) / plan.rows;
  plan.block = (tokens + plan.blocks - 1) / plan.blocks;
  return plan;
}

// Everything a product with displaced weights needs.
struct Product {
  Product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const Tensor& seeds,
          const Tensor& coeffs, Place place, bool shared, bool transposed)
      : view(w), keys(seeds), c(read_matrix(coeffs)), shared(shared), transposed(transposed) {
    dtype = view.view.dtype;
    branches = coeffs.size(0);
    fan_in = transposed ? view.view.rows : view.view.cols;
    fan_out = transposed ? view.view.cols : view.view.rows;
    tokens = 1;
    for (int64_t d = shared ? 0 : 1; d + 1 < x.dim(); ++d) tokens *= x.size(d);
    compute = widened(dtype) ? DType::f32 : dtype;
    args = {view.view,         place,   keys.terms(),    c.data(), branches,
            Rounding::nearest, compute, compute != dtype};
    if (bias) {
      bias_dtype = dtype_of(*bias);
      bias_data = static_cast<const char*>(bias->data_ptr());
    }
    x_data = static_cast<char*>(x.data_ptr());
    if (compute != dtype) {
      const int64_t count = x.numel();
      wide_x.reset(new float[static_cast<size_t>(count)]);
      const Kernels& k = kernels();
      constexpr int64_t step = 1 << 16;
      parallel_tasks((count + step - 1) / step, [&](int64_t i) {
        const int64_t begin = i * step;
        k.convert(x_data + begin * dtype_size(dtype), dtype, wide_x.get() + begin, compute,
                  std::min(step, count - begin));
      });
      x_data = reinterpret_cast<char*>(wide_x.get());
    }
  }

  Plan plan(int64_t threads) const {
    return plan_tiles(fan_in, fan_out, tokens, branches, compute, transposed, threads);
  }

  Region region(int64_t begin, int64_t end) const {
    return transposed ? Region{0, fan_in, begin, end} : Region{begin, end, 0, fan_in};
  }

  // Displaces outputs [begin, end) of all branches into `to`; returns the branch stride.
  int64_t displace(const Kernels& k, int64_t begin, int64_t end, void* to) const {
    const int64_t n = end - begin;
    const int64_t row_stride = transposed ? n : fan_in;
    k.displace(args, region(begin, end), to, row_stride, n * fan_in);
    return n * fan_in;
  }

  // Tile g as the right factor [fan_in, n].
  Blob factor(char* tile_data, int64_t g, int64_t n) const {
    char* p = tile_data + g * n * fan_in * dtype_size(compute);
    return transposed ? Blob(p, fan_in, n, n, 1, compute) : Blob(p, fan_in, n, 1, fan_in, compute);
  }

  Blob left(int64_t g, int64_t begin, int64_t count) const {
    const int64_t row = (shared ? 0 : g * tokens) + begin;
    return Blob(x_data + row * fan_in * dtype_size(compute), count, fan_in, fan_in, 1, compute);
  }

  const void* bias_at(int64_t g, int64_t n) const {
    return bias_data + (g * fan_out + n) * dtype_size(bias_dtype);
  }

  ViewOf view;
  SeedKeys keys;
  std::vector<float> c;
  bool shared, transposed;
  DType dtype, compute;
  int64_t branches, fan_in, fan_out, tokens;
  DisplaceArgs args;
  const char* bias_data = nullptr;
  DType bias_dtype = DType::f32;
  char* x_data = nullptr;
  std::unique_ptr<float[]> wide_x;
};

// y is [branches, tokens, fan_out], contiguous, in the dtype of w.
void linear_tiles(const Product& p, char* y, int64_t threads) {
  const Kernels& k = kernels();
  const Plan plan = p.plan(threads);
  const int64_t size = dtype_size(p.dtype), compute_size = dtype_size(p.compute);
  parallel_tasks(plan.row_tiles * plan.blocks, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t begin = i % plan.row_tiles * plan.rows;
    const int64_t end = std::min(p.fan_out, begin + plan.rows), n = end - begin;
    const int64_t first = i / plan.row_tiles * plan.block;
    const int64_t last = std::min(p.tokens, first + plan.block);
    const int64_t tile_size = (p.branches * n * p.fan_in * compute_size + 63) / 64 * 64;
    const bool wide = p.compute != p.dtype;
    const int64_t block = wide ? std::min(last - first, kTokenBlock) : last - first;
    char* memory =
        scratch.get(static_cast<size_t>(tile_size + (wide ? block * n * compute_size : 0)));
    p.displace(k, begin, end, memory);
    for (int64_t g = 0; g < p.branches; ++g) {
      const Blob weights = p.factor(memory, g, n);
      for (int64_t t = first; t < last; t += block) {
        const int64_t m = std::min(block, last - t);
        char* to = y + ((g * p.tokens + t) * p.fan_out + begin) * size;
        char* part = wide ? memory + tile_size : to;
        const int64_t stride = wide ? n : p.fan_out;
        multiply(p.left(g, t, m), weights, Blob(part, m, n, stride, 1, p.compute));
        if (p.bias_data)
          k.add_bias(part, p.compute, m, n, stride, p.bias_at(g, begin), p.bias_dtype);
        for (int64_t r = 0; wide && r < m; ++r)
          k.convert(part + r * n * compute_size, p.compute, to + r * p.fan_out * size, p.dtype, n);
      }
    }
  });
}

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
              int64_t param_id, int64_t row_offset, int64_t col_offset, int64_t distribution,
              bool shared, bool transposed) {
  const Product p(x, w, bias, seeds, coeffs,
                  place_of(param_id, row_offset, col_offset, distribution), shared, transposed);
  Tensor y = new_tensor({p.branches, p.tokens, p.fan_out}, p.dtype);
  auto* data = static_cast<char*>(y.data_ptr());
  if (p.branches == 0 || p.tokens == 0 || p.fan_out == 0) return y;
  linear_tiles(p, data, static_cast<int64_t>(torch::stable::get_num_threads()));
  return y;
}

Tensor embedding(Tensor ids, Tensor w, Tensor seeds, Tensor coeffs, int64_t param_id,
                 int64_t row_offset, int64_t col_offset, int64_t distribution, bool shared) {
  const Kernels& k = kernels();
  const ViewOf view(w);
  const SeedKeys keys(seeds);
  const std::vector<float> c = read_matrix(coeffs);
  const int64_t branches = coeffs.size(0), cols = view.view.cols;
  const DType dtype = view.view.dtype;
  const int64_t tokens = shared ? ids.numel() : branches ? ids.numel() / branches : 0;
  const bool wide_ids = ids.scalar_type() == ScalarType::Long;
  const void* id_data = ids.data_ptr();
  const auto id = [&](int64_t i) {
    return wide_ids ? static_cast<const int64_t*>(id_data)[i]
                    : static_cast<int64_t>(static_cast<const int32_t*>(id_data)[i]);
  };
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (id(i) < 0 || id(i) >= view.view.rows)
      throw std::runtime_error("zokernels: an id is outside the embedding");
  Tensor out = new_tensor({branches, tokens, cols}, dtype);
  auto* data = static_cast<char*>(out.data_ptr());
  const int64_t size = dtype_size(dtype);
  DisplaceArgs all{view.view,    place_of(param_id, row_offset, col_offset, distribution),
                   keys.terms(), c.data(),
                   branches,     Rounding::nearest,
                   dtype,        false};
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, cols));
  parallel_tasks((tokens + step - 1) / step, [&](int64_t i) {
    DisplaceArgs one = all;
    one.branches = 1;
    for (int64_t t = i * step; t < std::min(tokens, (i + 1) * step); ++t) {
      const int64_t row = id(t);
      bool equal = true;
      if (!shared)
        for (int64_t g = 1; g < branches; ++g) equal = equal && id(g * tokens + t) == row;
      if (equal) {
        k.displace(all, {row, row + 1, 0, cols}, data + t * cols * size, cols, tokens * cols);
        continue;
      }
      for (int64_t g = 0; g < branches; ++g) {
        const int64_t own = id(g * tokens + t);
        one.coeffs = all.coeffs + g * all.terms.count;
        k.displace(one, {own, own + 1, 0, cols}, data + (g * tokens + t) * cols * size, cols, 0);
      }
    }
  });
  return out;
}

float logit_at(const char* logits, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bf16:
      return bf16_float(reinterpret_cast<const uint16_t*>(logits)[index]);
    case DType::f16:
      return fp16_float(reinterpret_cast<const uint16_t*>(logits)[index]);
    default:
      return reinterpret_cast<const float*>(logits)[index];
  }
}

Tensor linear_cross_entropy(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor targets,
                            Tensor seeds, Tensor coeffs, int64_t param_id, int64_t row_offset,
                            int64_t col_offset, int64_t distribution, bool shared,
                            int64_t ignore_index) {
  const Kernels& k = kernels();
  const Product p(x, w, bias, seeds, coeffs,
                  place_of(param_id, row_offset, col_offset, distribution), shared, false);
  const std::vector<int64_t> target = read_vector<int64_t>(targets);
  int64_t kept = 0;
  for (int64_t t : target) {
    if (t == ignore_index) continue;
    if (t < 0 || t >= p.fan_out)
      throw std::runtime_error("zokernels: a target is outside the vocabulary");
    ++kept;
  }
  // Chunks of the vocabulary do not depend on the thread count, and their partial sums are added in
  // order.
  const int64_t per_output = std::max<int64_t>(1, p.branches * p.fan_in * dtype_size(p.compute));
  const int64_t n_tile = std::max<int64_t>(
      tile_rows_min.load(), std::min<int64_t>(p.compute == DType::f32 ? 256 : 512,
                                              tile_bytes.load() / per_output / 16 * 16));
  const int64_t chunks = (p.fan_out + n_tile - 1) / n_tile;
  const int64_t compute_size = dtype_size(p.compute);
  std::vector<double> loss(static_cast<size_t>(p.branches), 0.0);
  for (int64_t t0 = 0; t0 < p.tokens; t0 += kTokenBlock) {
    const int64_t m = std::min(kTokenBlock, p.tokens - t0);
    const auto stats = static_cast<size_t>(chunks * p.branches * m);
    std::vector<float> top(stats), total(stats);
    std::vector<float> picked(static_cast<size_t>(p.branches * m), 0.0f);
    parallel_tasks(chunks, [&](int64_t i) {
      const TrimScratch trim;
      const int64_t begin = i * n_tile, end = std::min(p.fan_out, begin + n_tile), n = end - begin;
      const int64_t tile_size = (p.branches * n * p.fan_in * compute_size + 63) / 64 * 64;
      char* memory = scratch.get(static_cast<size_t>(tile_size + m * n * compute_size));
      char* logits = memory + tile_size;
      p.displace(k, begin, end, memory);
      for (int64_t g = 0; g < p.branches; ++g) {
        multiply(p.left(g, t0, m), p.factor(memory, g, n), Blob(logits, m, n, n, 1, p.compute));
        if (p.bias_data) k.add_bias(logits, p.compute, m, n, n, p.bias_at(g, begin), p.bias_dtype);
        const auto at = static_cast<size_t>((i * p.branches + g) * m);
        k.softmax_stats(logits, p.compute, m, n, n, top.data() + at, total.data() + at, 1);
        for (int64_t r = 0; r < m; ++r) {
          const int64_t t = target[static_cast<size_t>(t0 + r)];
          if (t != ignore_index && t >= begin && t < end)
            picked[static_cast<size_t>(g * m + r)] = logit_at(logits, p.compute, r * n + t - begin);
        }
      }
    });
    for (int64_t g = 0; g < p.branches; ++g)
      for (int64_t r = 0; r < m; ++r) {
        if (target[static_cast<size_t>(t0 + r)] == ignore_index) continue;
        const auto at = [&](int64_t i) {
          return static_cast<size_t>((i * p.branches + g) * m + r);
        };
        float best = -std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < chunks; ++i) best = std::max(best, top[at(i)]);
        double sum = 0.0;
        for (int64_t i = 0; i < chunks; ++i) {
          const float t = top[at(i)];
          const double scale = t == best ? 1.0 : std::exp(static_cast<double>(t) - best);
          sum += static_cast<double>(total[at(i)]) * scale;
        }
        loss[static_cast<size_t>(g)] +=
            best + std::log(sum) - picked[static_cast<size_t>(g * m + r)];
      }
  }
  Tensor out = new_tensor({p.branches}, DType::f32);
  auto* data = static_cast<float*>(out.data_ptr());
  for (int64_t g = 0; g < p.branches; ++g)
    data[g] = static_cast<float>(loss[static_cast<size_t>(g)] / static_cast<double>(kept));
  return out;
}

}  // namespace
}  // namespace zk

STABLE_TORCH_LIBRARY(zokernels_cpp, m) {
  m.def(
      "sample(int rows, int cols, Tensor seed, int param_id, int row_offset, int col_offset, "
      "int distribution) -> Tensor");
  m.def(
      "displace_(Tensor(a!) out, Tensor w, Tensor seeds, Tensor coeffs, int param_id, "
      "int row_offset, int col_offset, int distribution, int rounding) -> ()");
  m.def(
      "update_(Tensor(a!)[] params, Tensor seeds, Tensor coeffs, Tensor? decay, Tensor? ends, "
      "int[] param_ids, int[] row_offsets, int[] col_offsets, int distribution, int rounding) -> "
      "()");
  m.def(
      "project(Tensor[] vectors, Tensor seeds, int[] param_ids, int[] row_offsets, "
      "int[] col_offsets, int distribution) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor w, Tensor? bias, Tensor seeds, Tensor coeffs, int param_id, "
      "int row_offset, int col_offset, int distribution, bool shared, bool transposed) -> Tensor");
  m.def(
      "embedding(Tensor ids, Tensor w, Tensor seeds, Tensor coeffs, int param_id, int row_offset, "
      "int col_offset, int distribution, bool shared) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor x, Tensor w, Tensor? bias, Tensor targets, Tensor seeds, "
      "Tensor coeffs, int param_id, int row_offset, int col_offset, int distribution, bool shared, "
      "int ignore_index) -> Tensor");
}

// Composite kernels run under every dispatch key, so autograd's fallback is not in the way; nothing
// here is differentiable.
STABLE_TORCH_LIBRARY_IMPL(zokernels_cpp, CompositeImplicitAutograd, m) {
  m.impl("sample", TORCH_BOX(&zk::sample));
  m.impl("displace_", TORCH_BOX(&zk::displace_));
  m.impl("update_", TORCH_BOX(&zk::update_));
  m.impl("project", TORCH_BOX(&zk::project));
  m.impl("linear", TORCH_BOX(&zk::linear));
  m.impl("embedding", TORCH_BOX(&zk::embedding));
  m.impl("linear_cross_entropy", TORCH_BOX(&zk::linear_cross_entropy));
}

// Called by zokernels/_load.py and zokernels/cpp.py through ctypes.
extern "C" {
__attribute__((visibility("default"))) int zokernels_abi_version() { return zk::kAbiVersion; }
__attribute__((visibility("default"))) int zokernels_contract_version() {
  return zk::kContractVersion;
}
__attribute__((visibility("default"))) const char* zokernels_cpu_isa() {
  return zk::kernels().name;
}
__attribute__((visibility("default"))) const char* zokernels_cpu_isas() {
  return zk::supported_isas();
}
__attribute__((visibility("default"))) int zokernels_cpu_select(const char* name) {
  return static_cast<int>(zk::select_isa(name));
}
__attribute__((visibility("default"))) void zokernels_cpu_widen(int bf16, int f16) {
  zk::widen_bf16.store(bf16 != 0);
  zk::widen_f16.store(f16 != 0);
}
__attribute__((visibility("default"))) void zokernels_cpu_tiles(int64_t bytes, int64_t rows) {
  zk::tile_bytes.store(bytes);
  zk::tile_rows_min.store(rows);
}
// out = outputs a tile, tiles, token blocks, bytes of a tile.
__attribute__((visibility("default"))) void zokernels_cpu_plan(int64_t fan_in, int64_t fan_out,
                                                               int64_t tokens, int64_t branches,
                                                               int dtype, int transposed,
                                                               int64_t threads, int64_t* out) {
  const auto stored = static_cast<zk::DType>(dtype);
  const zk::DType compute = zk::widened(stored) ? zk::DType::f32 : stored;
  const zk::Plan plan =
      zk::plan_tiles(fan_in, fan_out, tokens, branches, compute, transposed != 0, threads);
  out[0] = plan.rows;
  out[1] = plan.row_tiles;
  out[2] = plan.blocks;
  out[3] = branches * std::min(plan.rows, fan_out) * fan_in * zk::dtype_size(compute);
}
// The bare generator on the calling thread: `groups` times 256 values folded into one.
__attribute__((visibility("default"))) float zokernels_cpu_generate(int distribution, uint64_t seed,
                                                                    int64_t groups) {
  return zk::kernels().generate(static_cast<zk::Distribution>(distribution), zk::philox_keys(seed),
                                groups);
}
}
