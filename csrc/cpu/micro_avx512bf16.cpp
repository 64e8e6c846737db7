// The innermost loop on pairs of bfloat16 (AVX-512 BF16): products and sums in float32.
#define ZK_AVX512
#include "micro.h"

namespace zk {
namespace {

struct PairDot {
  ZK_INLINE static F add(F c, U w, F x) {
    return {
        _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(x.v))};
  }
};

}  // namespace

const Micro* micro_avx512bf16() {
  static constexpr Micro table[kMicroVectors + 1] = {nullptr, micro<PairDot, 1>, micro<PairDot, 2>,
                                                     micro<PairDot, 3>, micro<PairDot, 4>};
  return table;
}

}  // namespace zk
