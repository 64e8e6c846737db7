// Ops under a mask: the elements of a weight that move are a compact vector of their own.
// Arguments have passed zokernels/_checks.py; indices are checked here.
#include "sparse.h"

#include "../numeric.h"
#include "tensors.h"

namespace zk {
namespace {

Correct correct() {
#if defined(ZK_X86)
  if (&kernels() == &kernels_avx512()) return sparse_correct_avx512;
  if (&kernels() == &kernels_avx2()) return sparse_correct_avx2;
#endif
  return sparse_correct_portable;
}

// Calls fn(e, row, col) for every flat index of a matrix; they increase, so rows are found by
// stepping where the next element is near.
template <class Fn>
void for_elements(const int64_t* indices, int64_t begin, int64_t end, int64_t cols, const Fn& fn) {
  int64_t row = 0, start = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t ahead = indices[e] - start;
    if (ahead < 0 || ahead >= 4 * cols) {
      row = indices[e] / cols;
      start = row * cols;
    } else {
      while (indices[e] - start >= cols) {
        ++row;
        start += cols;
      }
    }
    fn(e, row, indices[e] - start);
  }
}

void check_indices(const int64_t* indices, int64_t count, int64_t numel) {
  for (int64_t e = 0; e < count; ++e)
    if (indices[e] < 0 || indices[e] >= numel)
      throw std::runtime_error("zokernels: an index is outside the weight");
}

int64_t place_in(const MatrixView& m, int64_t row, int64_t col) {
  if (m.leading <= 1) return (m.leading ? row * m.strides[0] : 0) + col * m.col_stride;
  int64_t offset = col * m.col_stride;
  for (int d = m.leading - 1; d >= 0; --d) {
    offset += row % m.sizes[d] * m.strides[d];
    row /= m.sizes[d];
  }
  return offset;
}

// Where the elements [begin, end) of a list lie in a weight. They are spread over all of it, so
// every one of them is a cache miss: the lines are asked for here and read later.
void find_places(const MatrixView& m, const int64_t* indices, int64_t begin, int64_t end,
                 int64_t* places) {
  const int64_t size = dtype_size(m.dtype);
  for_elements(indices, begin, end, m.cols, [&](int64_t e, int64_t row, int64_t col) {
    const int64_t place = place_in(m, row, col);
    __builtin_prefetch(m.data + place * size);
    places[e - begin] = place;
  });
}

// What a weight holds at `place`, as float32, and whether that is what `shadow` rounds to.
struct Stored {
  float value;
  bool shadowed;
};

Stored stored_at(const MatrixView& m, int64_t place, float shadow) {
  switch (m.dtype) {
    case DType::bf16: {
      const uint16_t h = reinterpret_cast<const uint16_t*>(m.data)[place];
      return {bf16_float(h), bf16_nearest(shadow) == h};
    }
    case DType::f16: {
      const uint16_t h = reinterpret_cast<const uint16_t*>(m.data)[place];
      return {fp16_float(h), fp16_nearest(shadow) == h};
    }
    default: {
      const float w = reinterpret_cast<const float*>(m.data)[place];
      return {w, float_bits(w) == float_bits(shadow)};
    }
  }
}

void store_at(const MatrixView& m, int64_t place, float value) {
  switch (m.dtype) {
    case DType::bf16:
      reinterpret_cast<uint16_t*>(m.data)[place] = bf16_nearest(value);
      break;
    case DType::f16:
      reinterpret_cast<uint16_t*>(m.data)[place] = fp16_nearest(value);
      break;
    default:
      reinterpret_cast<float*>(m.data)[place] = value;
  }
}

// One weight's elements: contiguous indices and shadow.
struct Elements {
  Elements(const Tensor& w, const Tensor& index, const Tensor& shadow_values)
      : view(w),
        indices(static_cast<const int64_t*>(index.data_ptr())),
        shadow(static_cast<float*>(shadow_values.data_ptr())),
        count(index.numel()) {
    check_indices(indices, count, view.view.rows * view.view.cols);
  }
  ViewOf view;
  const int64_t* indices;
  float* shadow;
  int64_t count;
};

MatrixView vector_view(float* data, int64_t count) {
  MatrixView m;
  m.data = reinterpret_cast<char*>(data);
  m.rows = 1;
  m.cols = count;
  return m;
}

// Elements that are handled at a time: whole panels of noise.
constexpr int64_t kElements = 4096;

// Calls fn(begin, end) for pieces of the vector whose first element is number `offset`, cut where
// panels begin.
template <class Fn>
void in_pieces(int64_t count, int64_t offset, const Fn& fn) {
  const Pieces pieces(count ? 1 : 0, count, static_cast<uint64_t>(offset), kElements);
  parallel_tasks(pieces.count, [&](int64_t i) {
    const Region r = pieces.at(i);
    fn(r.col_begin, r.col_end);
  });
}

// values[g, e]: of every branch; `held` [count], when given, gets what the weight holds.
void displaced_values(const Elements& all, const SeedKeys& keys, const std::vector<float>& coeffs,
                      int64_t branches, const Place& place, float* values, float* held) {
  const Kernels& k = kernels();
  std::vector<float> base(static_cast<size_t>(all.count));
  const DisplaceArgs args{vector_view(base.data(), all.count),
                          place,
                          keys.terms(),
                          coeffs.data(),
                          branches,
                          Rounding::nearest,
                          DType::f32,
                          false};
  const MatrixView& m = all.view.view;
  in_pieces(all.count, static_cast<int64_t>(place.col_offset), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> places(static_cast<size_t>(end - begin));
    find_places(m, all.indices, begin, end, places.data());
    for (int64_t e = begin; e < end; ++e) {
      const Stored s = stored_at(m, places[static_cast<size_t>(e - begin)], all.shadow[e]);
      base[static_cast<size_t>(e)] = s.shadowed ? all.shadow[e] : s.value;
      if (held) held[e] = s.value;
    }
    k.displace(args, {0, 1, begin, end}, values + begin, all.count, all.count);
  });
}

Tensor sparse_displace(Tensor w, Tensor indices, Tensor shadow, Tensor seeds, Tensor coeffs,
                       int64_t param_id, int64_t offset, int64_t distribution) {
  const Elements all(w, indices, shadow);
  const int64_t branches = coeffs.size(0);
  Tensor out = new_tensor({branches, all.count}, DType::f32);
  displaced_values(all, SeedKeys(seeds), read_matrix(coeffs), branches,
                   place_of(param_id, 0, offset, distribution), static_cast<float*>(out.data_ptr()),
                   nullptr);
  return out;
}

void sparse_update_(std::vector<Tensor> params, std::vector<Tensor> indices,
                    std::vector<Tensor> shadows, Tensor seeds, Tensor coeffs,
                    std::optional<Tensor> decay, std::vector<int64_t> param_ids,
                    int64_t distribution) {
  const Kernels& k = kernels();
  const SeedKeys keys(seeds);
  const std::vector<float> c = read_vector<float>(coeffs);
  const std::vector<float> d = decay ? read_vector<float>(*decay) : std::vector<float>();
  const UpdateArgs args{keys.terms(), c.data(), decay ? d.data() : nullptr, nullptr,
                        Rounding::nearest};
  std::vector<Elements> every;
  std::vector<Pieces> pieces;
  std::vector<int64_t> ends;
  int64_t count = 0;
  every.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    every.emplace_back(params[i], indices[i], shadows[i]);
    pieces.emplace_back(every[i].count ? 1 : 0, every[i].count, 0, kElements);
    count += pieces[i].count;
    ends.push_back(count);
  }
  parallel_tasks(count, [&](int64_t i) {
    const auto t =
        static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), i) - ends.begin());
    const Elements& all = every[t];
    const Region r = pieces[t].at(t ? i - ends[t - 1] : i);
    const MatrixView& m = all.view.view;
    const int64_t begin = r.col_begin, end = r.col_end;
    std::vector<int64_t> places(static_cast<size_t>(end - begin));
    find_places(m, all.indices, begin, end, places.data());
    for (int64_t e = begin; e < end; ++e) {
      const Stored s = stored_at(m, places[static_cast<size_t>(e - begin)], all.shadow[e]);
      if (!s.shadowed) all.shadow[e] = s.value;
    }
    k.update(args, vector_view(all.shadow, all.count), place_of(param_ids[t], 0, 0, distribution),
             r);
    for (int64_t e = begin; e < end; ++e)
      store_at(m, places[static_cast<size_t>(e - begin)], all.shadow[e]);
  });
}

// y [G, tokens, out] is the plain product of x [G, tokens, in] (or, shared, [tokens, in]).
void sparse_correct_(Tensor y, Tensor x, Tensor w, std::optional<Tensor> bias, Tensor indices,
                     Tensor shadow, Tensor seeds, Tensor coeffs, int64_t param_id, int64_t offset,
                     int64_t distribution, bool shared, bool transposed) {
  const Elements all(w, indices, shadow);
  const int64_t branches = coeffs.size(0), n = all.count;
  const MatrixView& m = all.view.view;
  CorrectionArgs args;
  args.dtype = m.dtype;
  args.fan_in = transposed ? m.rows : m.cols;
  args.fan_out = transposed ? m.cols : m.rows;
  const int64_t tokens = args.fan_out && branches ? y.numel() / (branches * args.fan_out) : 0;
  if (tokens == 0 || (n == 0 && !bias)) return;

  std::vector<float> difference(static_cast<size_t>(branches * n));
  std::vector<float> held(static_cast<size_t>(n));
  displaced_values(all, SeedKeys(seeds), read_matrix(coeffs), branches,
                   place_of(param_id, 0, offset, distribution), difference.data(), held.data());
  for (int64_t g = 0; g < branches; ++g)
    for (int64_t e = 0; e < n; ++e)
      difference[static_cast<size_t>(g * n + e)] -= held[static_cast<size_t>(e)];

  std::vector<int32_t> row_of(static_cast<size_t>(n)), col_of(static_cast<size_t>(n));
  std::vector<unsigned char> row_chunks(static_cast<size_t>((m.rows + 15) / 16)),
      col_chunks(static_cast<size_t>((m.cols + 15) / 16));
  for_elements(all.indices, 0, n, m.cols, [&](int64_t e, int64_t row, int64_t col) {
    row_of[static_cast<size_t>(e)] = static_cast<int32_t>(row);
    col_of[static_cast<size_t>(e)] = static_cast<int32_t>(col);
    row_chunks[static_cast<size_t>(row / 16)] = 1;
    col_chunks[static_cast<size_t>(col / 16)] = 1;
  });
  args.source = transposed ? row_of.data() : col_of.data();
  args.target = transposed ? col_of.data() : row_of.data();
  args.source_chunks = transposed ? row_chunks.data() : col_chunks.data();
  args.target_chunks = transposed ? col_chunks.data() : row_chunks.data();
  args.count = n;

  const Correct run = correct();
  const DType bias_dtype = bias ? dtype_of(*bias) : DType::f32;
  const int64_t size = dtype_size(args.dtype);
  const auto* x_data = static_cast<const char*>(x.data_ptr());
  auto* y_data = static_cast<char*>(y.data_ptr());
  const auto* bias_data = bias ? static_cast<const char*>(bias->data_ptr()) : nullptr;
  const int64_t blocks = (tokens + kCorrectionTokens - 1) / kCorrectionTokens;
  parallel_tasks(branches * blocks, [&](int64_t i) {
    const TrimScratch trim;
    const int64_t g = i / blocks, first = i % blocks * kCorrectionTokens;
    const int64_t row = (shared ? 0 : g * tokens) + first;
    auto* memory = reinterpret_cast<float*>(
        scratch.get(static_cast<size_t>(args.scratch_floats()) * sizeof(float)));
    run(args, x_data + row * args.fan_in * size,
        y_data + (g * tokens + first) * args.fan_out * size,
        std::min(kCorrectionTokens, tokens - first), difference.data() + g * n,
        bias_data ? bias_data + g * args.fan_out * dtype_size(bias_dtype) : nullptr, bias_dtype,
        memory);
  });
}

// Puts the masked values of every branch into rows that were looked up: out [G, tokens, cols].
void sparse_rows_(Tensor out, Tensor ids, Tensor w, Tensor indices, Tensor shadow, Tensor seeds,
                  Tensor coeffs, int64_t param_id, int64_t offset, int64_t distribution,
                  bool shared) {
  const Elements all(w, indices, shadow);
  const int64_t branches = coeffs.size(0), n = all.count, cols = all.view.view.cols;
  if (out.numel() == 0 || n == 0) return;
  std::vector<float> values(static_cast<size_t>(branches * n));
  displaced_values(all, SeedKeys(seeds), read_matrix(coeffs), branches,
                   place_of(param_id, 0, offset, distribution), values.data(), nullptr);
  const int64_t tokens = out.numel() / (branches * cols);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  MatrixView rows;
  rows.data = static_cast<char*>(out.data_ptr());
  rows.dtype = dtype_of(out);
  for (int64_t g = 0; g < branches; ++g)
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t start = id[shared ? t : g * tokens + t] * cols;
      const int64_t* first = std::lower_bound(all.indices, all.indices + n, start);
      for (const int64_t* e = first; e != all.indices + n && *e < start + cols; ++e)
        store_at(rows, (g * tokens + t) * cols + *e - start,
                 values[static_cast<size_t>(g * n + (e - all.indices))]);
    }
}

}  // namespace
}  // namespace zk

STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cpp, m) {
  m.def(
      "sparse_displace(Tensor w, Tensor indices, Tensor shadow, Tensor seeds, Tensor coeffs, "
      "int param_id, int offset, int distribution) -> Tensor");
  m.def(
      "sparse_update_(Tensor(a!)[] params, Tensor[] indices, Tensor(b!)[] shadows, Tensor seeds, "
      "Tensor coeffs, Tensor? decay, int[] param_ids, int distribution) -> ()");
  m.def(
      "sparse_correct_(Tensor(a!) y, Tensor x, Tensor w, Tensor? bias, Tensor indices, "
      "Tensor shadow, Tensor seeds, Tensor coeffs, int param_id, int offset, int distribution, "
      "bool shared, bool transposed) -> ()");
  m.def(
      "sparse_rows_(Tensor(a!) out, Tensor ids, Tensor w, Tensor indices, Tensor shadow, "
      "Tensor seeds, Tensor coeffs, int param_id, int offset, int distribution, bool shared) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(zokernels_cpp, CompositeImplicitAutograd, m) {
  m.impl("sparse_displace", TORCH_BOX(&zk::sparse_displace));
  m.impl("sparse_update_", TORCH_BOX(&zk::sparse_update_));
  m.impl("sparse_correct_", TORCH_BOX(&zk::sparse_correct_));
  m.impl("sparse_rows_", TORCH_BOX(&zk::sparse_rows_));
}
