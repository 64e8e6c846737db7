// Units, loads and stores of the elementwise kernels.
//
// A unit is what one thread does in a row: columns l .. l + V - 1 of each quarter of a group of 256
// columns, 4 V elements. Units are numbered l first, then group, then row, so that the threads of a
// warp read adjacent runs of 16 bytes. V is 8 for 16-bit types and 4 where float32 takes part.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace zk {

struct Unit {
  int64_t row;
  uint32_t group;
  uint32_t l;
  int64_t col;  // of column l of quarter 0, in the matrix: may lie outside
};

// Quotients of 64 bits cost several times those of 32.
ZK_DEVICE int64_t divide(int64_t a, uint32_t b, uint32_t& rest) {
  if ((a >> 32) == 0) {
    const auto small = static_cast<uint32_t>(a);
    rest = small % b;
    return small / b;
  }
  rest = static_cast<uint32_t>(a % b);
  return a / b;
}

template <int V>
ZK_DEVICE Unit unit_at(int64_t index, const Cut& cut, int64_t col_offset) {
  constexpr uint32_t lanes = 64 / V;
  Unit u;
  u.l = static_cast<uint32_t>(index) % lanes * V;
  uint32_t group;
  u.row = divide(index / lanes, cut.groups, group);
  u.group = cut.first_group + group;
  u.col = static_cast<int64_t>(u.group) * kGaussianGroup + u.l - col_offset;
  return u;
}

ZK_DEVICE float load_one(const char* data, int64_t at, DType t) {
  if (t == DType::f32) return reinterpret_cast<const float*>(data)[at];
  const uint16_t h = reinterpret_cast<const uint16_t*>(data)[at];
  return t == DType::bf16 ? bf16_float(h) : dev::half_to_float(h);
}

ZK_DEVICE void store_one(char* data, int64_t at, DType t, float x) {
  if (t == DType::f32)
    reinterpret_cast<float*>(data)[at] = x;
  else
    reinterpret_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(
        t == DType::bf16 ? dev::pack<DType::bf16>(x, 0.0f) : dev::pack<DType::f16>(x, 0.0f));
}

template <DType T, int words>
ZK_DEVICE void unpack_words(const uint32_t* w, float* v) {
  ZK_UNROLL
  for (int i = 0; i < words; ++i) unpack<T>(w[i], v[2 * i], v[2 * i + 1]);
}

template <DType T, int words>
ZK_DEVICE void pack_words(const float* v, uint32_t* w) {
  ZK_UNROLL
  for (int i = 0; i < words; ++i) w[i] = dev::pack<T>(v[2 * i], v[2 * i + 1]);
}

// V adjacent, aligned elements.
template <int V>
ZK_DEVICE void load_run(const char* data, int64_t at, DType t, float v[V]) {
  if constexpr (V == 8) {
    const Vec16 raw = dev::load16(data + at * 2);
    if (t == DType::bf16)
      unpack_words<DType::bf16, 4>(raw.w, v);
    else
      unpack_words<DType::f16, 4>(raw.w, v);
  } else if (t == DType::f32) {
    const Vec16 raw = dev::load16(data + at * 4);
    ZK_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = bits_float(raw.w[i]);
  } else {
    const Vec8 raw = dev::load8(data + at * 2);
    if (t == DType::bf16)
      unpack_words<DType::bf16, 2>(raw.w, v);
    else
      unpack_words<DType::f16, 2>(raw.w, v);
  }
}

template <int V>
ZK_DEVICE void store_run(char* data, int64_t at, DType t, const float v[V]) {
  if constexpr (V == 8) {
    Vec16 raw;
    if (t == DType::bf16)
      pack_words<DType::bf16, 4>(v, raw.w);
    else
      pack_words<DType::f16, 4>(v, raw.w);
    dev::store16(data + at * 2, raw);
  } else if (t == DType::f32) {
    Vec16 raw;
    ZK_UNROLL
    for (int i = 0; i < 4; ++i) raw.w[i] = float_bits(v[i]);
    dev::store16(data + at * 4, raw);
  } else {
    Vec8 raw;
    if (t == DType::bf16)
      pack_words<DType::bf16, 2>(v, raw.w);
    else
      pack_words<DType::f16, 2>(v, raw.w);
    dev::store8(data + at * 2, raw);
  }
}

// The elements of a unit: v[j][i] is column l + i of quarter j, zero outside the matrix.
template <int V>
ZK_DEVICE void load_unit(const Matrix& m, const Unit& u, float v[4][V]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t col = u.col + 64 * j, at = u.row * m.row_stride + col * m.col_stride;
    if (m.vec && col >= 0 && col + V <= m.cols) {
      load_run<V>(m.data, at, m.dtype, v[j]);
    } else {
      ZK_UNROLL
      for (int i = 0; i < V; ++i)
        v[j][i] = col + i >= 0 && col + i < m.cols
                      ? load_one(m.data, at + i * m.col_stride, m.dtype)
                      : 0.0f;
    }
  }
}

template <int V>
ZK_DEVICE void store_unit(const Matrix& m, const Unit& u, const float v[4][V]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t col = u.col + 64 * j, at = u.row * m.row_stride + col * m.col_stride;
    if (m.vec && col >= 0 && col + V <= m.cols) {
      store_run<V>(m.data, at, m.dtype, v[j]);
    } else {
      ZK_UNROLL
      for (int i = 0; i < V; ++i)
        if (col + i >= 0 && col + i < m.cols)
          store_one(m.data, at + i * m.col_stride, m.dtype, v[j][i]);
    }
  }
}

// The entry of a table that owns a tile.
ZK_DEVICE int entry_of(const Table& table, int64_t tile) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_tile <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The same where entry `last` owns the tile before: a load instead of a search of dependent ones.
ZK_DEVICE int entry_after(const Table& table, int64_t tile, int last) {
  return last + 1 < table.count && table.entries[last + 1].first_tile <= tile ? last + 1 : last;
}

}  // namespace zk
