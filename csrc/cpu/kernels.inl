// The kernels, once, over simd.h. Included by one translation unit an instruction set.
//
// Walk: a row is cut at global multiples of 256 columns (a group). Inside a group sixteen lanes
// start at column l = 0, 16, 32, 48, and one Philox call gives the noise of columns l + {0, 64,
// 128, 192}: four vectors, called a unit. Everything is computed a unit at a time and stays in
// registers between the load of a weight and the store of its result.

#include <cstddef>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace zk {
namespace {

using Keys = PhiloxKeys;

ZK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ZK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A buffer that lives on the stack while it is small.
template <class T, int kInline>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count <= kInline
                  ? inline_
                  : static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T)))) {}
  ~Buffer() {
    if (data_ != inline_) ::operator delete(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ZK_INLINE T* get() { return data_; }

 private:
  T inline_[kInline];
  T* data_;
};

// Rounds 3 to 10 of eight counters, after philox_row's shortcut through the first two.
struct Words {
  W x0, x1, x2, x3;
};

ZK_INLINE Words philox8(W p, const Keys& keys, const PhiloxRow& row) {
  const W m0 = wide(kPhiloxM0), m1 = wide(kPhiloxM1);
  const W q = multiply(high(p) ^ wide(row.stream_key), m1);
  Words s{high(q) ^ wide(row.q_key), q, p ^ wide(row.row_hi), wide(row.row_lo)};
#pragma GCC unroll 8
  for (int r = 2; r < 10; ++r) {
    const W a = multiply(s.x0, m0), b = multiply(s.x2, m1);
    s.x0 = xor3(high(b), s.x1, wide(keys.k0[r]));
    s.x2 = xor3(high(a), s.x3, wide(keys.k1[r]));
    s.x1 = b;
    s.x3 = a;
  }
  return s;
}

// The four words of counters base .. base + 15.
struct Words16 {
  U w0, w1, w2, w3;
};

ZK_INLINE Words16 philox16(uint32_t base, const Keys& keys, const PhiloxRow& row) {
  const Words e = philox8(products(kPhiloxM0, base, 2), keys, row);
  const Words o = philox8(products(kPhiloxM0, base + 1, 2), keys, row);
  return {interleave(e.x0, o.x0), interleave(e.x1, o.x1), interleave(e.x2, o.x2),
          interleave(e.x3, o.x3)};
}

// numeric.h's box_muller on sixteen lanes.
ZK_INLINE void box_muller16(U a, U b, F& first, F& second) {
  F e, m;
  split(to_float_unsigned(and_or(a, splat(kUniformMask), splat(kUniformHalf))), e, m);
  const F f = m - splat(1.0f);
  F q = splat(kLog[6]);
#pragma GCC unroll 6
  for (int n = 5; n >= 0; --n) q = fma(q, f, splat(kLog[n]));
  const F r = sqrt(fma(e, splat(kMinus2Ln2), f * q));
  const U fixed = and_xor(b, splat(kUniformMask), splat(0x80000000u | kUniformHalf));
  const F s = to_float(fixed) * splat(0x1p-32f);
  const F t = s * s;
  F cosine = splat(kCos[3]), sine = splat(kSin[3]);
#pragma GCC unroll 3
  for (int n = 2; n >= 0; --n) {
    cosine = fma(cosine, t, splat(kCos[n]));
    sine = fma(sine, t, splat(kSin[n]));
  }
  sine = sine * s;
  const F signed_r = flip_sign_by_bit<1>(r, b);
  first = signed_r * select_by_bit<0>(b, sine, cosine);
  second = signed_r * select_by_bit<0>(b, cosine, sine);
}

// Columns a Rademacher panel covers: sixteen counters, so sixteen words in each of four arrays.
constexpr int64_t kPanel = 2048;
constexpr int kPanelWords = 64;

#if defined(ZK_AVX512) || defined(ZK_AVX2)
#define ZK_HOT ZK_INLINE
#else
#define ZK_HOT __attribute__((noinline))  // one copy: a vector is a loop there
#endif

// The noise of one row under every term. `row` computes what a row fixes; `panel` what a panel of
// columns fixes (the sign bits of Rademacher). A unit is drawn, which gives its random words, and
// finished, which makes four vectors of z of them: several draws before the first finish keep more
// independent work in flight than a core finds by itself (a third faster).
template <Distribution kind>
struct Noise {
  const Keys* keys;
  int64_t terms;
  PhiloxRow* rows;  // [terms]
  uint32_t* signs;  // [terms, kPanelWords], Rademacher only

  struct Signs {
    const unsigned char* low;
  };
  using Draw = std::conditional_t<kind == Distribution::gaussian, Words16, Signs>;

  ZK_INLINE void row(uint32_t r, uint32_t param_id) {
    for (int64_t k = 0; k < terms; ++k)
      rows[k] = philox_row(keys[k], r, param_id, Stream::direction);
  }

  // Global columns [begin, end) of the panel that starts at global column `start`.
  ZK_INLINE void panel(uint64_t start, uint64_t end) {
    if constexpr (kind == Distribution::rademacher) {
      const auto first = static_cast<uint32_t>(start / kRademacherBlock);
      const bool both = end - start > 8 * kRademacherBlock;
      for (int64_t k = 0; k < terms; ++k) {
        uint32_t* out = signs + k * kPanelWords;
        for (uint32_t half = 0; half < (both ? 2u : 1u); ++half) {
          const Words s = philox8(products(kPhiloxM0, first + 8 * half, 1), keys[k], rows[k]);
          store_words(out + 8 * half, s.x0);
          store_words(out + 16 + 8 * half, s.x1);
          store_words(out + 32 + 8 * half, s.x2);
          store_words(out + 48 + 8 * half, s.x3);
        }
      }
    }
  }

  // The random words of columns group * 256 + l + {0, 64, 128, 192}.
  ZK_HOT Draw draw(int64_t k, uint64_t group, int l) const {
    if constexpr (kind == Distribution::gaussian) {
      return philox16(static_cast<uint32_t>(group * 64) + static_cast<uint32_t>(l), keys[k],
                      rows[k]);
    } else {
      const auto* words = reinterpret_cast<const unsigned char*>(signs + k * kPanelWords);
      const int column = static_cast<int>(group % (kPanel / kGaussianGroup)) * 256 + l;
      // Bit c of the row's sign string: word c % 128 / 32 of counter c / 128; here l < 64.
      return {words + column / 128 * 4 + l / 32 * 64 + l % 32 / 8};
    }
  }

  // z of those columns. `upper` false: the last two are not needed and are zero.
  ZK_HOT void finish(const Draw& d, F z[4], bool upper = true) const {
    if (!upper) z[2] = z[3] = splat(0.0f);
    if constexpr (kind == Distribution::gaussian) {
      box_muller16(d.w0, d.w1, z[0], z[1]);
      if (upper) box_muller16(d.w2, d.w3, z[2], z[3]);
    } else {
      z[0] = flip_signs(splat(1.0f), d.low);
      z[1] = flip_signs(splat(1.0f), d.low + 128);
      if (upper) {
        z[2] = flip_signs(splat(1.0f), d.low + 4);
        z[3] = flip_signs(splat(1.0f), d.low + 132);
      }
    }
  }

  // Both, out of line: for the ends of rows.
  __attribute__((noinline)) void unit(int64_t k, uint64_t group, int l, bool upper, F* z) const {
    finish(draw(k, group, l), z, upper);
  }

  // fn(l, z) for the four units of a group under the first term.
  template <class Fn>
  ZK_INLINE void for_group(uint64_t group, Fn fn) const {
    Draw d[4];
#pragma GCC unroll 1
    for (int u = 0; u < 4; ++u) d[u] = draw(0, group, u * kLanes);
#pragma GCC unroll 1
    for (int u = 0; u < 4; ++u) {
      F z[4];
      finish(d[u], z);
      fn(u * kLanes, z);
    }
  }

  // fn(k, z) for every term of a unit, in order.
  template <class Fn>
  ZK_INLINE void for_terms(uint64_t group, int l, Fn fn) const {
    F z[4];
    int64_t k = 0;
    for (; k + 1 < terms; k += 2) {
      const Draw a = draw(k, group, l), b = draw(k + 1, group, l);
      finish(a, z);
      fn(k, z);
      finish(b, z);
      fn(k + 1, z);
    }
    if (k < terms) {
      finish(draw(k, group, l), z);
      fn(k, z);
    }
  }
};

// Which lanes of a unit's vectors lie in [begin, end): columns relative to the row's first column.
struct Span {
  int64_t column;  // of lane 0 of vector 0
  int64_t begin = 0, end = 0;
  ZK_INLINE int lo(int j) const {
    return static_cast<int>(smaller(larger(begin - column - 64 * j, 0), kLanes));
  }
  ZK_INLINE int hi(int j) const {
    return static_cast<int>(larger(smaller(end - column - 64 * j, kLanes), 0));
  }
  ZK_INLINE bool empty(int j) const { return lo(j) >= hi(j); }
};

template <bool full, class T>
ZK_INLINE void load_unit(const T* p, const Span& s, F v[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const T* q = p + s.column + 64 * j;
    if constexpr (full) {
      v[j] = load(q);
    } else {
      v[j] = s.empty(j) ? splat(0.0f) : load(q, s.lo(j), s.hi(j));
    }
  }
}

template <bool full, class T>
ZK_INLINE void store_unit(T* p, const Span& s, const F v[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    T* q = p + s.column + 64 * j;
    if constexpr (full) {
      store(q, v[j]);
    } else {
      if (!s.empty(j)) store(q, v[j], s.lo(j), s.hi(j));
    }
  }
}

template <bool full, class T>
ZK_INLINE void store_unit_nearest(T* p, const Span& s, const F v[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    T* q = p + s.column + 64 * j;
    if constexpr (full) {
      store_nearest(q, v[j]);
    } else {
      if (!s.empty(j)) store_nearest(q, v[j], s.lo(j), s.hi(j));
    }
  }
}

// Walks a row's global columns [start, end): whole(group, column) for groups of 256 columns that
// lie inside, part(group, l, upper, span) for the units of others; `panel` is told before each
// panel. Columns are relative to `start`.
template <class PanelFn, class WholeFn, class PartFn>
ZK_INLINE void for_units(uint64_t start, uint64_t end, PanelFn panel, WholeFn whole, PartFn part) {
  const auto length = static_cast<int64_t>(end - start);
  for (uint64_t p = start / kPanel * kPanel; p < end; p += kPanel) {
    const uint64_t panel_end = end < p + kPanel ? end : p + kPanel;
    panel(p, panel_end);
    for (uint64_t g = (p < start ? start : p) / 256; g * 256 < panel_end; ++g) {
      const int64_t column = static_cast<int64_t>(g * 256 - start);
      if (column >= 0 && column + 256 <= length) {
        whole(g, column);
        continue;
      }
#pragma GCC unroll 1
      for (int l = 0; l < 64; l += kLanes) {
        const Span s{column + l, 0, length};
        const bool upper = !s.empty(2) || !s.empty(3);
        if (upper || !s.empty(0) || !s.empty(1)) part(g, l, upper, s);
      }
    }
  }
}

ZK_INLINE int64_t row_start(const MatrixView& m, int64_t row) {
  if (m.leading <= 1) return m.leading ? row * m.strides[0] : 0;
  int64_t offset = 0;
  for (int d = m.leading - 1; d >= 0; --d) {
    offset += row % m.sizes[d] * m.strides[d];
    row /= m.sizes[d];
  }
  return offset;
}

// Rows whose columns are not adjacent in memory go through a contiguous block. Rows vary fastest in
// the copies, which is the fast direction of a transposed matrix.
constexpr int64_t kStageRows = 16;
constexpr int64_t kStageCols = 512;

template <bool gather, class T>
void copy_block(const MatrixView& m, int64_t row, int64_t rows, int64_t col, int64_t cols,
                T* block) {
  int64_t starts[kStageRows];
  for (int64_t r = 0; r < rows; ++r) starts[r] = row_start(m, row + r);
  T* base = reinterpret_cast<T*>(m.data) + col * m.col_stride;
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      T& strided = base[starts[r] + c * m.col_stride];
      if constexpr (gather)
        block[r * kStageCols + c] = strided;
      else
        strided = block[r * kStageCols + c];
    }
}

// Calls fn(row, column, pointer to contiguous weights, count) for every row of a region, in pieces
// of columns when the matrix is strided. `write` copies the pieces back.
template <bool write, class T, class Fn>
ZK_INLINE void for_rows(const MatrixView& m, const Region& region, uint64_t col_offset, Fn fn) {
  if (m.col_stride == 1) {
    for (int64_t r = region.row_begin; r < region.row_end; ++r)
      fn(r, region.col_begin, reinterpret_cast<T*>(m.data) + row_start(m, r) + region.col_begin,
         region.col_end - region.col_begin);
    return;
  }
  T block[kStageRows * kStageCols];
  for (int64_t r = region.row_begin; r < region.row_end; r += kStageRows) {
    const int64_t rows = smaller(kStageRows, region.row_end - r);
    for (int64_t c = region.col_begin; c < region.col_end;) {
      const int64_t ahead =
          kStageCols - static_cast<int64_t>((col_offset + static_cast<uint64_t>(c)) % kStageCols);
      const int64_t cols = smaller(ahead, region.col_end - c);
      copy_block<true>(m, r, rows, c, cols, block);
      for (int64_t i = 0; i < rows; ++i) fn(r + i, c, block + i * kStageCols, cols);
      if constexpr (write) copy_block<false>(m, r, rows, c, cols, block);
      c += cols;
    }
  }
}

template <Distribution kind>
struct NoiseStorage {
  explicit NoiseStorage(const Terms& terms)
      : rows(terms.count),
        signs(kind == Distribution::rademacher ? terms.count * kPanelWords : 0),
        noise{terms.keys, terms.count, rows.get(), signs.get()} {}
  Buffer<PhiloxRow, 8> rows;
  Buffer<uint32_t, kind == Distribution::rademacher ? 4 * kPanelWords : 1> signs;
  Noise<kind> noise;
};

// ---- sample ----

template <Distribution kind>
void sample_region(const Place& place, const Keys& keys, Region region, float* out,
                   int64_t out_stride) {
  NoiseStorage<kind> storage(Terms{&keys, 1});
  Noise<kind>& noise = storage.noise;
  const uint64_t start = place.col_offset + static_cast<uint64_t>(region.col_begin);
  const uint64_t end = place.col_offset + static_cast<uint64_t>(region.col_end);
  for (int64_t r = region.row_begin; r < region.row_end; ++r, out += out_stride) {
    noise.row(static_cast<uint32_t>(place.row_offset + static_cast<uint64_t>(r)), place.param_id);
    for_units(
        start, end, [&](uint64_t a, uint64_t b) { noise.panel(a, b); },
        [&](uint64_t group, int64_t column) {
          noise.for_group(group,
                          [&](int l, const F* z) { store_unit<true>(out, Span{column + l}, z); });
        },
        [&](uint64_t group, int l, bool upper, const Span& span) {
          F z[4];
          noise.unit(0, group, l, upper, z);
          store_unit<false>(out, span, z);
        });
  }
}

void sample(const Place& place, const Keys& keys, Region region, float* out, int64_t out_stride) {
  if (place.distribution == Distribution::gaussian)
    sample_region<Distribution::gaussian>(place, keys, region, out, out_stride);
  else
    sample_region<Distribution::rademacher>(place, keys, region, out, out_stride);
}

// ---- displace ----

// The sixteen-bit halves of a unit's rounding words: low for even groups, high for odd ones.
ZK_INLINE void rounding_unit(const Words16& w, bool odd, U r16[4]) {
  const U low = splat(0xFFFFu);
  r16[0] = odd ? shr<16>(w.w0) : w.w0 & low;
  r16[1] = odd ? shr<16>(w.w1) : w.w1 & low;
  r16[2] = odd ? shr<16>(w.w2) : w.w2 & low;
  r16[3] = odd ? shr<16>(w.w3) : w.w3 & low;
}

// One unit of displaced weights under any number of terms, to nearest or stochastically.
template <bool full, class In, class Out, Distribution kind>
__attribute__((noinline)) void displace_unit(const DisplaceArgs& a, const Noise<kind>& noise,
                                             const PhiloxRow* rounding_row, uint64_t group, int l,
                                             bool upper, const Span& span, const In* w, Out* out,
                                             int64_t branch_stride, float* acc) {
  const int64_t terms = a.terms.count;
  F v[4], z[4];
  load_unit<full>(w, span, v);
  for (int64_t g = 0; g < a.branches; ++g)
    for (int j = 0; j < 4; ++j) store(acc + g * 64 + j * kLanes, v[j]);
  for (int64_t k = 0; k < terms; ++k) {
    noise.unit(k, group, l, upper, z);
    for (int64_t g = 0; g < a.branches; ++g) {
      const F c = splat(a.coeffs[g * terms + k]);
      for (int j = 0; j < 4; ++j) {
        float* p = acc + g * 64 + j * kLanes;
        store(p, fma(c, z[j], load(p)));
      }
    }
  }
  U r16[4];
  if (rounding_row)
    rounding_unit(philox16(static_cast<uint32_t>(group / 2 * 64) + static_cast<uint32_t>(l),
                           a.terms.keys[0], *rounding_row),
                  group % 2 != 0, r16);
  for (int64_t g = 0; g < a.branches; ++g) {
    for (int j = 0; j < 4; ++j) {
      v[j] = load(acc + g * 64 + j * kLanes);
      if (sizeof(In) != sizeof(Out) && a.round_to_input) v[j] = quantize(v[j], In{});
      if (rounding_row) v[j] = quantize(v[j], r16[j], Out{});
    }
    store_unit_nearest<full>(out + g * branch_stride, span, v);
  }
}

template <Distribution kind, class In, class Out>
void displace_region(const DisplaceArgs& a, Region region, Out* out, int64_t row_stride,
                     int64_t branch_stride) {
  NoiseStorage<kind> storage(a.terms);
  Noise<kind>& noise = storage.noise;
  Buffer<float, 4 * 64> acc(a.branches * 64);
  const int64_t branches = a.branches;
  const bool stochastic = a.rounding == Rounding::stochastic && a.terms.count > 0;
  const bool hot = a.terms.count == 1 && !stochastic;
  PhiloxRow rounding_row{};
  for_rows<false, In>(
      a.w, region, a.place.col_offset, [&](int64_t r, int64_t c, const In* w, int64_t cols) {
        const auto row = static_cast<uint32_t>(a.place.row_offset + static_cast<uint64_t>(r));
        noise.row(row, a.place.param_id);
        if (stochastic)
          rounding_row = philox_row(a.terms.keys[0], row, a.place.param_id, Stream::probe_rounding);
        Out* o = out + (r - region.row_begin) * row_stride + (c - region.col_begin);
        const uint64_t start = a.place.col_offset + static_cast<uint64_t>(c);
        for_units(
            start, start + static_cast<uint64_t>(cols),
            [&](uint64_t p, uint64_t q) { noise.panel(p, q); },
            [&](uint64_t group, int64_t column) {
              if (!hot) {
                for (int l = 0; l < 64; l += kLanes)
                  displace_unit<true>(a, noise, stochastic ? &rounding_row : nullptr, group, l,
                                      true, Span{column + l}, w, o, branch_stride, acc.get());
                return;
              }
              noise.for_group(group, [&](int l, const F* z) {
                const Span span{column + l};
                F v[4];
                load_unit<true>(w, span, v);
                for (int64_t g = 0; g < branches; ++g) {
                  const F c1 = splat(a.coeffs[g]);
                  F y[4];
#pragma GCC unroll 4
                  for (int j = 0; j < 4; ++j) y[j] = fma(c1, z[j], v[j]);
                  if constexpr (sizeof(In) != sizeof(Out)) {
                    if (a.round_to_input)
                      for (int j = 0; j < 4; ++j) y[j] = quantize(y[j], In{});
                  }
                  store_unit_nearest<true>(o + g * branch_stride, span, y);
                }
              });
            },
            [&](uint64_t group, int l, bool upper, const Span& span) {
              displace_unit<false>(a, noise, stochastic ? &rounding_row : nullptr, group, l, upper,
                                   span, w, o, branch_stride, acc.get());
            });
      });
}

template <Distribution kind, class In>
void displace_out(const DisplaceArgs& a, Region region, void* out, int64_t row_stride,
                  int64_t branch_stride) {
  switch (a.out_dtype) {
    case DType::f32:
      return displace_region<kind, In>(a, region, static_cast<float*>(out), row_stride,
                                       branch_stride);
    case DType::bf16:
      return displace_region<kind, In>(a, region, static_cast<Bf16*>(out), row_stride,
                                       branch_stride);
    case DType::f16:
      return displace_region<kind, In>(a, region, static_cast<Fp16*>(out), row_stride,
                                       branch_stride);
  }
}

template <Distribution kind>
void displace_in(const DisplaceArgs& a, Region region, void* out, int64_t row_stride,
                 int64_t branch_stride) {
  switch (a.w.dtype) {
    case DType::f32:
      return displace_out<kind, float>(a, region, out, row_stride, branch_stride);
    case DType::bf16:
      return displace_out<kind, Bf16>(a, region, out, row_stride, branch_stride);
    case DType::f16:
      return displace_out<kind, Fp16>(a, region, out, row_stride, branch_stride);
  }
}

void displace(const DisplaceArgs& a, Region region, void* out, int64_t row_stride,
              int64_t branch_stride) {
  if (a.place.distribution == Distribution::gaussian)
    displace_in<Distribution::gaussian>(a, region, out, row_stride, branch_stride);
  else
    displace_in<Distribution::rademacher>(a, region, out, row_stride, branch_stride);
}

// ---- update ----

template <Distribution kind, class T>
struct Updater {
  const UpdateArgs& a;
  Noise<kind>& noise;
  const PhiloxRow* rounding_rows;
  using Draw = typename Noise<kind>::Draw;

  // A term of coefficient 0 and decay 1 is left out: it could turn -0 into +0.
  ZK_INLINE void add(int64_t k, const F z[4], F acc[4]) const {
    const F c = splat(a.coeffs[k]);
    if (a.decay) {
      if (a.coeffs[k] == 0.0f && a.decay[k] == 1.0f) return;
      const F d = splat(a.decay[k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j] = acc[j] * d;
    } else if (a.coeffs[k] == 0.0f) {
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] = fma(c, z[j], acc[j]);
  }

  ZK_INLINE bool ends(int64_t k) const { return !a.ends || a.ends[k]; }

  // Between terms; the last one is rounded by the store.
  ZK_INLINE void round_term(int64_t k, F acc[4]) const {
    if (sizeof(T) == 2 && k + 1 < a.terms.count && ends(k)) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j] = quantize(acc[j], T{});
    }
  }

  ZK_INLINE void nearest(T* w, uint64_t start, uint64_t end) const {
    for_units(
        start, end, [&](uint64_t p, uint64_t q) { noise.panel(p, q); },
        [&](uint64_t group, int64_t column) {
          F acc[4];
          if (a.terms.count == 1) {
            noise.for_group(group, [&](int l, const F* z) {
              load_unit<true>(w, Span{column + l}, acc);
              this->add(0, z, acc);
              store_unit_nearest<true>(w, Span{column + l}, acc);
            });
            return;
          }
#pragma GCC unroll 1
          for (int l = 0; l < 64; l += kLanes) {
            load_unit<true>(w, Span{column + l}, acc);
            noise.for_terms(group, l, [&](int64_t k, const F* z) {
              this->add(k, z, acc);
              this->round_term(k, acc);
            });
            store_unit_nearest<true>(w, Span{column + l}, acc);
          }
        },
        [&](uint64_t group, int l, bool upper, const Span& span) {
          F acc[4], z[4];
          load_unit<false>(w, span, acc);
          for (int64_t k = 0; k < a.terms.count; ++k) {
            noise.unit(k, group, l, upper, z);
            this->add(k, z, acc);
            this->round_term(k, acc);
          }
          store_unit_nearest<false>(w, span, acc);
        });
  }

  ZK_INLINE Words16 rounding_words(int64_t k, uint64_t index, int l) const {
    return philox16(static_cast<uint32_t>(index * 64) + static_cast<uint32_t>(l), a.terms.keys[k],
                    rounding_rows[k]);
  }

  ZK_INLINE void round(const Words16& words, bool odd, F acc[4]) const {
    U r16[4];
    rounding_unit(words, odd, r16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] = quantize(acc[j], r16[j], T{});
  }

  // One rounding draw serves two neighbouring groups, so they are done together: here one term and
  // a whole even group, with a whole odd group or none.
  template <bool odd>
  ZK_INLINE void single(T* w, uint64_t index, int64_t column) const {
    Draw even_draws[4], odd_draws[4];
    Words16 words[4];
#pragma GCC unroll 1
    for (int u = 0; u < 4; ++u) {
      even_draws[u] = noise.draw(0, 2 * index, u * kLanes);
      if constexpr (odd) odd_draws[u] = noise.draw(0, 2 * index + 1, u * kLanes);
      words[u] = rounding_words(0, index, u * kLanes);
    }
#pragma GCC unroll 1
    for (int u = 0; u < 4; ++u) {
      const auto half = [&](const Draw& draw, bool is_odd) {
        const Span span{column + (is_odd ? 256 : 0) + u * kLanes};
        F acc[4], z[4];
        noise.finish(draw, z);
        load_unit<true>(w, span, acc);
        this->add(0, z, acc);
        this->round(words[u], is_odd, acc);
        store_unit<true>(w, span, acc);
      };
      half(even_draws[u], false);
      if constexpr (odd) half(odd_draws[u], true);
    }
  }

  // Any terms; `full`: both groups are whole.
  template <bool full>
  ZK_INLINE void pair(T* w, uint64_t index, int l, const Span& even, const Span& odd) const {
    const bool upper0 = full || !even.empty(2) || !even.empty(3);
    const bool upper1 = full || !odd.empty(2) || !odd.empty(3);
    const bool has0 = upper0 || !even.empty(0) || !even.empty(1);
    const bool has1 = upper1 || !odd.empty(0) || !odd.empty(1);
    if (!has0 && !has1) return;
    F a0[4], a1[4], z[4];
    load_unit<full>(w, even, a0);
    load_unit<full>(w, odd, a1);
    for (int64_t k = 0; k < a.terms.count; ++k) {
      if constexpr (full) {
        const Draw d0 = noise.draw(k, 2 * index, l), d1 = noise.draw(k, 2 * index + 1, l);
        noise.finish(d0, z);
        add(k, z, a0);
        noise.finish(d1, z);
        add(k, z, a1);
      } else {
        if (has0) noise.unit(k, 2 * index, l, upper0, z);
        if (has0) add(k, z, a0);
        if (has1) noise.unit(k, 2 * index + 1, l, upper1, z);
        if (has1) add(k, z, a1);
      }
      if (ends(k)) {
        const Words16 words = rounding_words(k, index, l);
        round(words, false, a0);
        round(words, true, a1);
      }
    }
    store_unit<full>(w, even, a0);
    store_unit<full>(w, odd, a1);
  }

  ZK_INLINE void stochastic(T* w, uint64_t start, uint64_t end) const {
    const auto length = static_cast<int64_t>(end - start);
    uint64_t panel_end = 0;
    for (uint64_t index = start / 512; index * 512 < end; ++index) {
      if (index * 512 >= panel_end) {
        const uint64_t p = index * 512 / kPanel * kPanel;
        panel_end = p + kPanel;
        noise.panel(p, end < panel_end ? end : panel_end);
      }
      const auto column = static_cast<int64_t>(index * 512 - start);
      const bool full = column >= 0 && column + 512 <= length;
      if (full && a.terms.count == 1) {
        single<true>(w, index, column);
        continue;
      }
      if (column >= 0 && column + 256 == length && a.terms.count == 1) {
        single<false>(w, index, column);
        continue;
      }
#pragma GCC unroll 1
      for (int l = 0; l < 64; l += kLanes) {
        const Span even{column + l, 0, length}, odd{column + 256 + l, 0, length};
        if (full)
          pair<true>(w, index, l, even, odd);
        else
          pair<false>(w, index, l, even, odd);
      }
    }
  }
};

template <Distribution kind, class T>
void update_region(const UpdateArgs& a, const MatrixView& w, const Place& place, Region region) {
  NoiseStorage<kind> storage(a.terms);
  const bool stochastic = sizeof(T) == 2 && a.rounding == Rounding::stochastic;
  Buffer<PhiloxRow, 8> rounding_rows(stochastic ? a.terms.count : 0);
  const Updater<kind, T> updater{a, storage.noise, rounding_rows.get()};
  for_rows<true, T>(w, region, place.col_offset, [&](int64_t r, int64_t c, T* p, int64_t cols) {
    const auto row = static_cast<uint32_t>(place.row_offset + static_cast<uint64_t>(r));
    const uint64_t start = place.col_offset + static_cast<uint64_t>(c);
    const uint64_t end = start + static_cast<uint64_t>(cols);
    storage.noise.row(row, place.param_id);
    if constexpr (sizeof(T) == 2) {
      if (stochastic) {
        for (int64_t k = 0; k < a.terms.count; ++k)
          rounding_rows.get()[k] =
              philox_row(a.terms.keys[k], row, place.param_id, Stream::update_rounding);
        updater.stochastic(p, start, end);
        return;
      }
    }
    updater.nearest(p, start, end);
  });
}

template <Distribution kind>
void update_kind(const UpdateArgs& a, const MatrixView& w, const Place& place, Region region) {
  switch (w.dtype) {
    case DType::f32:
      return update_region<kind, float>(a, w, place, region);
    case DType::bf16:
      return update_region<kind, Bf16>(a, w, place, region);
    case DType::f16:
      return update_region<kind, Fp16>(a, w, place, region);
  }
}

void update(const UpdateArgs& a, const MatrixView& w, const Place& place, Region region) {
  if (place.distribution == Distribution::gaussian)
    update_kind<Distribution::gaussian>(a, w, place, region);
  else
    update_kind<Distribution::rademacher>(a, w, place, region);
}

// ---- project ----

template <Distribution kind, class T>
void project_region(const MatrixView& v, const Place& place, const Terms& terms, Region region,
                    double* sums) {
  NoiseStorage<kind> storage(terms);
  Noise<kind>& noise = storage.noise;
  Buffer<double, 8 * kLanes> lanes(terms.count * kLanes);
  for (int64_t i = 0; i < terms.count * kLanes; ++i) lanes.get()[i] = 0.0;
  const auto add = [&](int64_t k, const F* x, const F* z, int count) {
    D sum = load_doubles(lanes.get() + k * kLanes);
    for (int j = 0; j < count; ++j) sum = fma_double(x[j], z[j], sum);
    store_doubles(lanes.get() + k * kLanes, sum);
  };
  for_rows<false, T>(v, region, place.col_offset, [&](int64_t r, int64_t c, const T* p, int64_t n) {
    noise.row(static_cast<uint32_t>(place.row_offset + static_cast<uint64_t>(r)), place.param_id);
    const uint64_t start = place.col_offset + static_cast<uint64_t>(c);
    for_units(
        start, start + static_cast<uint64_t>(n), [&](uint64_t a, uint64_t b) { noise.panel(a, b); },
        [&](uint64_t group, int64_t column) {
#pragma GCC unroll 1
          for (int l = 0; l < 64; l += kLanes) {
            F x[4];
            load_unit<true>(p, Span{column + l}, x);
            noise.for_terms(group, l, [&](int64_t k, const F* z) { add(k, x, z, 4); });
          }
        },
        [&](uint64_t group, int l, bool upper, const Span& span) {
          F x[4], z[4];
          load_unit<false>(p, span, x);
          for (int64_t k = 0; k < terms.count; ++k) {
            noise.unit(k, group, l, upper, z);
            add(k, x, z, upper ? 4 : 2);
          }
        });
  });
  for (int64_t k = 0; k < terms.count; ++k)
    for (int i = 0; i < kLanes; ++i) sums[k] += lanes.get()[k * kLanes + i];
}

template <Distribution kind>
void project_kind(const MatrixView& v, const Place& place, const Terms& terms, Region region,
                  double* sums) {
  switch (v.dtype) {
    case DType::f32:
      return project_region<kind, float>(v, place, terms, region, sums);
    case DType::bf16:
      return project_region<kind, Bf16>(v, place, terms, region, sums);
    case DType::f16:
      return project_region<kind, Fp16>(v, place, terms, region, sums);
  }
}

void project(const MatrixView& v, const Place& place, const Terms& terms, Region region,
             double* sums) {
  if (place.distribution == Distribution::gaussian)
    project_kind<Distribution::gaussian>(v, place, terms, region, sums);
  else
    project_kind<Distribution::rademacher>(v, place, terms, region, sums);
}

// ---- generate ----

template <Distribution kind>
float generate_groups(const Keys& keys, int64_t groups) {
  NoiseStorage<kind> storage(Terms{&keys, 1});
  Noise<kind>& noise = storage.noise;
  F sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int64_t g = 0; g < groups; g += kPanel / 256) {
    noise.row(static_cast<uint32_t>(g), 0);
    for_units(
        0, static_cast<uint64_t>(smaller(kPanel, (groups - g) * 256)),
        [&](uint64_t a, uint64_t b) { noise.panel(a, b); },
        [&](uint64_t group, int64_t) {
          noise.for_group(group, [&](int, const F* z) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[j] = sum[j] + z[j];
          });
        },
        [](uint64_t, int, bool, const Span&) {});
  }
  float lanes[kLanes];
  store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

float generate(Distribution distribution, const Keys& keys, int64_t groups) {
  return distribution == Distribution::gaussian
             ? generate_groups<Distribution::gaussian>(keys, groups)
             : generate_groups<Distribution::rademacher>(keys, groups);
}

// ---- cross-entropy, bias, conversion ----

// exp(x) for x <= 0; NaN stays NaN.
ZK_INLINE F exp16(F x) {
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  x = max(splat(-87.0f), x);
  const F t = fma(x, splat(1.44269504f), shift);
  const F n = t - shift;
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(kExp[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) p = fma(p, r, splat(kExp[i]));
  return p * floats(shl<23>(bits(t) + splat(127u)));
}

template <class T>
void softmax_stats_of(const T* logits, int64_t rows, int64_t cols, int64_t stride, float* top,
                      float* total, int64_t out_stride) {
  const float lowest = bits_float(0xFF800000u);
  for (int64_t r = 0; r < rows; ++r, logits += stride) {
    F best = splat(lowest);
    float lanes[kLanes];
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) best = max(load(logits + c), best);
    store(lanes, best);
    float m = lowest;
    for (int i = 0; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
    const int tail = static_cast<int>(cols - c);
    if (tail) {
      store(lanes, load(logits + c, 0, tail));
      for (int i = 0; i < tail; ++i) m = lanes[i] > m ? lanes[i] : m;
    }
    F sum = splat(0.0f);
    const F origin = splat(m == lowest ? 0.0f : m);
    for (c = 0; c + kLanes <= cols; c += kLanes) sum = sum + exp16(load(logits + c) - origin);
    store(lanes, sum);
    float s = 0.0f;
    for (int i = 0; i < kLanes; ++i) s += lanes[i];
    if (tail) {
      store(lanes, exp16(load(logits + c, 0, tail) - origin));
      for (int i = 0; i < tail; ++i) s += lanes[i];
    }
    top[r * out_stride] = m;
    total[r * out_stride] = s;
  }
}

void softmax_stats(const void* logits, DType dtype, int64_t rows, int64_t cols, int64_t stride,
                   float* top, float* total, int64_t out_stride) {
  switch (dtype) {
    case DType::f32:
      return softmax_stats_of(static_cast<const float*>(logits), rows, cols, stride, top, total,
                              out_stride);
    case DType::bf16:
      return softmax_stats_of(static_cast<const Bf16*>(logits), rows, cols, stride, top, total,
                              out_stride);
    case DType::f16:
      return softmax_stats_of(static_cast<const Fp16*>(logits), rows, cols, stride, top, total,
                              out_stride);
  }
}

template <class T, class B>
void add_bias_of(T* y, int64_t rows, int64_t cols, int64_t stride, const B* bias) {
  for (int64_t r = 0; r < rows; ++r, y += stride) {
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) store_nearest(y + c, load(y + c) + load(bias + c));
    const int tail = static_cast<int>(cols - c);
    if (tail) store_nearest(y + c, load(y + c, 0, tail) + load(bias + c, 0, tail), 0, tail);
  }
}

template <class T>
void add_bias_to(T* y, int64_t rows, int64_t cols, int64_t stride, const void* bias,
                 DType bias_dtype) {
  switch (bias_dtype) {
    case DType::f32:
      return add_bias_of(y, rows, cols, stride, static_cast<const float*>(bias));
    case DType::bf16:
      return add_bias_of(y, rows, cols, stride, static_cast<const Bf16*>(bias));
    case DType::f16:
      return add_bias_of(y, rows, cols, stride, static_cast<const Fp16*>(bias));
  }
}

void add_bias(void* y, DType dtype, int64_t rows, int64_t cols, int64_t stride, const void* bias,
              DType bias_dtype) {
  switch (dtype) {
    case DType::f32:
      return add_bias_to(static_cast<float*>(y), rows, cols, stride, bias, bias_dtype);
    case DType::bf16:
      return add_bias_to(static_cast<Bf16*>(y), rows, cols, stride, bias, bias_dtype);
    case DType::f16:
      return add_bias_to(static_cast<Fp16*>(y), rows, cols, stride, bias, bias_dtype);
  }
}

template <class In, class Out>
void convert_of(const In* in, Out* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_nearest(out + i, load(in + i));
  const int tail = static_cast<int>(count - i);
  if (tail) store_nearest(out + i, load(in + i, 0, tail), 0, tail);
}

template <class In>
void convert_from(const In* in, void* out, DType out_dtype, int64_t count) {
  switch (out_dtype) {
    case DType::f32:
      return convert_of(in, static_cast<float*>(out), count);
    case DType::bf16:
      return convert_of(in, static_cast<Bf16*>(out), count);
    case DType::f16:
      return convert_of(in, static_cast<Fp16*>(out), count);
  }
}

void convert(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t count) {
  switch (in_dtype) {
    case DType::f32:
      return convert_from(static_cast<const float*>(in), out, out_dtype, count);
    case DType::bf16:
      return convert_from(static_cast<const Bf16*>(in), out, out_dtype, count);
    case DType::f16:
      return convert_from(static_cast<const Fp16*>(in), out, out_dtype, count);
  }
}

}  // namespace

#define ZK_KERNEL_TABLE(name, ...) \
  {name, sample, displace, update, project, generate, softmax_stats, add_bias, convert, __VA_ARGS__}

}  // namespace zk
