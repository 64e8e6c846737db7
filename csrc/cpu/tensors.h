// What every op needs around the kernels: tensors as matrices, seeds, threads, scratch. Over
// LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"

namespace zk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("zokernels: torch failed in ") + what);
}

inline DType dtype_of(const Tensor& t) {
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

inline int32_t torch_dtype(DType t) {
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

inline std::vector<float> read_matrix(const Tensor& t) {
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

// The terms of an update, copied from its tensors.
struct UpdateTerms {
  UpdateTerms(const Tensor& seeds, const Tensor& coeffs, const std::optional<Tensor>& decay,
              const std::optional<Tensor>& ends, int64_t rounding)
      : keys(seeds),
        c(read_vector<float>(coeffs)),
        d(decay ? read_vector<float>(*decay) : std::vector<float>()),
        e(ends ? read_vector<unsigned char>(*ends) : std::vector<unsigned char>()) {
    if (!e.empty()) e.back() = 1;  // the last term always ends
    args = {keys.terms(), c.data(), decay ? d.data() : nullptr, ends ? e.data() : nullptr,
            static_cast<Rounding>(rounding)};
  }
  UpdateTerms(const UpdateTerms&) = delete;
  SeedKeys keys;
  std::vector<float> c, d;
  std::vector<unsigned char> e;
  UpdateArgs args;
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

inline thread_local Scratch scratch;

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

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, DType dtype) {
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

inline Place place_of(int64_t param_id, int64_t row_offset, int64_t col_offset,
                      int64_t distribution) {
  return {static_cast<uint32_t>(param_id), static_cast<uint64_t>(row_offset),
          static_cast<uint64_t>(col_offset), static_cast<Distribution>(distribution)};
}

}  // namespace zk
