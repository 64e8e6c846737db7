// linear.cu's product for float32 weights and activations and up to 8 tokens a branch:
// y_g = x_g W_g^T + bias_g, W_g = W + sum_k C[g,k] z_k, two branches at once, by plain fma.
//
// A half warp owns an output, a lane of it 4 columns in each quarter of a group of 256: 16 weights
// in four loads of 16 bytes, asked for one group ahead, and four Philox calls for all branches of a
// seed. Each displaced weight then meets both branches' tokens; x is read 16 bytes at a time, the
// same for both halves of a warp and for the eight warps of a block. A lane's sums are added over
// the half warp by shuffles and over the parts of the columns in order.
//
// Block: 8 warps, 16 outputs. Grid: outputs, pairs of branches times parts of the columns; several
// parts where outputs do not reach every multiprocessor often enough.
//
// Ceiling, from the machine code for sm_90 with one seed. A weight costs 36 instructions at one
// token and 58 at eight with Gaussian noise: 27 the noise and its two fma, 6 loads, copies and
// loops, and 3.2 a token, 2 of them the fma; with Rademacher noise 21 and 43. A multiprocessor
// issues 128 a cycle: 3.5 to 2.2 weights, 14 to 9 bytes, a cycle (Rademacher 25 to 12): 3.4 to 2.1
// TB/s of weights on 132 multiprocessors at 1.8 GHz with 4.8 TB/s of memory bandwidth (Rademacher
// 5.8 to 2.8). Through scratch tiles a weight takes 27 (11) instructions and 16 bytes written and
// read again by the vendor's product: at the 24 bytes a cycle that the second cache gives a
// multiprocessor, 0.88 (0.75) cycles against 0.28 to 0.46 (0.16 to 0.34) here. (Arithmetic, not
// measurements.)
//
// Weights stored [in, out] have a kernel of their own: the noise's groups lie along the outputs, so
// a lane owns an output in each quarter of a group and holds the sums of all four, 64 registers. A
// warp owns 32 columns of each quarter and takes four rows at a time, an element a load; all its
// lanes read the same x. Block: 8 warps behind each other, 128 outputs; grid: outputs, pairs of
// branches times parts of the rows. A weight costs about 42 instructions at one token and 58 at
// eight, much as above.
#include "access.h"
#include "fused.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kOutputs = 2 * kThreads / 32;

struct Split {
  uint32_t first_group;
  int groups;       // of the matrix
  int groups_each;  // of a part
  int parts;
};

// sum += x times a lane's displaced weights; columns from `col` on, all of them inside or not. The
// branches begin sixteen times start[g] bytes from x on; a branch that is not there reads the first
// one's, and is not stored.
template <bool whole>
ZK_DEVICE void multiply(const LinearArgs& a, const uint32_t start[2], int col,
                        const float acc[2][4][4], float sum[2][kFewTokens]) {
  const int tokens = static_cast<int>(a.tokens), cols = static_cast<int>(a.w.cols);
  ZK_UNROLL
  for (int t = 0; t < kFewTokens; ++t) {
    if (t >= tokens) continue;
    const uint32_t at = static_cast<uint32_t>(t * (cols / 4) + col / 4);
    // All of them are asked for before the first is waited for.
    Vec16 v[2][4];
    ZK_UNROLL
    for (int g = 0; g < 2; ++g) {
      const char* const x = a.x + uint64_t{start[g] + at} * 16u;
      ZK_UNROLL
      for (int j = 0; j < 4; ++j)
        v[g][j] = whole || col + 64 * j < cols ? dev::load16(x + 256 * j) : Vec16{{0u, 0u, 0u, 0u}};
    }
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (!whole && col + 64 * j >= cols) continue;
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) {
        ZK_UNROLL
        for (int g = 0; g < 2; ++g)
          sum[g][t] = fma32(bits_float(v[g][j].w[i]), acc[g][j][i], sum[g][t]);
      }
    }
  }
}

template <Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, 2)
    linear_few_kernel(const LinearArgs a, const Split split, float* partial) {
  const int lane = dev::thread() % 32, own = lane % 16, l = own * 4;
  const int64_t n = dev::block_x() * kOutputs + dev::thread() / 16;
  const auto part = static_cast<uint32_t>(dev::block_z()) % static_cast<uint32_t>(split.parts);
  const int64_t first =
      static_cast<uint32_t>(dev::block_z()) / static_cast<uint32_t>(split.parts) * 2;
  const bool two = first + 1 < a.branches;
  const int tokens = static_cast<int>(a.tokens), cols = static_cast<int>(a.w.cols);
  const int begin = static_cast<int>(part) * split.groups_each;
  const int end =
      begin + split.groups_each < split.groups ? begin + split.groups_each : split.groups;
  const uint32_t noise_row = a.place.row_offset + static_cast<uint32_t>(n);
  const char* const weights = a.w.data + (n < a.w.rows ? n : 0) * a.w.row_stride * 4;

  float sum[2][kFewTokens];
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    ZK_UNROLL
    for (int t = 0; t < kFewTokens; ++t) sum[g][t] = 0.0f;
  }
  Vec16 raw[4];
  const auto fetch = [&](int group) {
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int col = group * 256 + 64 * j + l;
      raw[j] = col < cols ? dev::load16(weights + int64_t{col} * 4) : Vec16{{0u, 0u, 0u, 0u}};
    }
  };
  fetch(begin);
  uint32_t start[2];
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    start[g] = static_cast<uint32_t>((first + (two ? g : 0)) * a.x_branch_stride / 4);
    dev::opaque(start[g]);
  }
  const Term lead = term_of(a, first, two, 0);
  ZK_NO_UNROLL
  for (int group = begin; group < end; ++group) {
    float acc[2][4][4];
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) acc[0][j][i] = acc[1][j][i] = bits_float(raw[j].w[i]);
    }
    if (group + 1 < end) fetch(group + 1);
    // Entered once without terms too: a loop that may be passed by costs copies of all registers.
    Term term = lead;
    int k = 0;
    ZK_NO_UNROLL
    do {
      if (k > 0) term = term_of(a, first, two, k);
      if (term.c0 == 0.0f && term.c1 == 0.0f) continue;
      const Draw<kind> draw(row_state(term.seed, noise_row, a.place.param_id, Stream::direction),
                            split.first_group + static_cast<uint32_t>(group),
                            static_cast<uint32_t>(l));
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
    const int col = group * 256 + l;
    if (group * 256 + 256 <= cols)
      multiply<true>(a, start, col, acc, sum);
    else
      multiply<false>(a, start, col, acc, sum);
  }

  // Lane 8 g + t of a half warp stores branch g's token t.
  float y = 0.0f;
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    ZK_UNROLL
    for (int t = 0; t < kFewTokens; ++t) {
      if (t >= tokens) continue;
      float s = sum[g][t];
      ZK_UNROLL
      for (int mask = 8; mask > 0; mask /= 2) s += dev::shuffle_xor(s, mask);
      if (own == g * kFewTokens + t) y = s;
    }
  }
  const int64_t branch = first + own / kFewTokens;
  const int token = own % kFewTokens;
  if (branch >= a.branches || token >= tokens || n >= a.w.rows) return;
  const int64_t at = (branch * a.tokens + token) * a.w.rows + n;
  if (partial) {
    partial[part * (a.branches * a.tokens * a.w.rows) + at] = y;
    return;
  }
  if (a.bias) y += load_one(static_cast<const char*>(a.bias), branch * a.w.rows + n, a.bias_dtype);
  reinterpret_cast<float*>(a.y)[at] = y;
}

// Rows `row` + {0, 1, 2, 3} in column l of every quarter, l the lane's or 32 more: use(i, z) gets
// the four values of row i. Every lane of the warp takes part.
template <Distribution kind, class Use>
ZK_DEVICE void draw_rows(uint64_t seed, uint32_t param_id, uint32_t row, uint32_t group, uint32_t l,
                         const Use& use) {
  if constexpr (kind == Distribution::gaussian) {
    ZK_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const PhiloxWords w =
          philox_words(row_state(seed, row + i, param_id, Stream::direction), group * 64u + l);
      float z[4];
      normal_pair(w.w[0], w.w[1], z[0], z[1]);
      normal_pair(w.w[2], w.w[3], z[2], z[3]);
      use(i, z);
    }
  } else {
    // A call holds the signs of two quarters, a word the 32 columns of a warp in one of them: lane
    // 2 i + h makes row i's call for quarters 2 h and 2 h + 1.
    const uint32_t lane = l % 32u;
    const PhiloxWords w = philox_words(
        row_state(seed, row + lane / 2u % 4u, param_id, Stream::direction), group * 2u + lane % 2u);
    const auto even = static_cast<int32_t>(l >= 32u ? w.w[1] : w.w[0]);
    const auto odd = static_cast<int32_t>(l >= 32u ? w.w[3] : w.w[2]);
    ZK_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      float z[4];
      ZK_UNROLL
      for (uint32_t j = 0; j < 4; ++j) {
        const auto signs = static_cast<uint32_t>(
            dev::from_lane(j % 2 ? odd : even, static_cast<int>(2u * i + j / 2u)));
        z[j] = bits_float(0x3F800000u | ((signs << (31u - lane)) & 0x80000000u));
      }
      use(i, z);
    }
  }
}

constexpr int kWarps = kThreads / 32;
constexpr int kRound = 4 * kWarps;  // rows of a block at a time
constexpr int kPanel = 128;         // outputs of a block
// Sums of a branch, of every warp.
constexpr size_t kMeeting = size_t{4} * kWarps * kFewTokens * kPanel;

// The same with the columns as outputs; of a Split, rounds of rows in place of groups.
template <Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, 1)
    linear_few_transposed_kernel(const LinearArgs a, const Split split, float* partial) {
  const int warp = dev::thread() / 32, lane = dev::thread() % 32;
  const auto panel = static_cast<uint32_t>(dev::block_x());
  const int inputs = static_cast<int>(a.w.rows), outputs = static_cast<int>(a.w.cols);
  const int n0 = static_cast<int>(panel / 2u) * 256 + static_cast<int>(panel % 2u) * 32;
  if (n0 >= outputs) return;
  const uint32_t group = split.first_group + panel / 2u;
  const uint32_t l = panel % 2u * 32u + static_cast<uint32_t>(lane);
  const auto part = static_cast<uint32_t>(dev::block_z()) % static_cast<uint32_t>(split.parts);
  const int64_t first =
      static_cast<uint32_t>(dev::block_z()) / static_cast<uint32_t>(split.parts) * 2;
  const bool two = first + 1 < a.branches;
  const int tokens = static_cast<int>(a.tokens);
  const int begin = static_cast<int>(part) * split.groups_each * kRound;
  const int end =
      begin + split.groups_each * kRound < inputs ? begin + split.groups_each * kRound : inputs;

  float sum[2][kFewTokens][4];
  ZK_UNROLL
  for (int i = 0; i < 8 * kFewTokens; ++i)
    sum[i / 4 / kFewTokens][i / 4 % kFewTokens][i % 4] = 0.0f;
  float raw[4][4];
  const auto* const weights = reinterpret_cast<const float*>(a.w.data) + (n0 + lane);
  const bool whole = n0 + 224 <= outputs;
  // Columns that are not there are computed from the last one, and not stored.
  int place[4];
  ZK_UNROLL
  for (int j = 0; j < 4; ++j)
    place[j] = n0 + lane + 64 * j < outputs ? 64 * j : outputs - 1 - n0 - lane;
  const auto fetch = [&](int k) {
    const float* row = weights + k * a.w.row_stride;
    if (whole) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i, row += a.w.row_stride) {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) raw[i][j] = row[64 * j];
      }
    } else {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i, row += a.w.row_stride) {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) raw[i][j] = row[place[j]];
      }
    }
  };
  if (begin + warp * 4 < end) fetch(begin + warp * 4);
  const Term lead = term_of(a, first, two, 0);
  ZK_NO_UNROLL
  for (int k = begin + warp * 4; k < end; k += kRound) {
    float acc[2][4][4];
    ZK_UNROLL
    for (int i = 0; i < 16; ++i) acc[0][i / 4][i % 4] = acc[1][i / 4][i % 4] = raw[i / 4][i % 4];
    if (k + kRound < end) fetch(k + kRound);
    const uint32_t row = a.place.row_offset + static_cast<uint32_t>(k);
    // Entered once without terms too: a loop that may be passed by costs copies of all registers.
    Term term = lead;
    int s = 0;
    ZK_NO_UNROLL
    do {
      if (s > 0) term = term_of(a, first, two, s);
      if (term.c0 == 0.0f && term.c1 == 0.0f) continue;
      draw_rows<kind>(term.seed, a.place.param_id, row, group, l,
                      [&](uint32_t i, const float z[4]) {
                        ZK_UNROLL
                        for (int j = 0; j < 4; ++j) {
                          acc[0][i][j] = fma32(term.c0, z[j], acc[0][i][j]);
                          acc[1][i][j] = fma32(term.c1, z[j], acc[1][i][j]);
                        }
                      });
    } while (++s < static_cast<int>(a.terms.count));
    ZK_UNROLL
    for (int g = 0; g < 2; ++g) {
      if (g == 1 && !two) continue;
      const char* x = a.x + ((first + g) * a.x_branch_stride + k) * 4;
      ZK_UNROLL
      for (int half = 0; half < kFewTokens; half += 4) {
        if (half >= tokens) continue;
        // Four are asked for before the first is waited for.
        Vec16 v[4];
        ZK_UNROLL
        for (int t = 0; t < 4; ++t) {
          v[t] = dev::load16_if(x, half + t < tokens);
          x += static_cast<uint32_t>(inputs) * 4u;
        }
        ZK_UNROLL
        for (int t = 0; t < 4; ++t) {
          if (half + t >= tokens) continue;
          ZK_UNROLL
          for (int i = 0; i < 4; ++i) {
            ZK_UNROLL
            for (int j = 0; j < 4; ++j)
              sum[g][half + t][j] = fma32(bits_float(v[t].w[i]), acc[g][i][j], sum[g][half + t][j]);
          }
        }
      }
    }
  }

  // The warps' sums in order, a branch at a time.
  auto* meeting = reinterpret_cast<float*>(dev::shared());
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    if (g == 1 && !two) continue;
    dev::barrier();
    ZK_UNROLL
    for (int i = 0; i < 4 * kFewTokens; ++i)
      meeting[(warp * kFewTokens * 4 + i) * 32 + lane] = sum[g][i / 4][i % 4];
    dev::barrier();
    ZK_NO_UNROLL
    for (int i = dev::thread(); i < tokens * kPanel; i += kThreads) {
      const int token = i / kPanel, n = n0 + i % kPanel / 32 * 64 + i % 32;
      if (n >= outputs) continue;
      float y = meeting[i];
      ZK_UNROLL
      for (int w = 1; w < kWarps; ++w) y += meeting[w * kFewTokens * kPanel + i];
      const int64_t branch = first + g, at = (branch * a.tokens + token) * outputs + n;
      if (partial) {
        partial[part * (a.branches * a.tokens * outputs) + at] = y;
        continue;
      }
      if (a.bias)
        y += load_one(static_cast<const char*>(a.bias), branch * outputs + n, a.bias_dtype);
      reinterpret_cast<float*>(a.y)[at] = y;
    }
  }
}

// Of groups or of rounds of rows, with Gaussian noise: eight warps take 1200 to 1900 cycles for
// one, the more the more tokens there are.
int parts_of(int64_t pieces, int64_t blocks, int64_t outputs, int64_t branches,
             int multiprocessors) {
  const Pieces p{pieces, 1, 1500, 2 * kFewTokens * 1024, 2048, branches * kFewTokens * outputs};
  return fastest(p, multiprocessors, 1, kMostParts, [&](int) { return blocks; }).parts;
}

}  // namespace

int linear_few_parts(int64_t rows, int64_t cols, int64_t branches, int multiprocessors) {
  return parts_of(blocks_of(cols, kGaussianGroup),
                  blocks_of(rows, kOutputs) * blocks_of(branches, 2), rows, branches,
                  multiprocessors);
}

int linear_few_transposed_parts(int64_t rows, int64_t cols, int64_t branches, int multiprocessors) {
  return parts_of(blocks_of(rows, kRound),
                  2 * blocks_of(cols, kGaussianGroup) * blocks_of(branches, 2), cols, branches,
                  multiprocessors);
}

const char* linear_few(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0) return nullptr;
  if (a.tokens > kFewTokens) return "this product takes few tokens";
  constexpr int64_t units = 0xFFFFFFFF;  // of sixteen bytes
  if (a.w.cols > 0x3FFFFFFF / kFewTokens || (a.branches - 1) * a.x_branch_stride / 4 > units / 2)
    return "the product is too large";
  if (a.pending.count > 0) return "this product takes no pending update";
  if (parts < 1 || (parts > 1 && !partial)) return "a product in parts needs memory for their sums";
  const Cut cut = cut_columns(a.place.col_offset, a.w.cols, false);
  const int groups = static_cast<int>(cut.groups);
  const int each = static_cast<int>(blocks_of(groups, parts));
  if (parts > 1 && each * (parts - 1) >= groups) return "a product has a part without columns";
  const Split split{cut.first_group, groups, each, parts};
  const auto kernel = a.distribution == Distribution::gaussian
                          ? linear_few_kernel<Distribution::gaussian>
                          : linear_few_kernel<Distribution::rademacher>;
  const char* error =
      launch(kernel, blocks_of(a.w.rows, kOutputs), 1, blocks_of(a.branches, 2) * parts, kThreads,
             0, stream, a, split, parts > 1 ? partial : nullptr);
  return error || parts == 1 ? error : add_parts(a, partial, parts, stream);
}

const char* linear_few_transposed(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0 || a.w.cols == 0) return nullptr;
  if (a.tokens > kFewTokens) return "this product takes few tokens";
  constexpr int64_t most = 0x3FFFFFFF;
  if (a.w.rows > most || a.w.cols > most) return "the product is too large";
  if (a.pending.count > 0) return "this product takes no pending update";
  if (parts < 1 || (parts > 1 && !partial)) return "a product in parts needs memory for their sums";
  const Cut cut = cut_columns(a.place.col_offset, a.w.cols, false);
  const auto rounds = static_cast<int>(blocks_of(a.w.rows, kRound));
  const auto each = static_cast<int>(blocks_of(rounds, parts));
  if (parts > 1 && each * (parts - 1) >= rounds) return "a product has a part without rows";
  const Split split{cut.first_group, rounds, each, parts};
  const auto kernel = a.distribution == Distribution::gaussian
                          ? linear_few_transposed_kernel<Distribution::gaussian>
                          : linear_few_transposed_kernel<Distribution::rademacher>;
  const char* error = launch(kernel, int64_t{2} * cut.groups, 1, blocks_of(a.branches, 2) * parts,
                             kThreads, kMeeting, stream, a, split, parts > 1 ? partial : nullptr);
  if (error || parts == 1) return error;
  LinearArgs sums = a;  // whose outputs are rows
  sums.w.rows = a.w.cols;
  return add_parts(sums, partial, parts, stream);
}

}  // namespace zk
