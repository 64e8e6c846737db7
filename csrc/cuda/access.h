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
  const int64_t runs = index / lanes;
  uint32_t group;
  if ((runs >> 31) == 0) {
    const auto n = static_cast<uint32_t>(runs);
    const auto row = static_cast<uint32_t>(uint64_t{n} * cut.factor >> cut.shift);
    group = n - row * cut.groups;
    u.row = row;
  } else {
    u.row = divide(runs, cut.groups, group);
  }
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

// V adjacent, aligned elements as they lie in memory: sixteen bytes, or eight of a 16-bit type
// where V is 4.
template <int V>
struct Run {
  uint32_t w[4];

  ZK_DEVICE void load(const char* p, DType t) {
    if (V == 8 || t == DType::f32) {
      const Vec16 raw = dev::load16(p);
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) w[i] = raw.w[i];
    } else {
      const Vec8 raw = dev::load8(p);
      w[0] = raw.w[0];
      w[1] = raw.w[1];
    }
  }

  ZK_DEVICE void store(char* p, DType t) const {
    if (V == 8 || t == DType::f32)
      dev::store16(p, {{w[0], w[1], w[2], w[3]}});
    else
      dev::store8(p, {{w[0], w[1]}});
  }

  ZK_DEVICE void unpack(DType t, float v[V]) const {
    if (V == 4 && t == DType::f32) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = bits_float(w[i]);
    } else if (t == DType::bf16) {
      unpack_words<DType::bf16, V / 2>(w, v);
    } else {
      unpack_words<DType::f16, V / 2>(w, v);
    }
  }

  ZK_DEVICE void pack(DType t, const float v[V]) {
    if (V == 4 && t == DType::f32) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) w[i] = float_bits(v[i]);
    } else if (t == DType::bf16) {
      pack_words<DType::bf16, V / 2>(v, w);
    } else {
      pack_words<DType::f16, V / 2>(v, w);
    }
  }

  ZK_DEVICE void pack_upper_halves(const float v[V]) {
    ZK_UNROLL
    for (int i = 0; i < V / 2; ++i)
      w[i] = dev::bytes_of(float_bits(v[2 * i]), float_bits(v[2 * i + 1]), 0x7632u);
  }
};

// All four runs of a unit lie in the matrix and are adjacent and aligned.
template <int V>
ZK_DEVICE bool whole(const Matrix& m, const Unit& u) {
  return m.vec && u.col >= 0 && u.col + 192 + V <= m.cols;
}

ZK_DEVICE char* at(const Matrix& m, int64_t row, int64_t col) {
  return m.data + (row * m.row_stride + col * m.col_stride) * (m.dtype == DType::f32 ? 4 : 2);
}

template <int V>
ZK_DEVICE void cut_low_halves(float v[4][V]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) v[j][i] = bits_float(float_bits(v[j][i]) & 0xFFFF0000u);
  }
}

// The elements of a unit: v[j][i] is column l + i of quarter j, zero outside the matrix. The loads
// of a whole unit are under way together before the first is waited for.
template <int V>
ZK_DEVICE void load_unit(const Matrix& m, const Unit& u, float v[4][V]) {
  if (whole<V>(m, u)) {
    const char* p = dev::global(at(m, u.row, u.col));
    const int64_t step = V == 8 ? 128 : m.dtype == DType::f32 ? 256 : 128;
    Run<V> runs[4];
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) runs[j].load(p + j * step, m.dtype);
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) runs[j].unpack(m.dtype, v[j]);
    return;
  }
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t col = u.col + 64 * j;
    if (m.vec && col >= 0 && col + V <= m.cols) {
      Run<V> run;
      run.load(dev::global(at(m, u.row, col)), m.dtype);
      run.unpack(m.dtype, v[j]);
    } else {
      ZK_UNROLL
      for (int i = 0; i < V; ++i)
        v[j][i] = col + i >= 0 && col + i < m.cols
                      ? load_one(m.data, u.row * m.row_stride + (col + i) * m.col_stride, m.dtype)
                      : 0.0f;
    }
  }
}

// `halves`: of bfloat16, and a value is the upper half of its float32.
template <int V>
ZK_DEVICE void store_unit(const Matrix& m, const Unit& u, float v[4][V], bool halves = false) {
  const bool all = whole<V>(m, u);
  if (halves && all) {
    char* p = dev::global(at(m, u.row, u.col));
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      Run<V> run;
      run.pack_upper_halves(v[j]);
      run.store(p + 128 * j, DType::bf16);
    }
    return;
  }
  if (halves) cut_low_halves<V>(v);
  if (all) {
    char* p = dev::global(at(m, u.row, u.col));
    const int64_t step = V == 8 ? 128 : m.dtype == DType::f32 ? 256 : 128;
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      Run<V> run;
      run.pack(m.dtype, v[j]);
      run.store(p + j * step, m.dtype);
    }
    return;
  }
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t col = u.col + 64 * j;
    if (m.vec && col >= 0 && col + V <= m.cols) {
      Run<V> run;
      run.pack(m.dtype, v[j]);
      run.store(dev::global(at(m, u.row, col)), m.dtype);
    } else {
      ZK_UNROLL
      for (int i = 0; i < V; ++i)
        if (col + i >= 0 && col + i < m.cols)
          store_one(m.data, u.row * m.row_stride + (col + i) * m.col_stride, m.dtype, v[j][i]);
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
