// Included before every source of the CUDA backend when it is built for the host: what would be
// launched goes, with its arguments as the device gets them, to a function the tests set. So does
// what the driver is asked to encode, by the code that asks it on a GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
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
// cuTensorMapEncodeTiled.
inline __attribute__((visibility("default"), used)) void* zk_encode_hook = nullptr;
}

namespace zk {
namespace hook {

inline cudaError_t entry_point(const char* symbol, void** found, unsigned, unsigned long long,
                               cudaDriverEntryPointQueryResult* status) {
  *found = std::strcmp(symbol, "cuTensorMapEncodeTiled") ? nullptr : zk_encode_hook;
  *status = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // namespace hook
}  // namespace zk

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

// hopper.h as nvcc reads it for another architecture: no kernel, and the driver's encoder.
#define __CUDACC__
#define __CUDA_ARCH__ 800
#undef __grid_constant__
#define __grid_constant__
#define __cvta_generic_to_shared(p) 0
#define cudaGetDriverEntryPointByVersion zk::hook::entry_point
#define cudaGetLastError() static_cast<void>(0)
#include "../../csrc/cuda/hopper.h"
#undef cudaGetLastError
#undef cudaGetDriverEntryPointByVersion
#undef __CUDA_ARCH__
#undef __CUDACC__
