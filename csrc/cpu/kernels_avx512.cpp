// The kernels on AVX-512 F, BW, DQ, VL.
#define ZK_AVX512
#include "kernels.inl"
#include "product.inl"

namespace zk {

const Kernels& kernels_avx512() {
  static constexpr Kernels table = ZK_KERNEL_TABLE("avx512", ZK_PRODUCT_TABLE);
  return table;
}

}  // namespace zk
