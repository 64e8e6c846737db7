// Included before every source of the CUDA backend when it is built for the host: what would be
// launched goes, with its arguments as the device gets them, to a function the tests set.
#pragma once

#include <tuple>

// The header's own launch runs the kernel itself.
#define launch launch_on_the_host
#include "../../csrc/cuda/device.h"
#undef launch

extern "C" {
// Returns null or what went wrong.
using ZkLaunchHook = const char* (*)(const void* kernel, int64_t gx, int64_t gy, int64_t gz,
                                     int64_t threads, int64_t shared_bytes,
                                     const void* const* arguments, const int64_t* sizes,
                                     int64_t count);
inline __attribute__((visibility("default"), used)) ZkLaunchHook zk_launch_hook = nullptr;
}

namespace zk {
namespace emulate {

template <class... Formal, class... Args>
const char* launch(void (*kernel)(Formal...), int64_t gx, int64_t gy, int64_t gz, int threads,
                   size_t shared_bytes, void*, Args... args) {
  std::tuple<Formal...> formal{args...};
  return std::apply(
      [&](const Formal&... each) {
        const void* arguments[] = {&each...};
        const int64_t sizes[] = {static_cast<int64_t>(sizeof each)...};
        return zk_launch_hook(reinterpret_cast<const void*>(kernel), gx, gy, gz, threads,
                              static_cast<int64_t>(shared_bytes), arguments, sizes,
                              static_cast<int64_t>(sizeof...(Formal)));
      },
      formal);
}

}  // namespace emulate
}  // namespace zk
