#include "products.h"

#include <cmath>
#include <limits>
#include <memory>

#include "../numeric.h"

namespace zk {
namespace {

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

std::atomic<bool> widen_bf16{false}, widen_f16{true};
std::atomic<int64_t> tile_bytes{int64_t{4} << 20};
std::atomic<int64_t> tile_rows_min{64};
std::atomic<int64_t> fused_tokens{-1};  // at most so many tokens are fused; -1: as measured

bool widened(DType t) {
  return t == DType::bf16 ? widen_bf16.load() : t == DType::f16 ? widen_f16.load() : false;
}

constexpr int64_t kTokenBlock = 2048;
constexpr int64_t kLeastBlock = 512;
// Outputs of a task, a multiple of kMicroRows; fewer where there are many threads.
constexpr int64_t kFusedRows = 48;

// The type of a fused product, if there is a kernel that beats torch's.
std::optional<DType> fused_compute(DType dtype) {
  if (!kernels().product) return std::nullopt;
  if (dtype == DType::f32 || widened(dtype)) return DType::f32;
  if (dtype == DType::bf16 && pair_micro()) return DType::bf16;
  return std::nullopt;
}

// Fewer tokens than lanes waste them; with many, torch's product is as good (csrc/README.md).
bool few_tokens(int64_t tokens, DType compute) {
  const int64_t most = fused_tokens.load();
  if (most >= 0) return tokens <= most;
  return tokens > 8 && tokens <= (compute == DType::bf16 ? 128 : 512);
}

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
  plan.compute = compute;
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

// Packed activations; the calling thread's own `scratch` serves its tasks.
thread_local Scratch packed_x;

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
    plan = plan_product(fan_in, fan_out, tokens, branches, dtype, transposed,
                        static_cast<int64_t>(torch::stable::get_num_threads()));
    compute = plan.compute;
    weights = {view.view,         place,   keys.terms(),    c.data(), branches,
               Rounding::nearest, compute, compute != dtype};
    if (bias) {
      bias_dtype = dtype_of(*bias);
      bias_data = static_cast<const char*>(bias->data_ptr());
    }
    x_data = static_cast<char*>(x.data_ptr());
  }
  ~Product() { packed_x.trim(); }
  Product(const Product&) = delete;

  Region region(int64_t begin, int64_t end) const {
    return transposed ? Region{0, fan_in, begin, end} : Region{begin, end, 0, fan_in};
  }

  const void* bias_at(int64_t g, int64_t n) const {
    return bias_data ? bias_data + (g * fan_out + n) * dtype_size(bias_dtype) : nullptr;
  }

  // --- fused ---

  // The kernel's arguments, with x packed into this thread's memory.
  ProductArgs fused() const {
    const Kernels& k = kernels();
    ProductArgs args{weights, nullptr,   shared,
                     tokens,  plan.fill, compute == DType::bf16 ? pair_micro() : nullptr,
                     update};
    const int64_t words = args.packed_words(), copies = shared ? 1 : branches;
    auto* packed = reinterpret_cast<float*>(
        packed_x.get(static_cast<size_t>(std::max<int64_t>(1, copies * words)) * sizeof(float)));
    const int64_t groups = padded_tokens(tokens) / 16;
    parallel_tasks(copies * groups, [&](int64_t i) {
      const int64_t g = i / groups;
      k.pack_tokens(x_data + g * tokens * fan_in * dtype_size(dtype), dtype, tokens, fan_in,
                    i % groups, compute, packed + g * words);
    });
    args.x = packed;
    return args;
  }

  // --- tiles ---

  // x in the type of the product.
  void widen_x() {
    if (compute == dtype) return;
    const int64_t count = (shared ? 1 : branches) * tokens * fan_in;
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

  // Updates outputs [begin, end), if there is an update.
  void renew(const Kernels& k, int64_t begin, int64_t end) const {
    if (update) k.update(*update, view.view, weights.place, region(begin, end));
  }

  // Displaces outputs [begin, end) of all branches into `to`.
  void displace(const Kernels& k, int64_t begin, int64_t end, void* to) const {
    const int64_t n = end - begin;
    k.displace(weights, region(begin, end), to, transposed ? n : fan_in, n * fan_in);
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

  ViewOf view;
  SeedKeys keys;
  std::vector<float> c;
  bool shared, transposed;
  DType dtype, compute;
  int64_t branches, fan_in, fan_out, tokens;
  Plan plan;
  DisplaceArgs weights;
  const char* bias_data = nullptr;
  DType bias_dtype = DType::f32;
  char* x_data = nullptr;
  std::unique_ptr<float[]> wide_x;
  const UpdateArgs* update = nullptr;  // made once of every weight, just before it is displaced
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// y is [branches, tokens, fan_out], contiguous, in the dtype of w.
void linear_fused(const Product& p, char* y) {
  const Kernels& k = kernels();
  const ProductArgs args = p.fused();
  parallel_tasks(p.plan.row_tiles, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t begin = i * p.plan.rows, end = std::min(p.fan_out, begin + p.plan.rows);
    const int64_t n = end - begin, held = aligned(args.scratch_bytes()), sums = args.sums(n);
    char* memory = scratch.get(static_cast<size_t>(held + sums * 4));
    auto* c = reinterpret_cast<float*>(memory + held);
    k.product(args, begin, end, memory, c);
    for (int64_t g = 0; g < p.branches; ++g)
      k.write_product(c + g * (sums / p.branches), n, p.tokens,
                      y + (g * p.tokens * p.fan_out + begin) * dtype_size(p.dtype), p.dtype,
                      p.fan_out, p.bias_at(g, begin), p.bias_dtype);
  });
}

// y is [branches, tokens, fan_out], contiguous, in the dtype of w.
void linear_tiles(Product& p, char* y) {
  const Kernels& k = kernels();
  p.widen_x();
  const Plan& plan = p.plan;
  const int64_t size = dtype_size(p.dtype), compute_size = dtype_size(p.compute);
  // Several tasks displace the same outputs where tokens are cut into blocks.
  const bool apart = plan.blocks > 1;
  const auto renew = [&](int64_t tile) {
    p.renew(k, tile * plan.rows, std::min(p.fan_out, (tile + 1) * plan.rows));
  };
  if (apart && p.update) parallel_tasks(plan.row_tiles, renew);
  parallel_tasks(plan.row_tiles * plan.blocks, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t begin = i % plan.row_tiles * plan.rows;
    const int64_t end = std::min(p.fan_out, begin + plan.rows), n = end - begin;
    const int64_t first = i / plan.row_tiles * plan.block;
    const int64_t last = std::min(p.tokens, first + plan.block);
    const int64_t tile_size = aligned(p.branches * n * p.fan_in * compute_size);
    const bool wide = p.compute != p.dtype;
    const int64_t block = wide ? std::min(last - first, kTokenBlock) : last - first;
    char* memory =
        scratch.get(static_cast<size_t>(tile_size + (wide ? block * n * compute_size : 0)));
    if (!apart) p.renew(k, begin, end);
    p.displace(k, begin, end, memory);
    for (int64_t g = 0; g < p.branches; ++g) {
      const Blob factor = p.factor(memory, g, n);
      for (int64_t t = first; t < last; t += block) {
        const int64_t m = std::min(block, last - t);
        char* to = y + ((g * p.tokens + t) * p.fan_out + begin) * size;
        char* part = wide ? memory + tile_size : to;
        const int64_t stride = wide ? n : p.fan_out;
        multiply(p.left(g, t, m), factor, Blob(part, m, n, stride, 1, p.compute));
        if (p.bias_data)
          k.add_bias(part, p.compute, m, n, stride, p.bias_at(g, begin), p.bias_dtype);
        for (int64_t r = 0; wide && r < m; ++r)
          k.convert(part + r * n * compute_size, p.compute, to + r * p.fan_out * size, p.dtype, n);
      }
    }
  });
}

// ---- cross-entropy ----

// What chunks of the vocabulary leave behind for every token: maximum and sum of exp(logit -
// maximum) a chunk, and the target's logit. Chunks do not depend on the thread count, and their
// sums are added in order.
struct SoftmaxParts {
  SoftmaxParts(int64_t chunks, int64_t branches, int64_t tokens)
      : chunks(chunks),
        branches(branches),
        tokens(tokens),
        stride(padded_tokens(tokens)),
        top(static_cast<size_t>(chunks * branches * stride),
            -std::numeric_limits<float>::infinity()),
        total(top.size(), 0.0f),
        picked(static_cast<size_t>(branches * tokens), 0.0f) {}

  size_t at(int64_t chunk, int64_t g, int64_t t = 0) const {
    return static_cast<size_t>((chunk * branches + g) * stride + t);
  }
  float& target(int64_t g, int64_t t) { return picked[static_cast<size_t>(g * tokens + t)]; }

  // -log softmax of one token's target.
  double loss(int64_t g, int64_t t) const {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < chunks; ++i) best = std::max(best, top[at(i, g, t)]);
    double sum = 0.0;
    for (int64_t i = 0; i < chunks; ++i) {
      const float m = top[at(i, g, t)];
      const double scale = m == best ? 1.0 : std::exp(static_cast<double>(m) - best);
      sum += static_cast<double>(total[at(i, g, t)]) * scale;
    }
    return best + std::log(sum) - picked[static_cast<size_t>(g * tokens + t)];
  }

  int64_t chunks, branches, tokens, stride;
  std::vector<float> top, total, picked;
};

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

using Targets = std::vector<int64_t>;

// Rows of logits are taken into the running softmax as they are made, kFusedRows at a time.
SoftmaxParts softmax_fused(const Product& p, const Targets& target) {
  const Kernels& k = kernels();
  const ProductArgs args = p.fused();
  constexpr int64_t chunk = 10 * kFusedRows;
  SoftmaxParts parts((p.fan_out + chunk - 1) / chunk, p.branches, p.tokens);
  const int64_t padded = parts.stride;
  parallel_tasks(parts.chunks, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t held = aligned(args.scratch_bytes());
    char* memory = scratch.get(static_cast<size_t>(held + args.sums(kFusedRows) * 4));
    auto* c = reinterpret_cast<float*>(memory + held);
    for (int64_t begin = i * chunk; begin < std::min(p.fan_out, (i + 1) * chunk);
         begin += kFusedRows) {
      const int64_t end = std::min(p.fan_out, begin + kFusedRows), n = end - begin;
      k.product(args, begin, end, memory, c);
      for (int64_t g = 0; g < p.branches; ++g) {
        float* logits = c + g * (args.sums(n) / p.branches);
        if (p.bias_data) k.add_row_bias(logits, n, padded, p.bias_at(g, begin), p.bias_dtype);
        k.softmax_rows(logits, n, p.tokens, parts.top.data() + parts.at(i, g),
                       parts.total.data() + parts.at(i, g));
        for (int64_t t = 0; t < p.tokens; ++t) {
          const int64_t row = target[static_cast<size_t>(t)] - begin;
          if (row >= 0 && row < n) parts.target(g, t) = logits[row * padded + t];
        }
      }
    }
  });
  return parts;
}

// Tokens [t0, t0 + m) by tiles of the vocabulary.
SoftmaxParts softmax_tiles(const Product& p, const Targets& target, int64_t t0, int64_t m) {
  const Kernels& k = kernels();
  const int64_t per_output = std::max<int64_t>(1, p.branches * p.fan_in * dtype_size(p.compute));
  const int64_t n_tile = std::max<int64_t>(
      tile_rows_min.load(), std::min<int64_t>(p.compute == DType::f32 ? 256 : 512,
                                              tile_bytes.load() / per_output / 16 * 16));
  const int64_t compute_size = dtype_size(p.compute);
  SoftmaxParts parts((p.fan_out + n_tile - 1) / n_tile, p.branches, m);
  parallel_tasks(parts.chunks, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t begin = i * n_tile, end = std::min(p.fan_out, begin + n_tile), n = end - begin;
    const int64_t tile_size = aligned(p.branches * n * p.fan_in * compute_size);
    char* memory = scratch.get(static_cast<size_t>(tile_size + m * n * compute_size));
    char* logits = memory + tile_size;
    p.displace(k, begin, end, memory);
    for (int64_t g = 0; g < p.branches; ++g) {
      multiply(p.left(g, t0, m), p.factor(memory, g, n), Blob(logits, m, n, n, 1, p.compute));
      if (p.bias_data) k.add_bias(logits, p.compute, m, n, n, p.bias_at(g, begin), p.bias_dtype);
      k.softmax_stats(logits, p.compute, m, n, n, parts.top.data() + parts.at(i, g),
                      parts.total.data() + parts.at(i, g), 1);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t t = target[static_cast<size_t>(t0 + r)];
        if (t >= begin && t < end)
          parts.target(g, r) = logit_at(logits, p.compute, r * n + t - begin);
      }
    }
  });
  return parts;
}

}  // namespace

void widen_products(bool bf16, bool f16) {
  widen_bf16.store(bf16);
  widen_f16.store(f16);
}

void set_tile_sizes(int64_t bytes, int64_t min_rows) {
  tile_bytes.store(bytes);
  tile_rows_min.store(min_rows);
}

void set_fused_tokens(int64_t most) { fused_tokens.store(most); }

Plan plan_product(int64_t fan_in, int64_t fan_out, int64_t tokens, int64_t branches, DType dtype,
                  bool transposed, int64_t threads) {
  const auto compute = fused_compute(dtype);
  if (compute && !transposed && few_tokens(tokens, *compute)) {
    const int64_t fill = padded_tokens(tokens) <= 64 ? kMicroRows : 4 * kMicroRows;
    int64_t rows = kFusedRows;
    while (rows > 2 * kMicroRows && fan_out < 2 * threads * rows) rows /= 2;
    return {true, *compute, rows, (fan_out + rows - 1) / rows, tokens, 1, std::min(fill, rows)};
  }
  return plan_tiles(fan_in, fan_out, tokens, branches, widened(dtype) ? DType::f32 : dtype,
                    transposed, threads);
}

namespace {

Tensor run(Product& p) {
  Tensor y = new_tensor({p.branches, p.tokens, p.fan_out}, p.dtype);
  if (p.branches == 0 || p.tokens == 0 || p.fan_out == 0) {
    p.renew(kernels(), 0, p.fan_out);
    return y;
  }
  auto* data = static_cast<char*>(y.data_ptr());
  if (p.plan.fused)
    linear_fused(p, data);
  else
    linear_tiles(p, data);
  return y;
}

}  // namespace

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
              int64_t param_id, int64_t row_offset, int64_t col_offset, int64_t distribution,
              bool shared, bool transposed) {
  Product p(x, w, bias, seeds, coeffs, place_of(param_id, row_offset, col_offset, distribution),
            shared, transposed);
  return run(p);
}

Tensor update_linear_(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
                      Tensor pending_seeds, Tensor pending_coeffs,
                      std::optional<Tensor> pending_decay, int64_t rounding, int64_t param_id,
                      int64_t row_offset, int64_t col_offset, int64_t distribution, bool shared) {
  const UpdateTerms last(pending_seeds, pending_coeffs, pending_decay, std::nullopt, rounding);
  Product p(x, w, bias, seeds, coeffs, place_of(param_id, row_offset, col_offset, distribution),
            shared, false);
  if (!last.keys.keys.empty()) p.update = &last.args;
  return run(p);
}

Tensor linear_cross_entropy(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor targets,
                            Tensor seeds, Tensor coeffs, int64_t param_id, int64_t row_offset,
                            int64_t col_offset, int64_t distribution, bool shared,
                            int64_t ignore_index) {
  Product p(x, w, bias, seeds, coeffs, place_of(param_id, row_offset, col_offset, distribution),
            shared, false);
  const Targets target = read_vector<int64_t>(targets);
  int64_t kept = 0;
  for (int64_t t : target) {
    if (t == ignore_index) continue;
    if (t < 0 || t >= p.fan_out)
      throw std::runtime_error("zokernels: a target is outside the vocabulary");
    ++kept;
  }
  std::vector<double> loss(static_cast<size_t>(p.branches), 0.0);
  const auto add = [&](const SoftmaxParts& parts, int64_t t0) {
    for (int64_t g = 0; g < p.branches; ++g)
      for (int64_t t = 0; t < parts.tokens; ++t)
        if (target[static_cast<size_t>(t0 + t)] != ignore_index)
          loss[static_cast<size_t>(g)] += parts.loss(g, t);
  };
  if (p.plan.fused && p.tokens) {
    add(softmax_fused(p, target), 0);
  } else {
    p.widen_x();
    for (int64_t t0 = 0; t0 < p.tokens; t0 += kTokenBlock) {
      const int64_t m = std::min(kTokenBlock, p.tokens - t0);
      add(softmax_tiles(p, target, t0, m), t0);
    }
  }
  Tensor out = new_tensor({p.branches}, DType::f32);
  auto* data = static_cast<float*>(out.data_ptr());
  for (int64_t g = 0; g < p.branches; ++g)
    data[g] = static_cast<float>(loss[static_cast<size_t>(g)] / static_cast<double>(kept));
  return out;
}

}  // namespace zk
