// The kernels on plain C++.
#include "kernels.inl"

namespace zk {

const Kernels& kernels_portable() {
  static constexpr Kernels table = ZK_KERNEL_TABLE("portable");
  return table;
}

}  // namespace zk
