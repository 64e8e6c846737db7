// displace, sample and embedding; update; project. A thread draws, applies and stores the 4 V
// elements of a unit (access.h) and keeps them in registers in between.
#include "access.h"
#include "launch.h"

namespace zk {
namespace {

ZK_DEVICE int64_t row_id(const DisplaceArgs& a, int64_t branch, int64_t row) {
  const int64_t at = (a.own_ids ? branch * a.out_rows : 0) + row;
  return a.wide_ids ? static_cast<const int64_t*>(a.ids)[at]
                    : static_cast<int64_t>(static_cast<const int32_t*>(a.ids)[at]);
}

// Both branches' units, rounded with the same bits.
template <DType T, int V>
ZK_DEVICE void round_pair(const RowState& s, const Unit& u, float acc[2][4][V]) {
  const uint32_t shift = u.group % 2u * 16u;
  ZK_UNROLL
  for (int i = 0; i < V; ++i) {
    const PhiloxWords w = rounding_words(s, u.group, u.l + static_cast<uint32_t>(i));
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t r16 = (w.w[j] >> shift) & 0xFFFFu;
      acc[0][j][i] = stochastic<T>(acc[0][j][i], r16);
      acc[1][j][i] = stochastic<T>(acc[1][j][i], r16);
    }
  }
}

// Two branches from one draw; more go by blockIdx.y, and a seed that neither of the two has is not
// drawn. Branches with rows of their own go one by one.
template <int V, Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, V == 4 && kind == Distribution::rademacher ? 3 : 2)
    displace_kernel(const DisplaceArgs a) {
  const int64_t index = dev::block_x() * kThreads + dev::thread();
  if (index >= a.out_rows * a.cut.groups * (64 / V)) return;
  Unit u = unit_at<V>(index, a.cut, a.place.col_offset);
  const int64_t first = a.own_ids ? dev::block_y() : dev::block_y() * 2;
  const bool two = !a.own_ids && first + 1 < a.branches;
  const int64_t out_row = u.row;
  bool there = true;
  if (a.ids) {
    const int64_t id = row_id(a, first, out_row);
    there = id >= 0 && id < a.w.rows;
    if (!there && a.flag) {
      a.flag[1] = a.w.rows;
      a.flag[0] = id;
    }
    u.row = there ? id : 0;
  }
  const uint32_t noise_row = a.place.row_offset + static_cast<uint32_t>(u.row);

  float acc[2][4][V];
  if (a.w.data && there) {
    load_unit<V>(a.w, u, acc[0]);
  } else {
    const float empty = there ? 0.0f : bits_float(0x7FC00000u);
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      ZK_UNROLL
      for (int i = 0; i < V; ++i) acc[0][j][i] = empty;
    }
  }
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) acc[1][j][i] = acc[0][j][i];
  }
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.terms.count; ++k) {
    const float c0 = a.coeffs ? a.coeffs[first * a.terms.count + k] : 1.0f;
    const float c1 = two ? a.coeffs[(first + 1) * a.terms.count + k] : 0.0f;
    if (c0 == 0.0f && c1 == 0.0f) continue;
    const Draw<kind> draw(row_state(static_cast<uint64_t>(a.terms.seeds[k]), noise_row,
                                    a.place.param_id, Stream::direction),
                          u.group, u.l);
    ZK_UNROLL
    for (int i = 0; i < V; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i), z);
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc[0][j][i] = fma32(c0, z[j], acc[0][j][i]);
        acc[1][j][i] = fma32(c1, z[j], acc[1][j][i]);
      }
    }
  }
  if (a.stochastic && a.terms.count > 0 && a.out_dtype != DType::f32) {
    const RowState s = row_state(static_cast<uint64_t>(a.terms.seeds[0]), noise_row,
                                 a.place.param_id, Stream::probe_rounding);
    if (a.out_dtype == DType::bf16)
      round_pair<DType::bf16, V>(s, u, acc);
    else
      round_pair<DType::f16, V>(s, u, acc);
  }
  const int64_t size = a.out_dtype == DType::f32 ? 4 : 2;
  u.row = out_row;
  Matrix out{a.out + first * a.out_branch_stride * size,
             a.out_rows,
             a.w.cols,
             a.out_row_stride,
             1,
             a.out_dtype,
             a.out_vec};
  store_unit<V>(out, u, acc[0]);
  if (two) {
    out.data += a.out_branch_stride * size;
    store_unit<V>(out, u, acc[1]);
  }
}

// Tiles a block goes through, one after another: their tensor is searched for once.
constexpr int kUpdateSpan = 4;

// Blocks a multiprocessor: 80 registers a thread do but for 32 normals at once.
constexpr int blocks_of(int columns, Distribution kind) {
  return columns == 4 || kind == Distribution::rademacher ? 3 : 2;
}

template <DType T, int V>
ZK_DEVICE void round_nearest(float acc[4][V]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) acc[j][i] = nearest<T>(acc[j][i]);
  }
}

// The rounding bits of a unit: the low half of near[j][i] is quarter 2 j, column i, the high half
// quarter 2 j + 1; far[j][i] is column i + V / 2. The two groups of a pair share their words and
// stand eight lanes apart: each of the two threads draws half of them and sends the other its
// halves.
template <int V>
struct RoundingBits {
  uint32_t near[2][V / 2], far[2][V / 2];

  ZK_DEVICE RoundingBits(const RowState& s, const Unit& u) {
    constexpr uint32_t low_halves = 0x5410u, high_halves = 0x7632u;
    const bool odd = (u.group & 1u) != 0;
    const uint32_t keep = odd ? high_halves : low_halves, send = odd ? low_halves : high_halves;
    ZK_UNROLL
    for (int i = 0; i < V / 2; ++i) {
      const auto drawn = static_cast<uint32_t>(odd ? i + V / 2 : i);
      const PhiloxWords w = rounding_words(s, u.group, u.l + drawn);
      ZK_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint32_t mine = dev::bytes_of(w.w[2 * j], w.w[2 * j + 1], keep);
        const uint32_t got =
            dev::shuffle_xor(dev::bytes_of(w.w[2 * j], w.w[2 * j + 1], send), 64 / V);
        near[j][i] = odd ? got : mine;
        far[j][i] = odd ? mine : got;
      }
    }
  }

  ZK_DEVICE uint32_t pair(int j, int i) const { return i < V / 2 ? near[j][i] : far[j][i - V / 2]; }
};

// The sums whose upper halves are the values rounded to bfloat16. A NaN out of an fma has all of
// its payload's bits set and would carry into the sign.
template <int V>
ZK_DEVICE void add_rounding_bits(const RoundingBits<V>& bits, float acc[4][V]) {
  bool nan = false;
  ZK_UNROLL
  for (int j = 0; j < 4; j += 2) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) nan |= dev::either_nan(acc[j][i], acc[j + 1][i]);
  }
  if (nan) {
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      ZK_UNROLL
      for (int i = 0; i < V; ++i)
        if (is_nan(acc[j][i])) acc[j][i] = bits_float(0x7FC00000u);
    }
  }
  ZK_UNROLL
  for (int j = 0; j < 4; j += 2) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) {
      const uint32_t r = bits.pair(j / 2, i);
      acc[j][i] = bits_float(float_bits(acc[j][i]) + (r & 0xFFFFu));
      acc[j + 1][i] = bits_float(dev::add_upper_half(float_bits(acc[j + 1][i]), r));
    }
  }
}

template <int V>
ZK_DEVICE void round_stochastic_f16(const RoundingBits<V>& bits, float acc[4][V]) {
  ZK_UNROLL
  for (int j = 0; j < 4; j += 2) {
    ZK_UNROLL
    for (int i = 0; i < V; ++i) {
      const uint32_t r = bits.pair(j / 2, i);
      acc[j][i] = stochastic<DType::f16>(acc[j][i], r & 0xFFFFu);
      acc[j + 1][i] = stochastic<DType::f16>(acc[j + 1][i], r >> 16);
    }
  }
}

// Every thread stays to the end: the shuffles take whole warps.
template <int V, Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, blocks_of(V, kind)) update_kernel(const UpdateArgs a) {
  int entry = entry_of(a.table, dev::block_x() * kUpdateSpan);
  ZK_NO_UNROLL
  for (int s = 0; s < kUpdateSpan; ++s) {
    const int64_t tile = dev::block_x() * kUpdateSpan + s;
    if (tile >= a.table.tiles) return;
    if (s > 0) entry = entry_after(a.table, tile, entry);
    const Entry& e = a.table.entries[entry];
    const uint32_t param_id = e.place.param_id;
    const int64_t index = (tile - e.first_tile) * kThreads + dev::thread();
    Unit u = unit_at<V>(index, e.cut, e.place.col_offset);
    // A thread past the last row has no columns.
    if (u.row >= e.m.rows) u.col = e.m.cols;
    const bool bf16 = e.m.dtype == DType::bf16;
    const uint32_t noise_row = e.place.row_offset + static_cast<uint32_t>(u.row);

    float acc[4][V];
    load_unit<V>(e.m, u, acc);
    // The values are the upper halves: set after a stochastic rounding to bfloat16.
    bool halves = false;
    ZK_NO_UNROLL
    for (int64_t k = 0; k < a.terms.count; ++k) {
      const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(a.terms.seeds[k]));
      const float c = a.coeffs[k], decay = a.decay ? a.decay[k] : 1.0f;
      if (halves) cut_low_halves<V>(acc);
      halves = false;
      if (c != 0.0f || decay != 1.0f) {
        if (a.decay) {
          ZK_UNROLL
          for (int j = 0; j < 4; ++j) {
            ZK_UNROLL
            for (int i = 0; i < V; ++i) acc[j][i] = acc[j][i] * decay;
          }
        }
        const Draw<kind> draw(row_state(keys, noise_row, param_id, Stream::direction), u.group,
                              u.l);
        ZK_UNROLL
        for (int i = 0; i < V; ++i) {
          float z[4];
          draw.column(static_cast<uint32_t>(i), z);
          ZK_UNROLL
          for (int j = 0; j < 4; ++j) acc[j][i] = fma32(c, z[j], acc[j][i]);
        }
      }
      const bool ends = !a.ends || a.ends[k] || k == a.terms.count - 1;
      if (!ends) continue;
      if constexpr (V == 8) {
        if (a.stochastic) {
          const RoundingBits<V> bits(row_state(keys, noise_row, param_id, Stream::update_rounding),
                                     u);
          if (bf16)
            add_rounding_bits(bits, acc);
          else
            round_stochastic_f16(bits, acc);
          halves = bf16;
        } else if (bf16) {
          round_nearest<DType::bf16, V>(acc);
        } else {
          round_nearest<DType::f16, V>(acc);
        }
      }
    }
    // The matrix is read again instead of held in registers.
    dev::forget();
    store_unit<V>(e.m, u, acc, halves);
  }
}

// Adds x to the exact sum hi + lo (Knuth's two-sum; lo's own roundings are of second order).
ZK_DEVICE void add_exactly(float x, float& hi, float& lo) {
  const float sum = hi + x;
  const float back = sum - hi;
  lo += (hi - (sum - back)) + (x - back);
  hi = sum;
}

// The sum over a block, in thread 0, in an order that depends on nothing.
ZK_DEVICE double block_sum(double x) {
  ZK_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += dev::shuffle_xor(x, mask);
  auto* warps = reinterpret_cast<double*>(dev::shared());
  if (dev::thread() % 32 == 0) warps[dev::thread() / 32] = x;
  dev::barrier();
  double total = 0.0;
  if (dev::thread() == 0)
    for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
  dev::barrier();
  return total;
}

constexpr int kProjectSpan = 16;

// A block's tiles are the same on every device, so its sum is too. Seeds go outside, so that there
// is one reduction a seed; the vector comes from the cache again for every further seed.
template <int V, Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, blocks_of(V, kind)) project_kernel(const ProjectArgs a) {
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.terms.count; ++k) {
    const auto seed = static_cast<uint64_t>(a.terms.seeds[k]);
    double total = 0.0;
    int entry = entry_of(a.table, dev::block_x() * kProjectSpan);
    ZK_NO_UNROLL
    for (int s = 0; s < kProjectSpan; ++s) {
      const int64_t tile = dev::block_x() * kProjectSpan + s;
      if (tile >= a.table.tiles) break;
      if (s > 0) entry = entry_after(a.table, tile, entry);
      const Entry& e = a.table.entries[entry];
      const Matrix m = e.m;
      const Place place = e.place;
      const int64_t index = (tile - e.first_tile) * kThreads + dev::thread();
      const Unit u = unit_at<V>(index, e.cut, place.col_offset);
      if (u.row >= m.rows) continue;
      float v[4][V];
      load_unit<V>(m, u, v);
      const Draw<kind> draw(row_state(seed, place.row_offset + static_cast<uint32_t>(u.row),
                                      place.param_id, Stream::direction),
                            u.group, u.l);
      float hi = 0.0f, lo = 0.0f;
      ZK_UNROLL
      for (int i = 0; i < V; ++i) {
        float z[4];
        draw.column(static_cast<uint32_t>(i), z);
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float product = v[j][i] * z[j];
          lo += fma32(v[j][i], z[j], -product);
          add_exactly(product, hi, lo);
        }
      }
      total += static_cast<double>(hi) + static_cast<double>(lo);
    }
    const double sum = block_sum(total);
    if (dev::thread() == 0) a.partial[dev::block_x() * a.terms.count + k] = sum;
  }
}

ZK_KERNEL void ZK_BOUNDS(kThreads, 1)
    project_sum_kernel(const double* partial, int64_t blocks, int64_t terms, float* out) {
  double total = 0.0;
  for (int64_t b = dev::thread(); b < blocks; b += kThreads)
    total += partial[b * terms + dev::block_x()];
  const double sum = block_sum(total);
  if (dev::thread() == 0) out[dev::block_x()] = static_cast<float>(sum);
}

struct EntryChunk {
  Entry entries[kEntriesALaunch];
};
// With the other arguments: what every driver takes.
static_assert(sizeof(EntryChunk) + 16 <= 4096);

ZK_KERNEL void fill_table_kernel(const EntryChunk chunk, int count, Entry* to) {
  for (int i = dev::thread(); i < count; i += 32) to[i] = chunk.entries[i];
}

}  // namespace

const char* fill_table(const Entry* host, int count, Entry* device, void* stream) {
  for (int at = 0; at < count; at += kEntriesALaunch) {
    const int n = count - at < kEntriesALaunch ? count - at : kEntriesALaunch;
    EntryChunk chunk;
    for (int i = 0; i < n; ++i) chunk.entries[i] = host[at + i];
    if (const char* error =
            launch(fill_table_kernel, 1, 1, 1, 32, 0, stream, chunk, n, device + at))
      return error;
  }
  return nullptr;
}

const char* displace(const DisplaceArgs& a, void* stream) {
  const bool wide = a.out_dtype == DType::f32 || (a.w.data && a.w.dtype == DType::f32);
  const int64_t tiles = tiles_of(a.out_rows, a.cut, wide ? 4 : 8);
  if (tiles == 0 || a.branches == 0) return nullptr;
  const int64_t ys = a.own_ids ? a.branches : (a.branches + 1) / 2;
  const bool normal = a.distribution == Distribution::gaussian;
  const auto kernel = wide     ? normal ? displace_kernel<4, Distribution::gaussian>
                                        : displace_kernel<4, Distribution::rademacher>
                      : normal ? displace_kernel<8, Distribution::gaussian>
                               : displace_kernel<8, Distribution::rademacher>;
  return launch(kernel, tiles, ys, 1, kThreads, 0, stream, a);
}

const char* update(const UpdateArgs& a, int columns, void* stream) {
  if (a.table.tiles == 0 || a.terms.count == 0) return nullptr;
  const bool normal = a.distribution == Distribution::gaussian;
  const auto kernel = columns == 4 ? normal ? update_kernel<4, Distribution::gaussian>
                                            : update_kernel<4, Distribution::rademacher>
                      : normal     ? update_kernel<8, Distribution::gaussian>
                                   : update_kernel<8, Distribution::rademacher>;
  const int64_t blocks = (a.table.tiles + kUpdateSpan - 1) / kUpdateSpan;
  return launch(kernel, blocks, 1, 1, kThreads, 0, stream, a);
}

int64_t project_blocks(int64_t tiles) { return (tiles + kProjectSpan - 1) / kProjectSpan; }

const char* project(const ProjectArgs& a, int columns, void* stream) {
  if (a.table.tiles == 0 || a.terms.count == 0) return nullptr;
  const bool normal = a.distribution == Distribution::gaussian;
  const auto kernel = columns == 4 ? normal ? project_kernel<4, Distribution::gaussian>
                                            : project_kernel<4, Distribution::rademacher>
                      : normal     ? project_kernel<8, Distribution::gaussian>
                                   : project_kernel<8, Distribution::rademacher>;
  return launch(kernel, project_blocks(a.table.tiles), 1, 1, kThreads, 8 * sizeof(double), stream,
                a);
}

const char* project_sum(const double* partial, int64_t blocks, int64_t terms, float* out,
                        void* stream) {
  if (terms == 0) return nullptr;
  return launch(project_sum_kernel, terms, 1, 1, kThreads, 8 * sizeof(double), stream, partial,
                blocks, terms, out);
}

const char* probe() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  return reason(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(fill_table_kernel)));
#else
  return nullptr;
#endif
}

}  // namespace zk
