// y_g = x_g W_g^T + bias_g, W_g = round(W + sum_k C[g,k] z_k), for two branches g at once, 16-bit
// weights and activations, float32 sums. W_g exists in registers only.
//
// The weights are the left factor of mma.m16n8k16 (16 outputs x 16 columns), the tokens the right
// one, so that a thread forms its own fragments from noise it drew itself:
//
//   lane = 4 r + q owns outputs n0 + r and n0 + r + 8. Of a half panel (32 columns of each of the
//   four quarters of 256) it owns 8 columns a quarter, from 8 q on; four of them at a time (step t)
//   fill a product's 16 columns: the product's columns 2q, 2q + 1, 2q + 8, 2q + 9 are the matrix's
//   8q + 4t + {0, 1, 2, 3}. A product sums over its columns in any order, so the right factor is
//   read the same way, sixteen adjacent bytes a thread for both steps: whole sectors, and nothing
//   is shuffled or transposed. One Philox call, a (row, column) of a quarter, gives that column in
//   all four quarters: four products' worth. No value of noise is drawn twice.
//
// Block: 8 warps, 8 / warps_k of them side by side (16 outputs each), warps_k behind each other
// taking every warps_k-th half panel; their sums meet in shared memory and are added in order.
// Grid: outputs, blocks of 8 NT tokens, pairs of branches times parts of the columns. Several parts
// where outputs do not fill the GPU: their sums meet in global memory and a second kernel adds them
// in order (linear_parts). More than one block of tokens draws the noise again: the caller
// multiplies through scratch tiles from there on.
// Weights go through shared memory by cp.async, one half panel ahead: 32 KiB in flight, where 4.3
// TB/s and a latency of 0.8 us ask for 26. Every thread reads back what it copied itself, sixteen
// bytes at a time, so that no barrier is needed and no bank is asked twice.
//
// Ceiling, from the machine code for sm_90 with one seed; instructions a weight, with Gaussian and
// with Rademacher noise:
//
//   tokens a branch                                  1 to 8      9 to 32     33 to 64
//   the noise and its two fma                        27 11       27 11       27 11
//   unpacking, packing, copies and loops              5  6        5  6        5  6
//   products and activations                          1  1        3  2        5  4
//   in all                                           33 18       35 19       37 21
//   TB/s of weights, 132 multiprocessors, 1.8 GHz   1.8 3.4     1.8 3.2     1.7 2.9
//
// 4.8 TB/s is an H200's memory bandwidth: this kernel does not wait for it, nor for the matrix
// unit: a half panel is 64 weights a lane and 16 NT products, of about 6.5 cycles each at the rate
// mma.sync reaches on Hopper, beside 64 * 35 issue cycles: a fifth of them at NT = 4, a third at 8.
// TMA and wgmma speed up what is not waited for here; they pay where tokens are many, in
// linear_sm90.cu, and the plan with scratch tiles has them from cuBLAS. (Arithmetic, not
// measurements.)
//
// Latency. 150 to 255 registers leave one block a multiprocessor, two warps a scheduler. A warp's
// machine code holds back 1.6 to 1.8 cycles an instruction for results of fixed latency (2.0 to 2.3
// with Rademacher noise), so two of them about fill a scheduler. It was 2.7 with 128 registers,
// where four products in a row waited for each other's sum and the four Philox calls for registers:
// now four sums take turns.
//
// Activations are what comes next: a block reads all of its part's, 2 NT eights of tokens, and at
// 24 bytes a cycle from the second-level cache 32 tokens take longer than the noise where a block
// has 16 outputs alone. fused.h weighs that against parts.
//
// Few tokens. Of the eight columns of a product's right factor one token uses one, yet plain fma
// would not be cheaper: linear_few.cu's loop has 36 instructions at one token and 58 at eight in
// float32, and here 4 more to round to 16 bits and to unpack again.
//
// `pending` terms are applied, rounded and written back as a weight comes by, before the probe: the
// update of the last step costs its noise and no pass over memory of its own.
#include "access.h"
#include "fused.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kStages = 2;
constexpr int kChunks = 8;  // 16-byte chunks of a thread a half panel: 2 outputs x 4 quarters
constexpr size_t kShared = size_t{kStages} * kChunks * kThreads * 16;

struct Split {
  int warps_k;
  uint32_t first_group;
  int halves;       // half panels of the matrix
  int halves_each;  // of a part
  int parts;
};

// v[j][i] of four columns through the pending terms, each rounded.
template <DType T, Distribution kind>
ZK_DEVICE void apply_pending(const LinearArgs& a, uint32_t noise_row, uint32_t group, uint32_t l,
                             float v[4][4]) {
  const uint32_t shift = group % 2u * 16u;
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.pending.count; ++k) {
    const auto seed = static_cast<uint64_t>(a.pending.seeds[k]);
    const float c = a.pending_coeffs[k];
    const float decay = a.pending_decay ? a.pending_decay[k] : 1.0f;
    if (c == 0.0f && decay == 1.0f) continue;
    const Draw<kind> draw(row_state(seed, noise_row, a.place.param_id, Stream::direction), group,
                          l);
    const RowState bits = row_state(seed, noise_row, a.place.param_id, Stream::update_rounding);
    ZK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i), z);
      PhiloxWords w{};
      if (a.pending_stochastic) w = rounding_words(bits, group, l + static_cast<uint32_t>(i));
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float moved = fma32(c, z[j], v[j][i] * decay);
        v[j][i] = a.pending_stochastic ? stochastic<T>(moved, (w.w[j] >> shift) & 0xFFFFu)
                                       : nearest<T>(moved);
      }
    }
  }
}

// Both branches' activations of `tiles` eights of tokens from `token` on, in columns col .. col + 7
// of every quarter, the branches' from eight times start[g] on. A token that is not there reads the
// last one's, and is not stored.
template <bool whole, int tiles>
ZK_DEVICE void load_right(const LinearArgs& a, const uint32_t start[2], uint32_t token, int col,
                          Vec16 right[2][tiles][4]) {
  const auto cols = static_cast<uint32_t>(a.w.cols), last = static_cast<uint32_t>(a.tokens) - 1u;
  ZK_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t own = token + static_cast<uint32_t>(tile) * 8u;
    const uint32_t at = (own < last ? own : last) * (cols / 8u) + static_cast<uint32_t>(col) / 8u;
    ZK_UNROLL
    for (int g = 0; g < 2; ++g) {
      const char* const x = a.x + uint64_t{start[g] + at} * 16u;
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const bool inside = whole || col + 64 * j < static_cast<int>(cols);
        right[g][tile][j] = inside ? dev::load16(x + 128 * j) : Vec16{{0u, 0u, 0u, 0u}};
      }
    }
  }
}

template <DType T, Distribution kind, int NT, bool pending>
ZK_KERNEL void ZK_BOUNDS(kThreads, 1)
    linear_kernel(const LinearArgs a, const Split split, float* partial) {
  // Eights of tokens whose activations are in registers at a time.
  constexpr int tiles = NT < 2 ? NT : 2;
  const int warp = dev::thread() / 32, lane = dev::thread() % 32, q = lane % 4, r = lane / 4;
  const int wide = kWarps / split.warps_k;
  const int warp_n = warp % wide, warp_k = warp / wide;
  const int64_t n0 = dev::block_x() * (16 * wide) + warp_n * 16;
  const int tokens = static_cast<int>(a.tokens), cols = static_cast<int>(a.w.cols);
  const int token0 = static_cast<int>(dev::block_y()) * (8 * NT);
  const auto part = static_cast<uint32_t>(dev::block_z()) % static_cast<uint32_t>(split.parts);
  const int64_t first =
      static_cast<uint32_t>(dev::block_z()) / static_cast<uint32_t>(split.parts) * 2;
  const int begin = static_cast<int>(part) * split.halves_each;
  const int end =
      begin + split.halves_each < split.halves ? begin + split.halves_each : split.halves;
  const bool two = first + 1 < a.branches;

  char* const mine = dev::shared() + dev::thread() * 16;
  const auto chunk = [](int slot, int row, int j) {
    return ((slot * 2 + row) * 4 + j) * (kThreads * 16);
  };
  // Places of the rows in the weight and of the branches in x, in units of sixteen bytes. An output
  // that is not there is computed from the last one, and not stored.
  uint32_t source[2], start[2];
  ZK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t n = n0 + r + i * 8;
    source[i] = static_cast<uint32_t>((n < a.w.rows ? n : a.w.rows - 1) * a.w.row_stride / 8) +
                static_cast<uint32_t>(q);
    start[i] = static_cast<uint32_t>((first + (two ? i : 0)) * a.x_branch_stride / 8);
    dev::opaque(source[i]);
    dev::opaque(start[i]);
  }
  const auto column = [](int h) { return h / 2 * 256 + h % 2 * 32; };
  const auto is_whole = [&](int h) { return h / 2 * 256 + 256 <= cols; };
  const auto fetch = [&](int h, int slot) {
    const int col = column(h);
    const bool whole = is_whole(h);
    ZK_UNROLL
    for (int row = 0; row < 2; ++row) {
      const char* const at =
          a.w.data + uint64_t{source[row] + static_cast<uint32_t>(col) / 8u} * 16u;
      char* const slots = mine + chunk(slot, row, 0);
      // The last output's owner writes it meanwhile.
      const bool there = !pending || n0 + r + row * 8 < a.w.rows;
      if (whole) {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) dev::copy16(slots + chunk(0, 0, j), at + 128 * j, there);
      } else {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j)
          dev::copy16(slots + chunk(0, 0, j), at + 128 * j, there && col + q * 8 + 64 * j < cols);
      }
    }
  };

  float sum[2][NT][4];
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    ZK_UNROLL
    for (int t = 0; t < NT; ++t) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) sum[g][t][i] = 0.0f;
    }
  }

  if (begin + warp_k < end) fetch(begin + warp_k, 0);
  dev::commit_copies();
  const Term lead = term_of(a, first, two, 0);
  int slot = 0;
  ZK_NO_UNROLL
  for (int h = begin + warp_k; h < end; h += split.warps_k, slot ^= 1) {
    if (h + split.warps_k < end) fetch(h + split.warps_k, slot ^ 1);
    dev::commit_copies();
    dev::wait_copies<1>();
    const uint32_t group = split.first_group + static_cast<uint32_t>(h) / 2u;
    const bool whole = is_whole(h);
    const int col = column(h) + 8 * q;
    uint32_t left[2][2][4][4];  // step, branch, quarter, register of the fragment
    ZK_UNROLL
    for (int row = 0; row < 2; ++row) {
      const int64_t n = n0 + r + row * 8;
      const uint32_t noise_row = a.place.row_offset + static_cast<uint32_t>(n);
      Vec16 raw[4];
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) raw[j] = dev::load16(mine + chunk(slot, row, j));
      ZK_UNROLL
      for (int t = 0; t < 2; ++t) {
        const auto l = static_cast<uint32_t>(h % 2 * 32 + 8 * q + 4 * t);
        float acc[2][4][4];
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) unpack_words<T, 2>(raw[j].w + 2 * t, acc[0][j]);
        if constexpr (pending) {
          apply_pending<T, kind>(a, noise_row, group, l, acc[0]);
          ZK_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int at = col + 4 * t + 64 * j;
            Vec8 moved;
            pack_words<T, 2>(acc[0][j], moved.w);
            if (n < a.w.rows && at < cols)
              dev::store8(a.w.data + (n * a.w.row_stride + at) * 2, moved);
          }
        }
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
          ZK_UNROLL
          for (int i = 0; i < 4; ++i) acc[1][j][i] = acc[0][j][i];
        }
        // Entered once without terms too: a loop that may be passed by costs copies of all
        // registers.
        Term term = lead;
        int k = 0;
        ZK_NO_UNROLL
        do {
          if (k > 0) term = term_of(a, first, two, k);
          if (term.c0 == 0.0f && term.c1 == 0.0f) continue;
          const Draw<kind> draw(
              row_state(term.seed, noise_row, a.place.param_id, Stream::direction), group, l);
          ZK_UNROLL
          for (int i = 0; i < 4; ++i) {
            float z[4];
            draw.column(static_cast<uint32_t>(i), z);
            ZK_UNROLL
            for (int j = 0; j < 4; ++j) {
              acc[0][j][i] = fma32(term.c0, z[j], acc[0][j][i]);
              acc[1][j][i] = fma32(term.c1, z[j], acc[1][j][i]);
            }
          }
        } while (++k < static_cast<int>(a.terms.count));
        ZK_UNROLL
        for (int g = 0; g < 2; ++g) {
          ZK_UNROLL
          for (int j = 0; j < 4; ++j) {
            left[t][g][j][row] = dev::pack<T>(acc[g][j][0], acc[g][j][1]);
            left[t][g][j][row + 2] = dev::pack<T>(acc[g][j][2], acc[g][j][3]);
          }
        }
      }
    }
    // sum += left x^T. Products that follow each other add to different sums. Addresses are
    // computed here and not kept over the half panels.
    auto token = static_cast<uint32_t>(token0 + r);
    dev::opaque(token);
    ZK_UNROLL
    for (int pair = 0; pair < NT / tiles; ++pair) {
      if (pair > 0 && token0 + pair * tiles * 8 >= tokens) continue;
      Vec16 right[2][tiles][4];
      const uint32_t at = token + static_cast<uint32_t>(pair * tiles * 8);
      if (whole)
        load_right<true, tiles>(a, start, at, col, right);
      else
        load_right<false, tiles>(a, start, at, col, right);
      ZK_UNROLL
      for (int i = 0; i < 16 * tiles; ++i) {
        const int t = i / (8 * tiles), j = i / (2 * tiles) % 4, tile = i / 2 % tiles, g = i % 2;
        dev::mma<T>(sum[g][pair * tiles + tile], left[t][g][j], right[g][tile][j].w + 2 * t);
      }
    }
  }

  dev::barrier();
  auto* meeting = reinterpret_cast<float*>(dev::shared());
  constexpr int values = 2 * NT * 4;
  if (warp_k > 0) {
    float* to = meeting + ((warp_k - 1) * wide + warp_n) * (values * 32) + lane;
    ZK_UNROLL
    for (int i = 0; i < values; ++i) to[i * 32] = sum[i / (NT * 4)][i / 4 % NT][i % 4];
  }
  dev::barrier();
  if (warp_k > 0) return;
  ZK_NO_UNROLL
  for (int k = 1; k < split.warps_k; ++k) {
    const float* from = meeting + ((k - 1) * wide + warp_n) * (values * 32) + lane;
    ZK_UNROLL
    for (int i = 0; i < values; ++i) sum[i / (NT * 4)][i / 4 % NT][i % 4] += from[i * 32];
  }
  ZK_UNROLL
  for (int i = 0; i < values; ++i) {
    const int64_t branch = first + i / (NT * 4);
    const int token = token0 + i / 4 % NT * 8 + q * 2 + i % 2;
    const int64_t n = n0 + r + i % 4 / 2 * 8;
    if (branch < a.branches && token < tokens && n < a.w.rows) {
      float y = sum[i / (NT * 4)][i / 4 % NT][i % 4];
      const int64_t at = (branch * a.tokens + token) * a.w.rows + n;
      if (partial) {
        partial[part * (a.branches * a.tokens * a.w.rows) + at] = y;
        continue;
      }
      if (a.bias)
        y += load_one(static_cast<const char*>(a.bias), branch * a.w.rows + n, a.bias_dtype);
      store_one(a.y, at, T, y);
    }
  }
}

// y = the parts' sums, in order, and the bias.
ZK_KERNEL void ZK_BOUNDS(kThreads, 2)
    add_parts_kernel(const LinearArgs a, const float* partial, int parts) {
  const int64_t i = dev::block_x() * kThreads + dev::thread();
  const int64_t size = a.branches * a.tokens * a.w.rows;
  if (i >= size) return;
  float y = partial[i];
  ZK_NO_UNROLL
  for (int p = 1; p < parts; ++p) y += partial[p * size + i];
  if (a.bias) {
    const int64_t branch = i / (a.tokens * a.w.rows), n = i % a.w.rows;
    y += load_one(static_cast<const char*>(a.bias), branch * a.w.rows + n, a.bias_dtype);
  }
  store_one(a.y, i, a.w.dtype, y);
}

using Kernel = void (*)(const LinearArgs, const Split, float*);

// Tokens of a block, in eights. Products of tokens that are not there are skipped, so one size
// serves fewer tokens too.
int token_tiles(int64_t tokens, bool pending) {
  return pending || tokens > 32 ? 8 : tokens > 8 ? 4 : 1;
}

template <DType T, Distribution kind>
Kernel choose(int tiles, bool pending) {
  if (pending) return linear_kernel<T, kind, 8, true>;
  if (tiles == 1) return linear_kernel<T, kind, 1, false>;
  return tiles == 4 ? linear_kernel<T, kind, 4, false> : linear_kernel<T, kind, 8, false>;
}

// Of half panels, with Gaussian noise.
Plan plan(int64_t rows, int64_t halves, int64_t tokens, int64_t branches, int multiprocessors,
          int least_parts, int most_parts) {
  const int64_t block_tokens = 8 * token_tiles(tokens, false);
  const int64_t others = blocks_of(tokens, block_tokens) * blocks_of(branches, 2);
  const int64_t own_tokens = 2 * (tokens < block_tokens ? tokens : block_tokens);
  const Pieces pieces{halves, kWarps, 4400, own_tokens * 256, 16 * 256, branches * tokens * rows};
  return fastest(pieces, multiprocessors, least_parts, most_parts,
                 [&](int warps_k) { return blocks_of(rows, 16 * (kWarps / warps_k)) * others; });
}

}  // namespace

int linear_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                 int multiprocessors) {
  const int64_t halves = 2 * blocks_of(cols, kGaussianGroup);
  return plan(rows, halves, tokens, branches, multiprocessors, 1, kMostParts).parts;
}

const char* add_parts(const LinearArgs& a, const float* partial, int parts, void* stream) {
  const int64_t size = a.branches * a.tokens * a.w.rows;
  return launch(add_parts_kernel, blocks_of(size, kThreads), 1, 1, kThreads, 0, stream, a, partial,
                parts);
}

const char* linear(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0) return nullptr;
  constexpr int64_t most = 0x7FFFFFFF - 256, units = 0xFFFFFFFF;  // of sixteen bytes
  if (a.tokens > most || a.w.cols > most ||
      (a.w.rows - 1) * a.w.row_stride / 8 + a.w.cols / 8 > units ||
      (a.branches - 1) * a.x_branch_stride / 8 + a.tokens * (a.w.cols / 8) > units)
    return "the product is too large";
  if (parts < 1 || (parts > 1 && !partial)) return "a product in parts needs memory for their sums";
  const bool pending = a.pending.count > 0;
  const int nt = token_tiles(a.tokens, pending);
  const int64_t blocks = blocks_of(a.tokens, 8 * nt), pairs = blocks_of(a.branches, 2);
  if (pending && (blocks > 1 || pairs > 1))
    return "a pending update needs one block of tokens and one pair of branches";
  const Cut cut = cut_columns(a.place.col_offset, a.w.cols, false);
  const int halves = static_cast<int>(2 * cut.groups);
  const int each = static_cast<int>(blocks_of(halves, parts));
  if (parts > 1 && each * (parts - 1) >= halves) return "a product has a part without columns";
  const int warps_k =
      plan(a.w.rows, halves, a.tokens, a.branches, a.multiprocessors, parts, parts).warps_k;
  const Split split{warps_k, cut.first_group, halves, each, parts};
  const int64_t outputs = 16 * (kWarps / split.warps_k);
  const bool normal = a.distribution == Distribution::gaussian;
  const Kernel kernel = a.w.dtype == DType::bf16
                            ? normal ? choose<DType::bf16, Distribution::gaussian>(nt, pending)
                                     : choose<DType::bf16, Distribution::rademacher>(nt, pending)
                        : normal ? choose<DType::f16, Distribution::gaussian>(nt, pending)
                                 : choose<DType::f16, Distribution::rademacher>(nt, pending);
  const char* error = launch(kernel, blocks_of(a.w.rows, outputs), blocks, pairs * parts, kThreads,
                             kShared, stream, a, split, parts > 1 ? partial : nullptr);
  return error || parts == 1 ? error : add_parts(a, partial, parts, stream);
}

}  // namespace zk
