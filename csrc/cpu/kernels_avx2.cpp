// The kernels on AVX2, FMA and F16C.
#define ZK_AVX2
#include "kernels.inl"
#include "product.inl"

namespace zk {

const Kernels& kernels_avx2() {
  static constexpr Kernels table = ZK_KERNEL_TABLE("avx2", ZK_PRODUCT_TABLE);
  return table;
}

}  // namespace zk
