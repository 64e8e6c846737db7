// kernel<<<grid, threads, shared, stream>>>(args), checked; or its emulation.
#pragma once

#include "device.h"

namespace zk {

#if defined(__CUDACC__)
// Null, or what an error says; it is taken back, so that no later launch is blamed for it.
inline const char* reason(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class... Formal, class... Args>
const char* launch(void (*kernel)(Formal...), int64_t gx, int64_t gy, int64_t gz, int threads,
                   size_t shared_bytes, void* stream, Args... args) {
  if (gx > 0x7FFFFFFF || gy > 65535 || gz > 65535) return "the grid is too large";
  // Asked for on the current device, which may be another one at every launch.
  if (shared_bytes > size_t{48} << 10) {
    const char* error = reason(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes)));
    if (error) return error;
  }
  const dim3 grid(static_cast<unsigned>(gx), static_cast<unsigned>(gy), static_cast<unsigned>(gz));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return reason(cudaGetLastError());
}
#else
using emulate::launch;
#endif

}  // namespace zk
