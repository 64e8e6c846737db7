// What a kernel may use of a Hopper multiprocessor (sm_90a): boxes of a tensor copied into swizzled
// shared memory (TMA), barriers in shared memory that such copies complete, and products of a
// warpgroup (four warps) that run while its threads go on. Host compilers get emulate_hopper.h.
#pragma once

#include "device.h"

#if defined(__CUDACC__)
#include <cuda.h>

#define ZK_GRID_CONSTANT __grid_constant__
// The host pass of nvcc reads kernels too; every other architecture gets empty ones.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ZK_HOPPER 1
#else
#define ZK_HOPPER 0
#endif
#else
#define ZK_GRID_CONSTANT
#define ZK_HOPPER 1
#endif

namespace zk {

constexpr int kWarpgroup = 128;
constexpr int kBoxColumns = 32;  // 64 bytes, the span within which 16-byte chunks are swizzled
constexpr int kProductTokens = 128;

// Chunk `chunk` of row `row` of a box that lies at a multiple of 512 bytes: chunks of rows 2 i and
// 2 i + 1 are permuted by i % 4, so that eight rows of one chunk meet all banks.
ZK_HD uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 64u + ((chunk ^ (row >> 1 & 3u)) * 16u);
}

// wgmma's descriptor of a right factor whose rows are columns of 64 bytes, swizzled so; `offset`
// from `address` is the first row's first or (columns 16 to 31) third chunk before swizzling. Eight
// rows are 512 bytes; the leading offset is not used.
ZK_HD uint64_t factor_at(uint32_t address, uint32_t offset) {
  const uint32_t low = (address >> 4 | 1u << 16) + offset / 16u;
  return static_cast<uint64_t>(512u >> 4 | 2u << 30) << 32 | low;
}

// A tensor of 16-bit elements [planes, rows, cols] that boxes [1, box_rows, kBoxColumns] are taken
// from; what lies outside reads as zero.
struct BoxedTensor {
  const char* data = nullptr;
  int64_t cols = 0, rows = 0, planes = 1;
  int64_t row_bytes = 0, plane_bytes = 0;
  int box_rows = 1;
};

}  // namespace zk

#if defined(__CUDACC__)
namespace zk {
namespace dev {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// Null, or why the driver refuses. The driver's function is asked for at run time, so that nothing
// is linked against libcuda.
inline const char* encode(const BoxedTensor& t, TensorMap& map) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    cudaGetLastError();  // no later launch is blamed for it
    const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!function) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.cols), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(t.row_bytes),
                                 static_cast<cuuint64_t>(t.plane_bytes)};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(t.box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  // Elements are moved, not computed with: any 16-bit type does.
  const CUresult result =
      function(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<char*>(t.data), sizes, strides,
               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses a tensor";
}

ZK_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One thread makes the barriers, fences, and meets the others at barrier().
ZK_DEVICE void make_barrier(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
}
ZK_DEVICE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Before a thread says that shared memory it read or wrote itself may be copied to or multiplied.
ZK_DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
ZK_DEVICE void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and the phase ends not before `bytes` have been copied.
ZK_DEVICE void arrive_expecting(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; the first one's is 0.
ZK_DEVICE void wait(Barrier* b, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// A box from [plane, row, col] on, to a multiple of 512 bytes; the barrier counts all its bytes.
ZK_DEVICE void load_box(void* to, const TensorMap& map, int col, int row, int plane, Barrier* b) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(row), "r"(plane), "r"(shared_address(b))
      : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i, and
// receives elements 2 q, 2 q + 1 of row r' of each, lane = 4 r' + q.
ZK_DEVICE void load_matrices(uint32_t address, uint32_t d[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// Before the first product after registers that it uses were written.
ZK_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ZK_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the `newest` latest groups: until then no operand of theirs may be touched.
template <int newest>
ZK_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory");
}

// To be called behind wait_products before sums are read: the wait names no register, so the
// compiler might take them sooner.
ZK_DEVICE void settle(float (&d)[64]) {
  ZK_UNROLL
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define ZK_WGMMA(type)                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                   \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20," \
               "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
               "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
               "%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                    \
               : ZK_FLOATS16(0), ZK_FLOATS16(16), ZK_FLOATS16(32), ZK_FLOATS16(48)            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define ZK_FLOATS16(i) ZK_FLOATS4(i), ZK_FLOATS4(i + 4), ZK_FLOATS4(i + 8), ZK_FLOATS4(i + 12)
#define ZK_FLOATS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

// d += a b for one 64 x 16 by 16 x 128 product of a warpgroup, float32 sums; a in registers, b by
// factor_at. The fragments of the PTX manual, wgmma.m64nNk16.
template <DType T>
ZK_DEVICE void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (T == DType::bf16)
    ZK_WGMMA("bf16");
  else
    ZK_WGMMA("f16");
}

#undef ZK_FLOATS4
#undef ZK_FLOATS16
#undef ZK_WGMMA

}  // namespace dev
}  // namespace zk
#else
#include "emulate_hopper.h"
#endif
