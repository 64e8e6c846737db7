// One product of a warpgroup, done right and with one mistake at a time: each must be seen by
// csrc/cuda/emulate_hopper.h. Used by tests/test_cuda_hopper.py.
#include "../csrc/cuda/hopper.h"
#include "../csrc/cuda/launch.h"

namespace {

using namespace zk;

enum Mistake {
  none,
  no_wait_for_box,
  sum_read,
  sum_written,
  fragment_written,
  factor_overwritten,
  no_begin,
  too_many_bytes,
  too_few_bytes,
  barrier_not_seen,
  barrier_not_fenced,
  no_wait_for_products,
  warp_missing,
  box_misplaced,
  arrival_too_many,
};

// x [128, 32] of ones and the left factor of ones: sums of 16, or NaN where a mistake is silent.
void kernel(const dev::TensorMap x, int mistake, float* out) {
  const uint32_t start = dev::shared_address(dev::shared());
  char* const memory = dev::shared() + ((start + 1023u) / 1024u * 1024u - start);
  auto* const bar = reinterpret_cast<dev::Barrier*>(memory + 8192);
  if (dev::thread() == 0) {
    dev::make_barrier(bar, 1);
    if (mistake != barrier_not_fenced) dev::fence_barriers();
  }
  if (mistake != barrier_not_seen) dev::barrier();
  if (dev::thread() == 0) {
    const uint32_t bytes = mistake == too_few_bytes    ? 8208u
                           : mistake == too_many_bytes ? 8176u
                                                       : 8192u;
    dev::arrive_expecting(bar, bytes);
    if (mistake == arrival_too_many) dev::arrive(bar);
    dev::load_box(memory + (mistake == box_misplaced ? 16 : 0), x, 0, 0, 0, bar);
  }
  if (mistake != no_wait_for_box) dev::wait(bar, 0);
  uint32_t left[4];
  float sum[64];
  for (auto& a : left) a = 0x3F803F80u;
  for (auto& d : sum) d = 0.0f;
  if (mistake != no_begin) dev::begin_products();
  if (mistake != warp_missing || dev::thread() < 96)
    dev::product<DType::bf16>(sum, left, factor_at(dev::shared_address(memory), 32));
  dev::commit_products();
  const float early = sum[3];
  if (mistake == sum_written) sum[3] += 1.0f;
  if (mistake == fragment_written) left[2] = 0;
  if (mistake == factor_overwritten) {
    dev::barrier();
    if (dev::thread() == 0) {
      dev::arrive_expecting(bar, 8192);
      dev::load_box(memory, x, 0, 0, 0, bar);
    }
  }
  if (mistake != no_wait_for_products) dev::wait_products<0>();
  if (mistake == no_wait_for_box) dev::wait(bar, 0);
  for (int i = 0; i < 64; ++i)
    out[dev::thread() * 64 + i] = mistake == sum_read && i == 3 ? early : sum[i];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* t_mistake(int mistake, float* out) {
  static uint16_t ones[128 * 32 + 8];
  auto* data = reinterpret_cast<char*>(ones);
  data += (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  for (int i = 0; i < 128 * 32; ++i) reinterpret_cast<uint16_t*>(data)[i] = 0x3F80u;
  BoxedTensor t;
  t.data = data;
  t.cols = 32;
  t.rows = t.box_rows = 128;
  t.row_bytes = 64;
  t.plane_bytes = 64 * 128;
  dev::TensorMap map{};
  if (const char* error = dev::encode(t, map)) return error;
  return launch(kernel, 1, 1, 1, 128, 8192 + 8 + 1024, nullptr, map, mistake, out);
}
