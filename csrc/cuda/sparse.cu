// Under a mask: what the few elements that move add to a product and to rows that are looked up.
//
//   y[g, t, o] = round(plain[g, t, o] + sum_e d[g, e] x[g, t, i(e)] + bias[g, o])
//
// `plain` is torch's product of all branches with the weight as it is stored, d the displaced
// values of the mask less what the weight holds (vectors.cu), both float32 from here on: the
// correction keeps its low bits and is rounded once. The elements of an output, (o, i) -> o *
// inputs + i, are neighbours in the sorted list; their sum begins at zero and goes by the list, one
// fma an element.
//
// Block: 64 outputs x 64 tokens of one branch. A warp owns 8 of the outputs. It finds their first
// element by a search with 32 probes a step, takes the list 32 elements at a time, one a lane, and
// hands them round; every lane adds each element to its own two tokens' sums in shared memory. So
// no two threads share a sum, nothing depends on the order of threads, and a row with many elements
// costs no lane more than another. Then the sums are added to y along the outputs, 64 adjacent ones
// of a token at a time.
// Grid: outputs, tokens, branches.
//
// An element costs 38 instructions for 64 tokens in the machine code for sm_80: two loads of x, two
// fma, two loads and stores of shared memory, three shuffles, the rest addresses; and 3 its place
// in the weight. A load is one run of adjacent bytes where tokens lie next to each other
// (x_token_stride = 1), 32 runs where columns do: the caller transposes x when the elements are
// many enough to pay for it. Work is nnz * tokens and one pass over the y that is met; a block that
// meets no element and has nothing to add returns.
//
// Source: the sparse products of Meerkat (arXiv 2506.03337) have no public kernel; this one is
// ours.
#include "access.h"
#include "launch.h"

namespace zk {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kOutputs = 64, kTokens = 64;
constexpr int kOwn = kOutputs / kWarps;
constexpr int kRow = kTokens + 1;  // odd: columns of the tile lie in different banks
constexpr int kAtOnce = 4;         // elements whose activations are asked for together

// The first place of a sorted list that is not below `value`, for a whole warp.
ZK_DEVICE int64_t first_from(const int64_t* list, int64_t count, int64_t value) {
  const int lane = dev::thread() % 32;
  int64_t low = 0, high = count;
  ZK_NO_UNROLL
  while (low < high) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t at = low + step * (lane + 1) - 1;
    low += step * dev::count_lanes(at < high && list[at] < value);
    const int64_t next = low + step - 1;
    high = next < high ? next : high;
  }
  return low;
}

template <DType T>
ZK_KERNEL void ZK_BOUNDS(kThreads, 2) sparse_correct_kernel(const CorrectArgs a) {
  const int warp = dev::thread() / 32, lane = dev::thread() % 32;
  auto* sums = reinterpret_cast<float*>(dev::shared());
  auto* met = reinterpret_cast<int*>(sums + kOutputs * kRow);
  const int64_t branch = dev::block_z();
  const int64_t o0 = dev::block_x() * kOutputs, t0 = dev::block_y() * kTokens;
  float* const own = sums + warp * kOwn * kRow + lane;
  ZK_UNROLL
  for (int o = 0; o < kOwn; ++o) own[o * kRow] = own[o * kRow + 32] = 0.0f;

  const auto inputs = static_cast<uint32_t>(a.inputs);
  const int64_t from = (o0 + warp * kOwn) * a.inputs;
  const int64_t end =
      (o0 + warp * kOwn + kOwn) * a.inputs;  // past the outputs: no element is there
  const bool inside[2] = {t0 + lane < a.tokens, t0 + lane + 32 < a.tokens};
  const int64_t x0 = branch * a.x_branch_stride + (t0 + lane) * a.x_token_stride;
  const int64_t x_half = 32 * a.x_token_stride;
  const int64_t first = first_from(a.indices, a.count, from);
  int64_t at = first;
  int here = 32;
  ZK_NO_UNROLL
  while (here == 32) {
    const int64_t e = at + lane;
    const int64_t flat = e < a.count ? a.indices[e] : end;
    const bool mine = flat < end;
    int32_t output = 0, input = 0;
    float d = 0.0f;
    if (mine) {
      uint32_t rest;
      output = static_cast<int32_t>(divide(flat - from, inputs, rest));
      input = static_cast<int32_t>(rest);
      d = a.difference[branch * a.count + (a.order ? a.order[e] : e)];
    }
    here = dev::count_lanes(mine);
    ZK_NO_UNROLL
    for (int j = 0; j < here; j += kAtOnce) {
      float v[kAtOnce][2];
      ZK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t place = x0 + dev::from_lane(input, j + i) * a.x_column_stride;
        ZK_UNROLL
        for (int half = 0; half < 2; ++half)
          v[i][half] =
              j + i < here && inside[half] ? load_one(a.x, place + half * x_half, T) : 0.0f;
      }
      ZK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const float c = dev::from_lane(d, j + i);
        float* const to = own + dev::from_lane(output, j + i) * kRow;
        to[0] = fma32(c, v[i][0], to[0]);
        to[32] = fma32(c, v[i][1], to[32]);
      }
    }
    at += here;
  }
  if (lane == 0) met[warp] = at > first;
  dev::barrier();

  bool changes = a.bias || a.plain != a.y;
  ZK_UNROLL
  for (int w = 0; w < kWarps; ++w) changes = changes || met[w];
  if (!changes) return;
  const int column = dev::thread() % kOutputs;
  const int64_t o = o0 + column;
  if (o >= a.outputs) return;
  float bias = 0.0f;
  if (a.bias)
    bias = load_one(static_cast<const char*>(a.bias), branch * a.outputs + o, a.bias_dtype);
  ZK_NO_UNROLL
  for (int token = dev::thread() / kOutputs; token < kTokens; token += kThreads / kOutputs) {
    const int64_t t = t0 + token;
    if (t >= a.tokens) return;
    float y = load_one(a.plain, branch * a.plain_branch_stride + t * a.outputs + o, T);
    y += sums[column * kRow + token];
    if (a.bias) y += bias;
    store_one(a.y, (branch * a.tokens + t) * a.outputs + o, T, y);
  }
}

// A warp a row.
ZK_KERNEL void ZK_BOUNDS(kThreads, 2) sparse_rows_kernel(const RowsArgs a) {
  const int lane = dev::thread() % 32;
  const int64_t branch = dev::block_y(), token = dev::block_x() * kWarps + dev::thread() / 32;
  if (token >= a.tokens) return;
  const int64_t which = (a.own_ids ? branch * a.tokens : 0) + token;
  const int64_t id = a.wide_ids ? static_cast<const int64_t*>(a.ids)[which]
                                : static_cast<int64_t>(static_cast<const int32_t*>(a.ids)[which]);
  const int64_t from = id * a.cols;
  const int64_t row = (branch * a.tokens + token) * a.cols;
  ZK_NO_UNROLL
  for (int64_t e = first_from(a.indices, a.count, from) + lane;
       e < a.count && a.indices[e] < from + a.cols; e += 32)
    store_one(a.out, row + a.indices[e] - from, a.dtype, a.values[branch * a.count + e]);
}

}  // namespace

const char* sparse_correct(const CorrectArgs& a, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.outputs == 0) return nullptr;
  if (a.inputs > 0x7FFFFFFF) return "the product is too large";
  const auto kernel = a.dtype == DType::f32    ? sparse_correct_kernel<DType::f32>
                      : a.dtype == DType::bf16 ? sparse_correct_kernel<DType::bf16>
                                               : sparse_correct_kernel<DType::f16>;
  return launch(kernel, (a.outputs + kOutputs - 1) / kOutputs, (a.tokens + kTokens - 1) / kTokens,
                a.branches, kThreads, kOutputs * kRow * sizeof(float) + kWarps * sizeof(int),
                stream, a);
}

const char* sparse_rows(const RowsArgs& a, void* stream) {
  if (a.tokens == 0 || a.branches == 0 || a.cols == 0 || a.count == 0) return nullptr;
  return launch(sparse_rows_kernel, (a.tokens + kWarps - 1) / kWarps, a.branches, 1, kThreads, 0,
                stream, a);
}

}  // namespace zk
