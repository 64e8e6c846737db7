// linear.cu's product for Hopper: y_g = x_g W_g^T + bias_g, W_g = round(W + sum_k C[g,k] z_k), for
// two branches g at once and up to 128 tokens a branch, 16-bit weights and activations, float32
// sums. The noise and the displaced weights are linear.cu's bit for bit; sums add in another order.
//
// With y^T = W_g x_g^T the weights are the left factor of wgmma.m64n128k16, in registers, and the
// tokens the right one, in shared memory: a thread forms its own fragment from noise it drew
// itself.
//
//   Lane 4 r + q of warp w owns outputs 16 w + r and 16 w + r + 8. A slice is 16 columns of each of
//   the four quarters of a group of 256, l .. l + 15: four products' columns. Of these the fragment
//   wants columns 2q, 2q + 1, 2q + 8, 2q + 9, the very ones a thread draws: one Philox call gives a
//   column of all four quarters. So the columns need no permutation, x is read as it lies, and
//   ldmatrix hands a thread the weights it displaces.
//
// Block: two warpgroups, 64 outputs each, all for the same 128 tokens. Grid: 128 outputs, blocks of
// 128 tokens, pairs of branches times parts of the columns; the parts' sums meet in global memory
// and are added in order. More than one block of tokens draws the noise again.
//
// x and W come by TMA, boxes of 32 columns of a quarter (64 bytes, swizzled) by 128 rows, 12 a half
// panel (32 columns of four quarters), 96 KiB; two half panels are in shared memory. What lies
// outside of the matrices reads as zero. One thread asks for the next half panel when all eight
// warps have said that they are done with the last.
//
//   multiply(slice)         8 products, asynchronous: 2 branches x 4 quarters
//   draw(slice + 1, row 0)  meanwhile, in float32: no register of a product is written
//   wait                    the fragment may be overwritten, the last half panel replaced
//   draw(slice + 1, row 1)
//
// Ceiling, from the machine code for sm_90a with one seed, per weight: 37 instructions with
// Gaussian noise (25 the normal, 2 the two fma, 10 unpacking, packing, addresses and loops), 22
// with Rademacher noise. A multiprocessor issues 128 a cycle, so a weight takes 0.29 (0.17) cycles.
// In these, at 128 tokens:
//   matrix unit    2 branches x 128 tokens / 4096 multiply-adds a cycle = 0.06 cycles
//   shared memory  4 KiB a product of 1024 weights of one branch at 128 bytes a cycle = 0.06 cycles
//   second cache   2 bytes of W and 2 x 2 x 128 / 128 of x: 6 bytes, 16 (32) a cycle; taken here to
//                  give a multiprocessor 24 to 39 a cycle
// Noise is what is waited for (with Rademacher noise, perhaps the second cache), and the rest hides
// behind it: 1.6 (2.8) TB/s of weights on 132 multiprocessors at 1.8 GHz.
//
// Where it should pay, in cycles a weight: scratch tiles take 27 (11) instructions, 0.21 (0.09),
// hide a write of 4 bytes behind them or not (0.17 at 24 a cycle), and then the vendor's product
// reads the 4 bytes again: 0.39 (0.34) at up to 128 tokens, against 0.29 (0.17) here. linear.cu
// takes 0.29 (0.16) for every 64 tokens. So: 65 to 128 tokens a branch. From 129 on the noise is
// drawn twice, 0.58 (0.34) against about 0.4 (0.35). Sums of 256 tokens fit the registers only with
// 64 outputs a block; x is then 16 bytes a weight, 42 a cycle, more than the second cache gives: it
// would take clusters that share x or exchange displaced weights. One block a multiprocessor (128
// of 254 registers are sums) leaves two warps a scheduler to hide latencies; whether that suffices,
// only a device can tell. All of this is arithmetic: the kernel has not run on a device, and is off
// (csrc/README.md says how to switch it on).
#include "access.h"
#include "hopper.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kOutputs = 128;  // of a block, 64 a warpgroup
constexpr int kTokens = kProductTokens;
constexpr int kStages = 2;
// Each part's sums are four bytes an output, written and read again.
constexpr int kMostParts = 8;
constexpr int kBoxBytes = kTokens * kBoxColumns * 2;
constexpr int kFactors = 2 * 4 * kBoxBytes;  // of a stage: branch, quarter; then the weights
constexpr int kStageBytes = kFactors + 4 * kBoxBytes;
// Boxes lie at multiples of 1024 bytes; the start of shared memory may not.
constexpr size_t kShared = size_t{kStages} * kStageBytes + 2 * kStages * sizeof(uint64_t) + 1024;
static_assert(kOutputs == kTokens, "boxes of weights and of tokens have one size");

struct Split {
  uint32_t first_group;
  int halves;       // half panels of the matrix
  int halves_each;  // of a block
  int parts;
};

// A thread's share of a slice in one of its two rows, in float32: columns 2q, 2q + 1, 2q + 8, 2q +
// 9 of each quarter, for both branches, from the words that hold the weights.
template <DType T, Distribution kind>
ZK_DEVICE void displace_row(const LinearArgs& a, int64_t first, bool two, uint32_t noise_row,
                            uint32_t group, uint32_t l, const uint32_t raw[4][2],
                            float acc[2][4][4]) {
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) unpack_words<T, 2>(raw[j], acc[0][j]);
  ZK_UNROLL
  for (int j = 0; j < 4; ++j) {
    ZK_UNROLL
    for (int i = 0; i < 4; ++i) acc[1][j][i] = acc[0][j][i];
  }
  ZK_NO_UNROLL
  for (int64_t k = 0; k < a.terms.count; ++k) {
    const float c0 = a.coeffs[first * a.terms.count + k];
    const float c1 = two ? a.coeffs[(first + 1) * a.terms.count + k] : 0.0f;
    if (c0 == 0.0f && c1 == 0.0f) continue;
    const Draw<kind> draw(row_state(static_cast<uint64_t>(a.terms.seeds[k]), noise_row,
                                    a.place.param_id, Stream::direction),
                          group, l);
    ZK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i / 2 * 8 + i % 2), z);
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc[0][j][i] = fma32(c0, z[j], acc[0][j][i]);
        acc[1][j][i] = fma32(c1, z[j], acc[1][j][i]);
      }
    }
  }
}

// A thread's sums of a branch: of outputs n and n + 8, tokens 0, 1, 8, 9, 16 .. of those `left`.
template <DType T>
ZK_DEVICE void store_sums(char* y, int64_t at, int64_t rows, int64_t n, int64_t left,
                          const float sum[64], float bias, float bias8) {
  constexpr int bytes = T == DType::f32 ? 4 : 2;
  const auto store = [](char* to, float x) {
    if constexpr (T == DType::f32)
      *reinterpret_cast<float*>(to) = x;
    else
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(dev::pack<T>(x, 0.0f));
  };
  const bool here = n < rows, here8 = n + 8 < rows;
  const int tokens = left < kTokens ? static_cast<int>(left) : kTokens;
  char* to = y + at * bytes;
  ZK_UNROLL
  for (int i = 0; i < 64; i += 4) {
    ZK_UNROLL
    for (int t = 0; t < 2; ++t) {
      if (i * 2 + t < tokens) {
        char* const row = to + t * rows * bytes;
        if (here) store(row, sum[i + t] + bias);
        if (here8) store(row + 8 * bytes, sum[i + t + 2] + bias8);
      }
    }
    to += 8 * rows * bytes;
  }
}

template <DType T, Distribution kind>
ZK_KERNEL void ZK_BOUNDS(kThreads, 1)
    linear_sm90_kernel(const ZK_GRID_CONSTANT dev::TensorMap x,
                       const ZK_GRID_CONSTANT dev::TensorMap w, const LinearArgs a,
                       const Split split, float* partial) {
#if ZK_HOPPER
  const int warp = dev::thread() / 32, lane = dev::thread() % 32, q = lane % 4, r = lane / 4;
  const int n0 = static_cast<int>(dev::block_x()) * kOutputs;
  const int token0 = static_cast<int>(dev::block_y()) * kTokens;
  const int pair = static_cast<int>(dev::block_z()) / split.parts;
  const int part = static_cast<int>(dev::block_z()) % split.parts;
  const int64_t first = int64_t{2} * pair;
  const bool two = first + 1 < a.branches;
  // Both branches may have the same tokens.
  const bool own = two && a.x_branch_stride != 0;
  const int h0 = part * split.halves_each;
  const int h1 = h0 + split.halves_each < split.halves ? h0 + split.halves_each : split.halves;

  const uint32_t start = dev::shared_address(dev::shared());
  char* const memory = dev::shared() + ((start + 1023u) / 1024u * 1024u - start);
  const uint32_t base = dev::shared_address(memory);
  auto* const full = reinterpret_cast<dev::Barrier*>(memory + kStages * kStageBytes);
  dev::Barrier* const empty = full + kStages;
  const auto load = [&](int h, int stage) {
    char* to = memory + stage * kStageBytes;
    const int col = h / 2 * 256 + h % 2 * kBoxColumns;
    dev::arrive_expecting(full + stage, static_cast<uint32_t>((own ? 12 : 8) * kBoxBytes));
    const int plane = a.x_branch_stride ? static_cast<int>(first) : 0;
    ZK_NO_UNROLL
    for (int j = 0; j < 4; ++j) {
      dev::load_box(to + kFactors + j * kBoxBytes, w, col + 64 * j, n0, 0, full + stage);
      dev::load_box(to + j * kBoxBytes, x, col + 64 * j, token0, plane, full + stage);
      if (own)
        dev::load_box(to + (4 + j) * kBoxBytes, x, col + 64 * j, token0, plane + 1, full + stage);
    }
  };
  if (dev::thread() == 0) {
    for (int s = 0; s < kStages; ++s) {
      dev::make_barrier(full + s, 1);
      dev::make_barrier(empty + s, kThreads / 32);
    }
    dev::fence_barriers();
  }
  dev::barrier();
  if (dev::thread() == 0) {
    for (int s = 0; s < kStages; ++s)
      if (h0 + s < h1) load(h0 + s, s);
  }
  dev::warp_barrier();

  float sum[2][64];
  ZK_UNROLL
  for (int i = 0; i < 128; ++i) sum[i / 64][i % 64] = 0.0f;
  uint32_t left[2][4][4];  // branch, quarter, register of the fragment
  const uint32_t own_row = static_cast<uint32_t>(warp * 16 + r);
  const uint32_t noise_row = a.place.row_offset + static_cast<uint32_t>(n0) + own_row;
  // ldmatrix: lanes 0 to 7 and 8 to 15 point at chunks 0 and 1 of a quarter's slice, lanes 16 to 31
  // at the next quarter's.
  const uint32_t matrix_row = static_cast<uint32_t>(warp * 16 + lane % 8);

  const auto stage_of = [&](int slice) {
    return base + static_cast<uint32_t>(slice / 2 % kStages * kStageBytes);
  };
  float acc[2][4][4];
  const auto draw = [&](int slice, int row) {
    const int h = h0 + slice / 2;
    const uint32_t held = stage_of(slice) + kFactors +
                          static_cast<uint32_t>(lane / 16 * kBoxBytes) +
                          swizzled(matrix_row + static_cast<uint32_t>(row * 8),
                                   static_cast<uint32_t>(slice % 2 * 2 + lane / 8 % 2));
    uint32_t raw[4][2];
    ZK_UNROLL
    for (int j = 0; j < 4; j += 2) {
      uint32_t got[4];
      dev::load_matrices(held + static_cast<uint32_t>(j * kBoxBytes), got);
      raw[j][0] = got[0];
      raw[j][1] = got[1];
      raw[j + 1][0] = got[2];
      raw[j + 1][1] = got[3];
    }
    displace_row<T, kind>(a, first, two, noise_row + static_cast<uint32_t>(row * 8),
                          split.first_group + static_cast<uint32_t>(h) / 2u,
                          static_cast<uint32_t>(h % 2 * kBoxColumns + slice % 2 * 16 + q * 2), raw,
                          acc);
  };
  const auto pack_row = [&](int row) {
    ZK_UNROLL
    for (int g = 0; g < 2; ++g) {
      ZK_UNROLL
      for (int j = 0; j < 4; ++j) {
        left[g][j][row] = dev::pack<T>(acc[g][j][0], acc[g][j][1]);
        left[g][j][row + 2] = dev::pack<T>(acc[g][j][2], acc[g][j][3]);
      }
    }
  };
  const auto multiply = [&](int slice) {
    const uint32_t at = stage_of(slice) + static_cast<uint32_t>(slice % 2 * 32);
    const uint32_t other = at + (own ? 4 * kBoxBytes : 0);
    dev::begin_products();
    ZK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const auto box = static_cast<uint32_t>(j * kBoxBytes);
      dev::product<T>(sum[0], left[0][j], factor_at(at, box));
      dev::product<T>(sum[1], left[1][j], factor_at(other, box));
    }
    dev::commit_products();
  };

  const int slices = 2 * (h1 - h0);
  dev::wait(full, 0);
  draw(0, 0);
  pack_row(0);
  draw(0, 1);
  pack_row(1);
  ZK_NO_UNROLL
  for (int slice = 0; slice + 1 < slices; ++slice) {
    multiply(slice);
    // Meanwhile the next slice's noise; its registers are not those of the products.
    const int turn = slice / 2, stage = turn % kStages;
    const uint32_t parity = static_cast<uint32_t>(turn / kStages) & 1u;
    if (slice % 2)
      dev::wait(full + (turn + 1) % kStages, static_cast<uint32_t>((turn + 1) / kStages) & 1u);
    draw(slice + 1, 0);
    dev::wait_products<0>();
    if (slice % 2) {  // the half panel has been used: another takes its place
      // All lanes read weights there, by other means than the copy that will write.
      dev::fence_copies();
      dev::warp_barrier();
      if (lane == 0) dev::arrive(empty + stage);
      if (dev::thread() == 0 && h0 + turn + kStages < h1) {
        dev::wait(empty + stage, parity);
        load(h0 + turn + kStages, stage);
      }
      dev::warp_barrier();
    }
    pack_row(0);
    draw(slice + 1, 1);
    pack_row(1);
  }
  multiply(slices - 1);
  dev::wait_products<0>();
  dev::settle(sum[0]);
  dev::settle(sum[1]);

  const int64_t n = n0 + static_cast<int>(own_row), rows = a.w.rows;
  const int token = token0 + q * 2;
  const auto bias_of = [&](int64_t branch, int64_t n) {
    if (!a.bias || n >= rows) return 0.0f;
    return load_one(static_cast<const char*>(a.bias), branch * rows + n, a.bias_dtype);
  };
  ZK_UNROLL
  for (int g = 0; g < 2; ++g) {
    const int64_t branch = first + g, to = (branch * a.tokens + token) * rows + n;
    if (branch >= a.branches) continue;
    if (partial) {
      const int64_t of_part = int64_t{part} * a.branches * a.tokens * rows;
      store_sums<DType::f32>(reinterpret_cast<char*>(partial), of_part + to, rows, n,
                             a.tokens - token, sum[g], 0.0f, 0.0f);
    } else {
      store_sums<T>(a.y, to, rows, n, a.tokens - token, sum[g], bias_of(branch, n),
                    bias_of(branch, n + 8));
    }
  }
#endif
}

int64_t blocks_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

}  // namespace

bool has_sm90a() {
#if defined(ZK_SM90A) || !defined(__CUDACC__)
  return true;
#else
  return false;
#endif
}

// A part takes whole groups of columns. Time is waves of blocks, each as long as its groups and
// about half a group for its beginning and end.
int linear_sm90_parts(int64_t rows, int64_t cols, int64_t tokens, int64_t branches,
                      int multiprocessors) {
  const int64_t groups = blocks_of(cols, kGaussianGroup);
  const int64_t blocks =
      blocks_of(rows, kOutputs) * blocks_of(tokens, kTokens) * blocks_of(branches, 2);
  int64_t best = 1, least = 0;
  for (int64_t parts = 1; parts <= kMostParts && parts <= groups; ++parts) {
    const int64_t each = blocks_of(groups, parts);
    if (blocks_of(groups, each) != parts) continue;
    const int64_t time = blocks_of(blocks * parts, multiprocessors) * (2 * each + 1);
    if (parts == 1 || time < least) {
      best = parts;
      least = time;
    }
  }
  return static_cast<int>(best);
}

const char* linear_sm90(const LinearArgs& a, float* partial, int parts, void* stream) {
  if (!has_sm90a()) return "this build has no code for sm_90a";
  if (a.tokens == 0 || a.branches == 0 || a.w.rows == 0) return nullptr;
  constexpr int64_t most = 0x7FFFFFFF - 2 * kOutputs;
  if (a.tokens > most || a.w.cols > most || a.w.rows > most) return "the product is too large";
  if (a.w.dtype == DType::f32) return "this product takes 16-bit weights";
  if (a.pending.count > 0) return "this product takes no pending update";
  if (parts < 1 || (parts > 1 && !partial)) return "a product in parts needs memory for their sums";
  const Cut cut = cut_columns(a.place.col_offset, a.w.cols, false);
  const int groups = static_cast<int>(cut.groups);
  const int each = static_cast<int>(blocks_of(groups, parts));
  if (each * (parts - 1) >= groups) return "a product has a part without columns";
  dev::TensorMap x{}, w{};
  BoxedTensor t;
  t.cols = a.w.cols;
  t.box_rows = kTokens;
  t.data = a.x;
  t.rows = a.tokens;
  t.planes = a.x_branch_stride ? a.branches : 1;
  t.row_bytes = a.w.cols * 2;
  t.plane_bytes = a.tokens * t.row_bytes;
  if (const char* error = dev::encode(t, x)) return error;
  t.data = a.w.data;
  t.rows = a.w.rows;
  t.planes = 1;
  t.row_bytes = a.w.rows == 1 ? a.w.cols * 2 : a.w.row_stride * 2;
  t.plane_bytes = a.w.rows * t.row_bytes;
  if (const char* error = dev::encode(t, w)) return error;
  const bool normal = a.distribution == Distribution::gaussian;
  const auto kernel = a.w.dtype == DType::bf16
                          ? normal ? linear_sm90_kernel<DType::bf16, Distribution::gaussian>
                                   : linear_sm90_kernel<DType::bf16, Distribution::rademacher>
                      : normal ? linear_sm90_kernel<DType::f16, Distribution::gaussian>
                               : linear_sm90_kernel<DType::f16, Distribution::rademacher>;
  const Split split{cut.first_group, 2 * groups, 2 * each, parts};
  const int64_t blocks = blocks_of(a.w.rows, kOutputs);
  const char* error =
      launch(kernel, blocks, blocks_of(a.tokens, kTokens), blocks_of(a.branches, 2) * parts,
             kThreads, kShared, stream, x, w, a, split, parts > 1 ? partial : nullptr);
  if (error || parts == 1) return error;
  return add_parts(a, partial, parts, stream);
}

}  // namespace zk
