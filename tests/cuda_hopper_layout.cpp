// What csrc/cuda/hopper.h tells the hardware in bits, for tests/test_cuda_hopper.py.
#include "../csrc/cuda/hopper.h"

extern "C" {
uint64_t t_factor_at(uint32_t address, uint32_t offset) { return zk::factor_at(address, offset); }
uint32_t t_swizzled(uint32_t row, uint32_t chunk) { return zk::swizzled(row, chunk); }
}
