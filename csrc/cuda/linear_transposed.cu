// linear.cu's product for weights stored [in, out] (GPT-2's Conv1D): y_g = x_g W_g + bias_g,
// W_g = round(W + sum_k C[g,k] z_k), for two branches g at once, 16-bit weights and activations,
// float32 sums. W_g exists in registers only.
//
// The noise follows the stored matrix: one Philox call, a (row, column) of a quarter, gives that
// column in all four quarters of a group of 256, here four outputs of one input. Outputs are the
// rows of mma.m16n8k16's left factor, so that two quarters, eight outputs of each, are the sixteen
// of a product, and the four a thread draws together meet in two products:
//
//   lane = 4 r + q owns column l0 + r of every quarter. Of a slice (32 rows of the weight, that is
//   32 of the product's columns) it owns rows 8 q .. 8 q + 7; four of them at a time (half h) fill
//   a product: its columns 2q, 2q + 1, 2q + 8, 2q + 9 are rows 8q + 4h + {0, 1, 2, 3}. A product
//   sums over its columns in any order, so x is read sixteen adjacent bytes a thread, for both
//   halves. In memory outputs are adjacent, in a fragment two rows of one output: ldmatrix
//   transposes on the way from shared memory, a whole fragment (two quarters) at a time.
//
// Weights come by cp.async, one slice ahead, into memory of the warp's own: a warp barrier a slice
// and none for the block. A warp's eight columns are half of the 32 bytes that memory is read in;
// the warp beside it finds the other half in the first-level cache.
//
// Rademacher: the lanes of a warp need few different calls, two a row; each makes one and sends
// what the others need by shuffles.
//
// Block: 8 warps, 8 / warps_k of them side by side (8 columns of each quarter, 32 outputs), warps_k
// behind each other taking every warps_k-th slice; their sums meet in shared memory and are added
// in order. Grid: outputs, blocks of 8 NT tokens, pairs of branches times parts of the rows; the
// sums of several parts meet in global memory and are added in order, as linear.cu's.
//
// Ceiling, from the machine code for sm_90 with one seed; instructions a weight, with Gaussian and
// with Rademacher noise:
//
//   tokens a branch                                  1 to 8      9 to 32     33 to 64
//   the noise and its two fma                        26 11       26 11       26 11
//   all else                                          8  7        9  8       12 11
//   in all                                           34 18       35 19       38 22
//   cycles of a multiprocessor, at 128 a cycle     0.26 0.14   0.28 0.15   0.30 0.17
//   TB/s of weights, 132 of them at 1.8 GHz         1.8 3.5     1.7 3.2     1.6 2.8
//
// Scratch tiles take 0.39 (0.34) cycles at these sizes (as in linear_sm90.cu, with 27 and 11
// instructions a displaced weight), so this product should win up to 64 tokens. With more it would
// draw the noise again for every 64, 0.60 (0.34) cycles, and the caller multiplies through scratch.
// Up to 8 tokens two blocks share a multiprocessor; from 9 on sums take 64 and 128 registers and
// one block has it for itself: the sixteen normals that a thread draws at a time are independent of
// each other, and eight sums take turns in the products, which has to hide the latencies.
// (Arithmetic, not measurements.)
#include "access.h"
#include "fused.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kSlice = 32;  // rows of the weight, that is inputs, a warp takes at a time
// A slice of a warp: eight columns of each quarter, 32 rows. Quarters lie 32 bytes further apart
// than they are long, so that the copies of eight lanes meet all banks.
constexpr int kQuarterBytes = kSlice * 16 + 32;
constexpr int kTileBytes = 4 * kQuarterBytes;
constexpr int kStageBytes = kWarps * kTileBytes;
constexpr size_t kShared = size_t{2} * kStageBytes;

struct Split {
  int warps_k;
  uint32_t first_group;
  int slices;       // of the matrix
  int slices_each;  // of a part
  int parts;
};

// Of rows `row` + 8 q + {0, 1, 2, 3}, in column l0 + lane / 4 of every quarter: use(i, z) gets the
// four values of row i. Every lane of the warp takes part.
template <Distribution kind, class Use>
ZK_DEVICE void draw_rows(uint64_t seed, uint32_t param_id, uint32_t row, uint32_t group,
                         uint32_t l0, uint32_t lane, const Use& use) {
  const uint32_t r = lane / 4u, q = lane % 4u;
  if constexpr (kind == Distribution::gaussian) {
    uint32_t column = group * 64u + l0 + r;
    dev::opaque(column);
    ZK_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const PhiloxWords w =
          philox_words(row_state(seed, row + 8u * q + i, param_id, Stream::direction), column);
      float z[4];
      normal_pair(w.w[0], w.w[1], z[0], z[1]);
      normal_pair(w.w[2], w.w[3], z[2], z[3]);
      use(i, z);
    }
  } else {
    // Two calls hold the signs of a row's group; sixteen rows are a call a lane. Lane 2 i + h draws
    // row 8 (i / 4) + i % 4 in quarters 2 h and 2 h + 1 and keeps the eight columns of the warp.
    const uint32_t h = lane % 2u, shift = l0 % 32u;
    const PhiloxWords w = philox_words(
        row_state(seed, row + lane / 8u * 8u + lane / 2u % 4u, param_id, Stream::direction),
        group * 2u + h);
    const bool upper = l0 >= 32u;
    const uint32_t even = (upper ? w.w[1] : w.w[0]) >> shift & 0xFFu;
    const uint32_t odd = (upper ? w.w[3] : w.w[2]) >> shift & 0xFFu;
    uint32_t mine = (even | odd << 8) << 16u * h;
    mine |= dev::shuffle_xor(mine, 1);
    ZK_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      // Byte j: the signs of quarter j.
      const auto signs = static_cast<uint32_t>(
          dev::from_lane(static_cast<int32_t>(mine), static_cast<int>(8u * q + 2u * i)));
      const uint32_t own = signs << (7u - r);
      float z[4];
      ZK_UNROLL
      for (uint32_t j = 0; j < 4; ++j)
        z[j] = bits_float(0x3F800000u | ((own << (24u - 8u * j)) & 0x80000000u));
      use(i, z);
    }
  }
}

// Both branches' activations of `tiles` eights of tokens from `token` on, in inputs k .. k + 7, the
// branches' from sixteen times start[g] bytes on. A token that is not there reads the last one's,
// and is not stored.
template <bool whole, int tiles>
ZK_DEVICE void load_right(const LinearArgs& a, const uint32_t start[2], uint32_t token, int k,
                          Vec16 right[2][tiles]) {
  const auto inputs = static_cast<uint32_t>(a.w.rows), last = static_cast<uint32_t>(a.tokens) - 1u;
  ZK_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t own = token + static_cast<uint32_t>(tile) * 8u;
    const uint32_t at = (own < last ? own : last) * (inputs / 8u) + static_cast<uint32_t>(k) / 8u;
    ZK_UNROLL
    for (int g = 0; g < 2; ++g)
      right[g][tile] = whole || static_cast<uint32_t>(k) < inputs
                           ? dev::load16(a.x + uint64_t{start[g] + at} * 16u)
                           : Vec16{{0u, 0u, 0u, 0u}};
  }
}

template <DType T, Distribution kind, int NT>
ZK_KERNEL void ZK_BOUNDS(kThreads, NT == 1 ? 2 : 1)
    linear_transposed_kernel(const LinearArgs a, const Split split, float* partial) {
  // Eights of tokens whose activations are in registers at a time.
  constexpr int tiles = NT < 2 ? NT : 2;
  const int warp = dev::thread() / 32, lane = dev::thread() % 32, q = lane % 4, r = lane / 4;
  const int wide = kWarps / split.warps_k;
  const int warp_n = warp % wide, warp_k = warp / wide;
  const auto block = static_cast<uint32_t>(dev::block_x());
  const uint32_t of_group = block % static_cast<uint32_t>(split.warps_k);
  const auto panel = static_cast<int>(block / static_cast<uint32_t>(split.warps_k));
  const int outputs = static_cast<int>(a.w.cols), inputs = static_cast<int>(a.w.rows);
  if (panel * 256 + static_cast<int>(of_group) * wide * 8 >= outputs) return;
  const uint32_t group = split.first_group + static_cast<uint32_t>(panel);
  const uint32_t l0 = (of_group * static_cast<uint32_t>(wide) + static_cast<uint32_t>(warp_n)) * 8u;
  const int n0 = panel * 256 + static_cast<int>(l0);  // of quarter 0
  const int tokens = static_cast<int>(a.tokens);
  const int token0 = static_cast<int>(dev::block_y()) * (8 * NT);
  const auto part = static_cast<uint32_t>(dev::block_z()) % static_cast<uint32_t>(split.parts);
  const int64_t first =
      static_cast<uint32_t>(dev::block_z()) / static_cast<uint32_t>(split.parts) * 2;
  const int begin = static_cast<int>(part) * split.slices_each;
  const int end =
      begin + split.slices_each < split.slices ? begin + split.slices_each : split.slices;
  const bool two = first + 1 < a.branches;
  char* const tile = dev::shared() + warp * kTileBytes;

  // Row 8 q + 4 h + 2 s + b of a slice lies at 16 h + 8 s + 2 q + b: eight rows of a fragment are
  // adjacent. Lane 4 e + j copies rows e, e + 8, e + 16, e + 24 of quarter j.
  const int e = lane / 4;
  char* const to = tile + q * kQuarterBytes + (e / 2 * 8 + e % 2) * 16;
  const bool copies = n0 + 64 * q < outputs;
  // Places of this lane's part of the weight and of the branches in x, in units of sixteen bytes.
  const auto stride = static_cast<uint32_t>(a.w.row_stride / 8);
  uint32_t source = static_cast<uint32_t>((n0 + 64 * q) / 8) + static_cast<uint32_t>(e) * stride;
  uint32_t start[2];
  dev::opaque(source);
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    start[g] = static_cast<uint32_t>((first + (two ? g : 0)) * a.x_branch_stride / 8);
    dev::opaque(start[g]);
  }
  const auto is_whole = [&](int slice) { return slice * kSlice + kSlice <= inputs; };
  const auto fetch = [&](int slice, int slot) {
    uint32_t at = source + static_cast<uint32_t>(slice * kSlice) * stride;
    const auto copy = [&](int v, bool valid) {
      dev::copy16_near(to + slot * kStageBytes + v * 32, a.w.data + uint64_t{at} * 16u, valid);
      at += stride * 8u;
    };
    if (is_whole(slice)) {
      ZK_UNROLL
      for (int v = 0; v < 4; ++v) copy(v, copies);
    } else {
      ZK_UNROLL
      for (int v = 0; v < 4; ++v) copy(v, copies && slice * kSlice + v * 8 + e < inputs);
    }
  };
  // Lanes 8 m + i point at row i of matrix m: of quarter m % 2, rows 8 (m / 2) on.
  const char* const from = tile + lane / 8 % 2 * kQuarterBytes + lane / 16 * 128 + lane % 8 * 16;

  float sum[2][2][NT][4];  // branch, pair of quarters, tokens
  ZK_UNROLL
  for (int i = 0; i < 16 * NT; ++i) sum[i / (8 * NT)][i / (4 * NT) % 2][i / 4 % NT][i % 4] = 0.0f;

  if (begin + warp_k < end) fetch(begin + warp_k, 0);
  dev::commit_copies();
  const Term lead = term_of(a, first, two, 0);
  int slot = 0;
  ZK_NO_UNROLL
  for (int slice = begin + warp_k; slice < end; slice += split.warps_k, slot ^= 1) {
    dev::wait_copies<0>();
    // The slice is there for every lane, and every lane has read the one before.
    dev::warp_barrier();
    if (slice + split.warps_k < end) fetch(slice + split.warps_k, slot ^ 1);
    dev::commit_copies();
    uint32_t left[2][2][2][4];  // branch, half, pair of quarters, register of the fragment
    ZK_UNROLL
    for (int h = 0; h < 2; ++h) {
      float acc[2][4][4];  // branch, row, quarter
      ZK_UNROLL
      for (int p = 0; p < 2; ++p) {
        uint32_t raw[4];
        dev::load_turned(from + slot * kStageBytes + 2 * p * kQuarterBytes + h * 256, raw);
        ZK_UNROLL
        for (int m = 0; m < 4; ++m)
          unpack<T>(raw[m], acc[0][m / 2 * 2][2 * p + m % 2], acc[0][m / 2 * 2 + 1][2 * p + m % 2]);
      }
      ZK_UNROLL
      for (int i = 0; i < 16; ++i) acc[1][i / 4][i % 4] = acc[0][i / 4][i % 4];
      const uint32_t row = a.place.row_offset + static_cast<uint32_t>(slice * kSlice + 4 * h);
      // Entered once without terms too: a loop that may be passed by costs copies of all registers.
      Term term = lead;
      int k = 0;
      ZK_NO_UNROLL
      do {
        if (k > 0) term = term_of(a, first, two, k);
        if (term.c0 == 0.0f && term.c1 == 0.0f) continue;
        draw_rows<kind>(term.seed, a.place.param_id, row, group, l0, static_cast<uint32_t>(lane),
                        [&](uint32_t i, const float z[4]) {
                          ZK_UNROLL
                          for (int j = 0; j < 4; ++j) {
                            acc[0][i][j] = fma32(term.c0, z[j], acc[0][i][j]);
                            acc[1][i][j] = fma32(term.c1, z[j], acc[1][i][j]);
                          }
                        });
      } while (++k < static_cast<int>(a.terms.count));
      ZK_UNROLL
      for (int g = 0; g < 2; ++g) {
        ZK_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int p = i / 4, m = i % 4;
          left[g][h][p][m] =
              dev::pack<T>(acc[g][m / 2 * 2][2 * p + m % 2], acc[g][m / 2 * 2 + 1][2 * p + m % 2]);
        }
      }
    }
    // sum += left x^T. Products that follow each other add to different sums. Addresses are
    // computed here and not kept over the slices.
    const int k = slice * kSlice + 8 * q;
    auto token = static_cast<uint32_t>(token0 + r);
    dev::opaque(token);
    ZK_UNROLL
    for (int pair = 0; pair < NT / tiles; ++pair) {
      if (pair > 0 && token0 + pair * tiles * 8 >= tokens) continue;
      Vec16 right[2][tiles];
      const uint32_t at = token + static_cast<uint32_t>(pair * tiles * 8);
      if (is_whole(slice))
        load_right<true, tiles>(a, start, at, k, right);
      else
        load_right<false, tiles>(a, start, at, k, right);
      ZK_UNROLL
      for (int i = 0; i < 8 * tiles; ++i) {
        const int h = i / (4 * tiles), g = i % 2, p = i / 2 % 2, t = i / 4 % tiles;
        dev::mma<T>(sum[g][p][pair * tiles + t], left[g][h][p], right[g][t].w + 2 * h);
      }
    }
  }

  // The sums of warps behind each other, in order, one branch and pair of quarters at a time.
  auto* meeting = reinterpret_cast<float*>(dev::shared());
  constexpr int values = NT * 4;
  ZK_UNROLL
  for (int gp = 0; gp < 4; ++gp) {
    float (*own)[4] = sum[gp / 2][gp % 2];
    dev::barrier();
    if (warp_k > 0) {
      float* at = meeting + ((warp_k - 1) * wide + warp_n) * (values * 32) + lane;
      ZK_UNROLL
      for (int i = 0; i < values; ++i) at[i * 32] = own[i / 4][i % 4];
    }
    dev::barrier();
    ZK_NO_UNROLL
    for (int k = 1; warp_k == 0 && k < split.warps_k; ++k) {
      const float* at = meeting + ((k - 1) * wide + warp_n) * (values * 32) + lane;
      ZK_UNROLL
      for (int i = 0; i < values; ++i) own[i / 4][i % 4] += at[i * 32];
    }
  }
  if (warp_k > 0) return;
  ZK_UNROLL
  for (int i = 0; i < 16 * NT; ++i) {
    const int64_t branch = first + i / (8 * NT);
    const int token = token0 + i / 4 % NT * 8 + q * 2 + i % 2;
    const int n = n0 + r + 64 * (i / (4 * NT) % 2 * 2 + i % 4 / 2);
    if (branch < a.branches && token < tokens && n < outputs) {
      float y = sum[i / (8 * NT)][i / (4 * NT) % 2][i / 4 % NT][i % 4];
      const int64_t at = (branch * a.tokens + token) * outputs + n;
      if (partial) {
        partial[part * (a.branches * a.tokens * outputs) + at] = y;
        continue;
      }
      if (a.bias)
        y += load_one(static_cast<const char*>(a.bias), branch * outputs + n, a.bias_dtype);
      store_one(a.y, at, T, y);
    }
  }
}

using Kernel = void (*)(const LinearArgs, const Split, float*);

// Tokens of a block, in eights. Products of tokens that are not there are skipped, so one size
// serves fewer tokens too.
int token_tiles(int64_t tokens) { return tokens > 32 ? 8 : tokens > 8 ? 4 : 1; }

template <DType T, Distribution kind>
Kernel choose(int tiles) {
  if (tiles == 1) return linear_transposed_kernel<T, kind, 1>;
  return tiles == 4 ? linear_transposed_kernel<T, kind, 4> : linear_transposed_kernel<T, kind, 8>;
}

// Of slices, with Gaussian noise.
Plan plan(int64_t groups, int64_t slices, int64_t tokens, int64_t branches, int multiprocessors,
          int least_parts, int most_parts) {
  const int64_t block_tokens = 8 * token_tiles(tokens);
  const int64_t others = blocks_of(tokens, block_tokens) * blocks_of(branches, 2);
  const int64_t own_tokens = 2 * (tokens < block_tokens ? tokens : block_tokens);
  const Pieces pieces{slices, 4, 2400, own_tokens * 64, 32 * 64, branches * tokens * groups * 256};
  return fastest(pieces, multiprocessors, least_parts, most_parts,
                 [&](int warps_k) { return groups * warps_k * others; });
}

}  // namespace

int linear_transposed_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                            int multiprocessors) {
  return plan(blocks_of(cols, kGaussianGroup), blocks_of(rows, kSlice), tokens, branches,
              multiprocessors, 1, kMostParts)
      .parts;
}

const char* linear_transposed(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0 || a.w.cols == 0) return nullptr;
  constexpr int64_t most = 0x7FFFFFFF - 256;
  constexpr int64_t units = 0xFFFFFFFF;  // of sixteen bytes
  if (a.w.cols > most || a.w.rows > most || (a.w.rows + kSlice) * (a.w.row_stride / 8) > units ||
      (a.branches - 1) * a.x_branch_stride / 8 + a.tokens * (a.w.rows / 8) > units)
    return "the product is too large";
  if (a.pending.count > 0) return "this product takes no pending update";
  if (parts < 1 || (parts > 1 && !partial)) return "a product in parts needs memory for their sums";
  const Cut cut = cut_columns(a.place.col_offset, a.w.cols, false);
  const auto slices = static_cast<int>(blocks_of(a.w.rows, kSlice));
  const auto each = static_cast<int>(blocks_of(slices, parts));
  if (parts > 1 && each * (parts - 1) >= slices) return "a product has a part without rows";
  const int nt = token_tiles(a.tokens);
  const int warps_k =
      plan(cut.groups, slices, a.tokens, a.branches, a.multiprocessors, parts, parts).warps_k;
  const Split split{warps_k, cut.first_group, slices, each, parts};
  const bool normal = a.distribution == Distribution::gaussian;
  const Kernel kernel = a.w.dtype == DType::bf16
                            ? normal ? choose<DType::bf16, Distribution::gaussian>(nt)
                                     : choose<DType::bf16, Distribution::rademacher>(nt)
                        : normal ? choose<DType::f16, Distribution::gaussian>(nt)
                                 : choose<DType::f16, Distribution::rademacher>(nt);
  const char* error = launch(kernel, int64_t{cut.groups} * warps_k, blocks_of(a.tokens, 8 * nt),
                             blocks_of(a.branches, 2) * parts, kThreads, kShared, stream, a, split,
                             parts > 1 ? partial : nullptr);
  if (error || parts == 1) return error;
  LinearArgs sums = a;  // whose outputs are rows
  sums.w.rows = a.w.cols;
  return add_parts(sums, partial, parts, stream);
}

}  // namespace zk
