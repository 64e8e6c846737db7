// Many vectors in one launch: displaced copies in float32, and elements under a mask.
//
// A masked parameter is the vector of its n elements that move: `indices` says where they lie in
// the weight, `shadow` holds them in float32. The shadow counts where its rounding is what the
// weight holds, else the weight does. Units are access.h's, of a matrix of one row; a thread reads
// its indices and shadows in runs and the weights one by one. What a mask does in products is in
// sparse.cu.
#include "access.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kColumns = 4;

ZK_DEVICE float round_as(float x, DType t) {
  return t == DType::bf16 ? nearest<DType::bf16>(x) : t == DType::f16 ? nearest<DType::f16>(x) : x;
}

// Calls fn(j, i, column) for the elements of a unit that exist.
template <class Fn>
ZK_DEVICE void for_columns(const Entry& e, const Unit& u, Fn fn) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const int64_t col = u.col + 64 * j + i;
      if (col >= 0 && col < e.m.cols) fn(j, i, col);
    }
  }
}

ZK_DEVICE void load_values(const Entry& e, const Unit& u, float v[4][kColumns]) {
  if (!e.indices) {
    load_unit<kColumns>(e.m, u, v);
    return;
  }
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < kColumns; ++i) v[j][i] = 0.0f;
  }
  for_columns(e, u, [&](int j, int i, int64_t col) {
    const float held = load_one(e.m.data, e.indices[col], e.m.dtype), shadow = e.shadow[col];
    v[j][i] = float_bits(round_as(shadow, e.m.dtype)) == float_bits(held) ? shadow : held;
  });
}

template <Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, 2) displace_vectors_kernel(const VectorArgs a) {
  const Entry& e = a.table.entries[entry_of(a.table, dev::block_x())];
  const int64_t index = (dev::block_x() - e.first_tile) * kThreads + dev::thread();
  const Unit u = unit_at<kColumns>(index, e.cut, e.place.col_offset);
  if (u.row > 0) return;
  const int64_t first = dev::block_y() * 2;
  const bool two = first + 1 < a.branches;
  float acc[2][4][kColumns];
  load_values(e, u, acc[0]);
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < kColumns; ++i) acc[1][j][i] = acc[0][j][i];
  }
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.terms.count; ++k) {
    const float c0 = a.coeffs[first * a.terms.count + k];
    const float c1 = two ? a.coeffs[(first + 1) * a.terms.count + k] : 0.0f;
    if (c0 == 0.0f && c1 == 0.0f) continue;
    const Draw<kind> draw(row_state(static_cast<uint64_t>(a.terms.seeds[k]), e.place.row_offset,
                                    e.place.param_id, Stream::direction),
                          u.group, u.l);
    ZK_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i), z);
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc[0][j][i] = fma32(c0, z[j], acc[0][j][i]);
        acc[1][j][i] = fma32(c1, z[j], acc[1][j][i]);
      }
    }
  }
  if (a.less_held) {
    for_columns(e, u, [&](int j, int i, int64_t col) {
      const float held = load_one(e.m.data, e.indices[col], e.m.dtype);
      acc[0][j][i] -= held;
      acc[1][j][i] -= held;
    });
  }
  float* out = a.out + e.out_at * a.branches + first * e.m.cols;
  for_columns(e, u, [&](int j, int i, int64_t col) {
    out[col] = acc[0][j][i];
    if (two) out[e.m.cols + col] = acc[1][j][i];
  });
}

template <Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, 2) sparse_update_kernel(const VectorArgs a) {
  const Entry& e = a.table.entries[entry_of(a.table, dev::block_x())];
  const int64_t index = (dev::block_x() - e.first_tile) * kThreads + dev::thread();
  const Unit u = unit_at<kColumns>(index, e.cut, e.place.col_offset);
  if (u.row > 0) return;
  float acc[4][kColumns];
  load_values(e, u, acc);
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.terms.count; ++k) {
    const float c = a.coeffs[k], decay = a.decay ? a.decay[k] : 1.0f;
    if (c == 0.0f && decay == 1.0f) continue;
    const Draw<kind> draw(row_state(static_cast<uint64_t>(a.terms.seeds[k]), e.place.row_offset,
                                    e.place.param_id, Stream::direction),
                          u.group, u.l);
    ZK_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i), z);
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) acc[j][i] = fma32(c, z[j], acc[j][i] * decay);
    }
  }
  for_columns(e, u, [&](int j, int i, int64_t col) {
    e.shadow[col] = acc[j][i];
    store_one(e.m.data, e.indices[col], e.m.dtype, acc[j][i]);
  });
}

}  // namespace

const char* displace_vectors(const VectorArgs& a, void* stream) {
  if (a.table.tiles == 0 || a.branches == 0) return nullptr;
  const auto kernel = a.distribution == Distribution::gaussian
                          ? displace_vectors_kernel<Distribution::gaussian>
                          : displace_vectors_kernel<Distribution::rademacher>;
  return launch(kernel, a.table.tiles, (a.branches + 1) / 2, 1, kThreads, 0, stream, a);
}

const char* sparse_update(const VectorArgs& a, void* stream) {
  if (a.table.tiles == 0) return nullptr;
  const auto kernel = a.distribution == Distribution::gaussian
                          ? sparse_update_kernel<Distribution::gaussian>
                          : sparse_update_kernel<Distribution::rademacher>;
  return launch(kernel, a.table.tiles, 1, 1, kThreads, 0, stream, a);
}

}  // namespace zk
