// Names shared by the kernels and their binding.
#pragma once

#include <cstdint>

namespace zk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Distribution : int { gaussian = 0, rademacher = 1 };

struct Vec16 {
  uint32_t w[4];
};
struct Vec8 {
  uint32_t w[2];
};

}  // namespace zk
