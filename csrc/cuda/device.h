// What a kernel may use of the machine: thread indices, barriers, shuffles, asynchronous copies,
// the matrix unit, conversions. Compiled by nvcc these are the instructions; compiled by a host
// compiler they are emulate.h's, so that the tests run the very same kernels without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../numeric.h"
#include "types.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ZK_KERNEL __global__
#define ZK_DEVICE __device__ __forceinline__
#define ZK_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define ZK_UNROLL _Pragma("unroll")
#define ZK_NO_UNROLL _Pragma("unroll 1")
#else
#define ZK_KERNEL
#define ZK_DEVICE inline
#define ZK_BOUNDS(threads, blocks)
#define ZK_UNROLL
#define ZK_NO_UNROLL
#include "emulate.h"
#endif

namespace zk {

#if defined(__CUDACC__)
namespace dev {

ZK_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
ZK_DEVICE int64_t block_x() { return blockIdx.x; }
ZK_DEVICE int64_t block_y() { return blockIdx.y; }
ZK_DEVICE int64_t block_z() { return blockIdx.z; }
ZK_DEVICE void barrier() { __syncthreads(); }
// Of the lanes of a warp, in place of all threads.
ZK_DEVICE void warp_barrier() { __syncwarp(); }

// What was read from memory before is read anew after.
ZK_DEVICE void forget() { asm volatile("" ::: "memory"); }

// The compiler knows nothing of x any more: what is computed from it stays inside the loop, where
// it costs an instruction, instead of outside, where it costs registers.
ZK_DEVICE void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

// a b in one instruction. Left alone nvcc makes a product of 64 by 64 bits of it, and ptxas an
// addition of zero to the upper half.
ZK_DEVICE uint64_t wide(uint32_t a, uint32_t b) {
  uint64_t p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
}

// Every lane of the warp takes part.
ZK_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
ZK_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
ZK_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
// What `lane` holds.
ZK_DEVICE int32_t from_lane(int32_t x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
ZK_DEVICE float from_lane(float x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
// How many lanes say yes.
ZK_DEVICE int count_lanes(bool yes) { return __popc(__ballot_sync(0xFFFFFFFFu, yes)); }

extern __shared__ __align__(16) char zk_shared[];
ZK_DEVICE char* shared() { return zk_shared; }

// The compiler may know that p is global memory.
template <class T>
ZK_DEVICE T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

ZK_DEVICE Vec16 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// Of global memory that no kernel writes meanwhile; zeros when not `valid`, without a branch.
ZK_DEVICE Vec16 load16_if(const void* p, bool valid) {
  Vec16 v;
  asm("{\n"
      ".reg .pred valid;\n"
      "setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@valid ld.global.v4.b32 {%0,%1,%2,%3}, [%4];\n"
      "}\n"
      : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
      : "l"(__cvta_generic_to_global(p)), "r"(static_cast<int>(valid)));
  return v;
}
// To global memory, in one instruction: left alone the compiler shares the first eight bytes of a
// store with a shorter one beside it, and stores the others apart.
ZK_DEVICE void store16(void* p, Vec16 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
ZK_DEVICE Vec8 load8(const void* p) {
  const uint2 v = *static_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
ZK_DEVICE void store8(void* p, Vec8 v) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]),
               "r"(v.w[1])
               : "memory");
}

// Sixteen bytes from global to shared memory, past the registers; zeros when not `valid`. The bytes
// are there for the issuing thread after wait_copies, for others after a barrier behind that.
ZK_DEVICE void copy16(void* to, const void* from, bool valid) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
               : "memory");
}
// The same by way of the first-level cache, for lines that other warps of the block read as well.
ZK_DEVICE void copy16_near(void* to, const void* from, bool valid) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
               : "memory");
}
ZK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the `newest` latest groups of this thread.
template <int newest>
ZK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements in shared memory, transposed: lane 8 m + i gives the
// address of row i of matrix m and receives elements r of rows 2 q and 2 q + 1 of each, lane = 4 r
// + q.
ZK_DEVICE void load_turned(const void* p, uint32_t d[4]) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(at)
               : "memory");
}

// d += a b for one 16 x 16 (row) by 16 x 8 (column) product, float32 sums; the fragments of the PTX
// manual, mma.m16n8k16.
template <DType T>
ZK_DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if constexpr (T == DType::bf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Of the special function unit: relative errors of up to 2^-23 (root) and 2^-22 (log2; absolute
// between 1/2 and 2).
ZK_DEVICE float root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ZK_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// hi(0x7F : w) from bit 9 on: w's upper 23 bits below the exponent of 1.0, in one instruction.
ZK_DEVICE float one_to_two(uint32_t w) { return __uint_as_float(__funnelshift_r(w, 0x7Fu, 9)); }

// In three instructions; the compiler takes two more to test the bit of a 64-bit product's half.
ZK_DEVICE void swap_if_odd(uint32_t w, float& x, float& y) {
  const float was_x = x, was_y = y;
  asm("{\n"
      ".reg .pred odd;\n"
      ".reg .b32 bit;\n"
      "and.b32 bit, %4, 1;\n"
      "setp.ne.u32 odd, bit, 0;\n"
      "selp.f32 %0, %3, %2, odd;\n"
      "selp.f32 %1, %2, %3, odd;\n"
      "}\n"
      : "=&f"(x), "=f"(y)
      : "f"(was_x), "f"(was_y), "r"(w));
}

ZK_DEVICE bool either_nan(float x, float y) { return !(x >= y) && !(x < y); }

// Bytes of hi : lo, the lowest one by the lowest four bits of `selector`.
ZK_DEVICE uint32_t bytes_of(uint32_t lo, uint32_t hi, uint32_t selector) {
  return __byte_perm(lo, hi, selector);
}
// x + (w >> 16) in one instruction.
ZK_DEVICE uint32_t add_upper_half(uint32_t x, uint32_t w) {
  uint32_t sum;
  asm("mad.hi.u32 %0, %1, 0x10000, %2;" : "=r"(sum) : "r"(w), "r"(x));
  return sum;
}

// Two values as packed 16-bit numbers, `low` in the low half; to nearest even.
template <DType T>
ZK_DEVICE uint32_t pack(float low, float high) {
  uint32_t u;
  if constexpr (T == DType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  return u;
}
ZK_DEVICE float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }

}  // namespace dev
#endif

template <DType T>
ZK_DEVICE void unpack(uint32_t u, float& low, float& high) {
  if constexpr (T == DType::bf16) {
    low = bits_float(u << 16);
    high = bits_float(u & 0xFFFF0000u);
  } else {
    low = dev::half_to_float(static_cast<uint16_t>(u & 0xFFFFu));
    high = dev::half_to_float(static_cast<uint16_t>(u >> 16));
  }
}

// x rounded to T's grid, as float32.
template <DType T>
ZK_DEVICE float nearest(float x) {
  float low, high;
  unpack<T>(dev::pack<T>(x, 0.0f), low, high);
  return low;
}

// x moved to T's grid by sixteen random bits, as float32: the values of numeric.h without branches.
// A NaN that comes out of an fma is quiet, so it survives the cut; an overflowing float16 becomes
// infinite in `nearest`.
template <DType T>
ZK_DEVICE float stochastic(float x, uint32_t r16) {
  const uint32_t u = float_bits(x), mag = u & 0x7FFFFFFFu;
  const bool special = mag >= 0x7F800000u;
  if constexpr (T == DType::bf16) {
    return bits_float((special ? u : u + r16) & 0xFFFF0000u);
  } else {
    const uint32_t r13 = r16 >> 3;
    const uint32_t normal = (u + r13) & 0xFFFFE000u;
    const float moved = bits_float(mag) * 0x1p24f + static_cast<float>(r13) * 0x1p-13f;
    const uint32_t small = float_bits(floorf(moved) * 0x1p-24f) | (u & 0x80000000u);
    return nearest<T>(bits_float(special ? u : mag >= 0x38800000u ? normal : small));
  }
}

}  // namespace zk
