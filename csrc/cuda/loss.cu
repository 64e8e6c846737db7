// Cross-entropy of a chunk of the vocabulary's logits, read once.
//
//   loss = log sum_v exp(logits[v]) - logits[target] = top + log(total) - picked
//
// `top` is the highest logit so far and total = sum_v exp(logits[v] - top); both and `picked` go
// from chunk to chunk in memory, the last chunk leaves the loss. What no chunk picks, of a target
// that is no entry, stays NaN. Work: one pass over the logits, about 18 instructions a logit, one
// exponential; torch's own operators read and write float32 copies of them six times.
//
// Block: a row of logits, that is a token of a branch. A thread keeps a highest logit and a sum of
// its own; they are joined by lanes, then by warps, in an order that depends on nothing.
#include "access.h"
#include "launch.h"

namespace zk {
namespace {

// exp(x) for x <= 0, from 1.6e-38 on; NaN stays NaN. As the C++ backend's.
ZK_DEVICE float exponential(float x) {
  constexpr float p0 = kExp[0], p1 = kExp[1], p2 = kExp[2], p3 = kExp[3], p4 = kExp[4],
                  p5 = kExp[5], p6 = kExp[6];
  const float low = x < -87.0f ? -87.0f : x;
  const float t = fma32(low, 1.44269504f, 12582912.0f);  // its low bits are round(x / ln 2)
  const float n = t - 12582912.0f;
  const float r = fma32(n, 2.12194440e-4f, fma32(n, -0.693359375f, low));
  float p = fma32(p6, r, p5);
  p = fma32(p, r, p4);
  p = fma32(p, r, p3);
  p = fma32(p, r, p2);
  p = fma32(p, r, p1);
  p = fma32(p, r, p0);
  return p * bits_float((float_bits(t) + 127u) << 23);
}

// A sum of exp(value - top).
struct Sum {
  float top = bits_float(0xFF800000u), total = 0.0f;

  // What is subtracted; of nothing or of minus infinity alone, zero.
  ZK_DEVICE float origin() const { return top == bits_float(0xFF800000u) ? 0.0f : top; }

  template <int n>
  ZK_DEVICE void add(const float* v) {
    float high = top;
    ZK_UNROLL
    for (int i = 0; i < n; ++i) high = v[i] > high ? v[i] : high;
    if (high > top) {
      total *= exponential(top - high);
      top = high;
    }
    const float from = origin();
    ZK_UNROLL
    for (int i = 0; i < n; ++i) total += exponential(v[i] - from);
  }

  ZK_DEVICE void join(float other_top, float other_total) {
    const float own_top = top;
    top = other_top > top ? other_top : top;
    const float from = origin();
    const float own = total * exponential(own_top - from);
    total = own + other_total * exponential(other_top - from);
  }
};

template <DType T>
ZK_KERNEL void ZK_BOUNDS(kThreads, 4) chunk_loss_kernel(const LossArgs a) {
  constexpr int V = T == DType::f32 ? 4 : 8;
  const int64_t row = dev::block_x();
  const char* const logits = a.logits + row * a.cols * (16 / V);
  Sum sum;
  int64_t done = 0;
  if (a.aligned) {
    done = a.cols / V * V;
    ZK_NO_UNROLL
    for (int64_t c = int64_t{dev::thread()} * V; c < done; c += kThreads * V) {
      Run<V> run;
      run.load(dev::global(logits + c * (16 / V)), T);
      float v[V];
      run.unpack(T, v);
      sum.add<V>(v);
    }
  }
  ZK_NO_UNROLL
  for (int64_t c = done + dev::thread(); c < a.cols; c += kThreads) {
    const float v = load_one(logits, c, T);
    sum.add<1>(&v);
  }
  ZK_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const float top = dev::shuffle_xor(sum.top, mask), total = dev::shuffle_xor(sum.total, mask);
    sum.join(top, total);
  }
  auto* const warps = reinterpret_cast<float*>(dev::shared());
  if (dev::thread() % 32 == 0) {
    warps[dev::thread() / 32 * 2] = sum.top;
    warps[dev::thread() / 32 * 2 + 1] = sum.total;
  }
  dev::barrier();
  if (dev::thread() > 0) return;
  ZK_NO_UNROLL
  for (int w = 1; w < kThreads / 32; ++w) sum.join(warps[2 * w], warps[2 * w + 1]);

  const int64_t target = a.targets[row % a.tokens];
  const bool ignored = target == a.ignored;
  if (!ignored && (target < 0 || target >= a.vocab)) {
    a.flag[1] = a.vocab;
    a.flag[0] = target;
  }
  float picked = bits_float(0x7FC00000u);
  if (a.start > 0) {
    sum.join(a.state[row], a.state[a.rows + row]);
    picked = a.losses[row];
  }
  const int64_t at = target - a.start;
  if (at >= 0 && at < a.cols) picked = load_one(logits, at, T);
  a.state[row] = sum.top;
  a.state[a.rows + row] = sum.total;
  const bool last = a.start + a.cols == a.vocab;
  a.losses[row] = !last ? picked : ignored ? 0.0f : (sum.top - picked) + logf(sum.total);
}

}  // namespace

const char* chunk_loss(const LossArgs& a, void* stream) {
  if (a.rows == 0) return nullptr;
  const auto kernel = a.dtype == DType::f32    ? chunk_loss_kernel<DType::f32>
                      : a.dtype == DType::bf16 ? chunk_loss_kernel<DType::bf16>
                                               : chunk_loss_kernel<DType::f16>;
  return launch(kernel, a.rows, 1, 1, kThreads, kThreads / 32 * 2 * sizeof(float), stream, a);
}

}  // namespace zk
