// Ops of the C++ backend over LibTorch's stable ABI, in the namespace `zokernels_cpp`. Arguments
// have passed zokernels/_checks.py; index ranges are checked here.
#include <memory>

#include "../abi.h"
#include "products.h"

namespace zk {
namespace {

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

Tensor displace_vectors(std::vector<Tensor> vectors, Tensor seeds, Tensor coeffs,
                        std::vector<int64_t> param_ids, int64_t distribution) {
  const Kernels& k = kernels();
  const SeedKeys keys(seeds);
  const std::vector<float> c = read_matrix(coeffs);
  const int64_t branches = coeffs.size(0);
  std::vector<int64_t> starts{0};
  for (const Tensor& v : vectors) starts.push_back(starts.back() + branches * v.numel());
  Tensor out = new_tensor({starts.back()}, DType::f32);
  auto* data = static_cast<float*>(out.data_ptr());
  parallel_tasks(static_cast<int64_t>(vectors.size()), [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    const ViewOf view(vectors[at]);
    const int64_t cols = view.view.cols;
    const DisplaceArgs args{view.view,    place_of(param_ids[at], 0, 0, distribution),
                            keys.terms(), c.data(),
                            branches,     Rounding::nearest,
                            DType::f32,   false};
    k.displace(args, {0, 1, 0, cols}, data + starts[at], cols, cols);
  });
  return out;
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
  const UpdateTerms terms(seeds, coeffs, decay, ends, rounding);
  if (terms.keys.keys.empty()) return;
  const Batch batch(params, param_ids, row_offsets, col_offsets, distribution, kPiece);
  parallel_tasks(batch.count, [&](int64_t i) {
    const size_t t = batch.find(i);
    k.update(terms.args, batch.views[t].view, batch.places[t], batch.pieces[t].at(i));
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
      "displace_vectors(Tensor[] vectors, Tensor seeds, Tensor coeffs, int[] param_ids, "
      "int distribution) -> Tensor");
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
      "update_linear_(Tensor x, Tensor(a!) w, Tensor? bias, Tensor seeds, Tensor coeffs, "
      "Tensor pending_seeds, Tensor pending_coeffs, Tensor? pending_decay, int rounding, "
      "int param_id, int row_offset, int col_offset, int distribution, bool shared) -> Tensor");
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
  m.impl("displace_vectors", TORCH_BOX(&zk::displace_vectors));
  m.impl("update_", TORCH_BOX(&zk::update_));
  m.impl("project", TORCH_BOX(&zk::project));
  m.impl("linear", TORCH_BOX(&zk::linear));
  m.impl("update_linear_", TORCH_BOX(&zk::update_linear_));
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
  zk::widen_products(bf16 != 0, f16 != 0);
}
__attribute__((visibility("default"))) void zokernels_cpu_tiles(int64_t bytes, int64_t rows) {
  zk::set_tile_sizes(bytes, rows);
}
__attribute__((visibility("default"))) void zokernels_cpu_fused(int64_t most_tokens) {
  zk::set_fused_tokens(most_tokens);
}
// out = whether the plan is fused, outputs a task, tasks over outputs, token blocks, bytes of
// displaced weights a task holds.
__attribute__((visibility("default"))) void zokernels_cpu_plan(int64_t fan_in, int64_t fan_out,
                                                               int64_t tokens, int64_t branches,
                                                               int dtype, int transposed,
                                                               int64_t threads, int64_t* out) {
  const zk::Plan plan = zk::plan_product(fan_in, fan_out, tokens, branches,
                                         static_cast<zk::DType>(dtype), transposed != 0, threads);
  out[0] = plan.fused;
  out[1] = plan.rows;
  out[2] = plan.row_tiles;
  out[3] = plan.blocks;
  out[4] = plan.held_bytes(fan_in, fan_out, branches);
}
// The bare generator on the calling thread: `groups` times 256 values folded into one.
__attribute__((visibility("default"))) float zokernels_cpu_generate(int distribution, uint64_t seed,
                                                                    int64_t groups) {
  return zk::kernels().generate(static_cast<zk::Distribution>(distribution), zk::philox_keys(seed),
                                groups);
}
}
