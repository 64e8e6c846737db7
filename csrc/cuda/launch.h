// kernel<<<grid, threads, shared, stream>>>(args), checked; or its emulation.
#pragma once

#include "device.h"

namespace zk {

#if defined(__CUDACC__)
template <class... Formal, class... Args>
const char* launch(void (*kernel)(Formal...), int64_t gx, int64_t gy, int64_t gz, int threads,
                   size_t shared_bytes, void* stream, Args... args) {
  if (gx > 0x7FFFFFFF || gy > 65535 || gz > 65535) return "the grid is too large";
  if (shared_bytes > size_t{48} << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  const dim3 grid(static_cast<unsigned>(gx), static_cast<unsigned>(gy), static_cast<unsigned>(gz));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
using emulate::launch;
#endif

}  // namespace zk
