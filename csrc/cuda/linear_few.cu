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
// Ceiling, from the machine code for sm_80 with one seed. A weight costs 52 instructions at one
// token and 71 at eight with Gaussian noise: 40 the noise and its two fma, 8 loads, copies and
// loops, and 2.9 a token, 2 of them the fma; with Rademacher noise 27 and 47. A multiprocessor
// issues 128 a cycle: 2.5 to 1.8 weights, 9.8 to 7.2 bytes, a cycle (Rademacher 19 to 11): 2.3
// to 1.7 TB/s of weights on 132 multiprocessors at 1.8 GHz with 4.8 TB/s of memory bandwidth
// (Rademacher 4.5 to 2.6). Through scratch tiles a weight takes 39 (11) instructions and 16 bytes
// written and read again by the vendor's product: at the 24 bytes a cycle that the second cache
// gives a multiprocessor, 0.97 (0.75) cycles against 0.41 to 0.55 (0.21 to 0.37) here. (Arithmetic,
// not measurements.)
//
// Transposed weights, whose outputs lie along the noise's groups, have no such product: a lane
// would hold sums of 16 outputs for every token and branch.
#include "access.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kOutputs = 2 * kThreads / 32;
// Each part's sums are four bytes an output, written and read again.
constexpr int kMostParts = 8;

struct Split {
  uint32_t first_group;
  int groups;       // of the matrix
  int groups_each;  // of a part
  int parts;
};

// sum += x times a lane's displaced weights; columns from `col` on, all of them inside or not.
template <bool inside>
ZK_DEVICE void multiply(const LinearArgs& a, int64_t first, bool two, int col,
                        const float acc[2][4][4], float sum[2][kFewTokens]) {
  const int tokens = static_cast<int>(a.tokens), cols = static_cast<int>(a.w.cols);
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    if (g == 1 && !two) continue;
    const char* x = a.x + ((first + g) * a.x_branch_stride + col) * 4;
    ZK_UNROLL
    for (int t = 0; t < kFewTokens; ++t) {
      if (t >= tokens) continue;
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (!inside && col + 64 * j >= cols) continue;
        const Vec16 v = dev::load16(x + 256 * j);
        ZK_UNROLL
        for (int i = 0; i < 4; ++i) sum[g][t] = fma32(bits_float(v.w[i]), acc[g][j][i], sum[g][t]);
      }
      x += static_cast<uint32_t>(cols) * 4u;
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
  ZK_NO_UNROLL
  for (int group = begin; group < end; ++group) {
    float acc[2][4][4];
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) acc[0][j][i] = acc[1][j][i] = bits_float(raw[j].w[i]);
    }
    if (group + 1 < end) fetch(group + 1);
    ZK_NO_UNROLL
    for (int64_t k = 0; k < a.terms.count; ++k) {
      const float c0 = a.coeffs[first * a.terms.count + k];
      const float c1 = two ? a.coeffs[(first + 1) * a.terms.count + k] : 0.0f;
      if (c0 == 0.0f && c1 == 0.0f) continue;
      const Draw<kind> draw(row_state(static_cast<uint64_t>(a.terms.seeds[k]), noise_row,
                                      a.place.param_id, Stream::direction),
                            split.first_group + static_cast<uint32_t>(group),
                            static_cast<uint32_t>(l));
      ZK_UNROLL
      for (int i = 0; i < 4; ++i) {
        float z[4];
        draw.column(static_cast<uint32_t>(i), z);
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
          acc[0][j][i] = fma32(c0, z[j], acc[0][j][i]);
          acc[1][j][i] = fma32(c1, z[j], acc[1][j][i]);
        }
      }
    }
    const int col = group * 256 + l;
    if (group * 256 + 256 <= cols)
      multiply<true>(a, first, two, col, acc, sum);
    else
      multiply<false>(a, first, two, col, acc, sum);
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

int64_t blocks_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

}  // namespace

// Time is waves of blocks, each as long as its groups (eight warps: 1500 to 2100 issue cycles with
// Gaussian noise) and half a group for its beginning and end. A second launch adds three groups,
// and sums of parts are written and read again.
int linear_few_parts(int64_t rows, int64_t cols, int64_t branches, int multiprocessors) {
  const int64_t groups = blocks_of(cols, kGaussianGroup);
  const int64_t blocks = blocks_of(rows, kOutputs) * blocks_of(branches, 2);
  int64_t best = 1, least = 0;
  for (int64_t parts = 1; parts <= kMostParts && parts <= groups; ++parts) {
    const int64_t each = blocks_of(groups, parts);
    if (blocks_of(groups, each) != parts) continue;
    int64_t time = blocks_of(blocks * parts, multiprocessors) * (2 * each + 1);
    if (parts > 1) time += 6 + parts * branches * kFewTokens * rows * 8 / (11264 * multiprocessors);
    if (parts == 1 || time < least) {
      best = parts;
      least = time;
    }
  }
  return static_cast<int>(best);
}

const char* linear_few(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0) return nullptr;
  if (a.tokens > kFewTokens) return "this product takes few tokens";
  if (a.w.cols > 0x3FFFFFFF) return "the product is too large";
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

}  // namespace zk
