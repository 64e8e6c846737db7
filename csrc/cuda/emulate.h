// A CUDA grid on the host, for the tests: every thread of a block is a fiber, blocks run one after
// another. It is strict where hardware is lax: shared memory starts as NaN, an asynchronous copy
// lands only when it is waited for, a barrier or warp operation that some thread does not reach is
// an error. ZK_EMULATE_ORDER=reverse runs the threads of a block in the opposite order; `warps` (or
// `reverse warps`) lets a warp run ahead as far as it can before the next one goes on.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "../numeric.h"

namespace zk {
namespace emulate {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t{256} << 10;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  bool waiting = false;
  std::vector<std::vector<Copy>> groups{1};
  int products = 0;  // of a warpgroup, not waited for (emulate_hopper.h)
};

struct Meeting {
  int here = 0;
  uint64_t generation = 0;
};

struct Block {
  int64_t x = 0, y = 0, z = 0;
  int threads = 0;
  int current = 0;
  int alive = 0;
  std::vector<Thread> thread;
  std::vector<char> shared;
  Meeting all;
  std::vector<Meeting> warp;
  std::vector<uint64_t> slots;  // [threads][8]: operands of warp operations
  uint64_t number = 0;          // of blocks begun
  uint64_t progress = 0;        // events that let waiting threads go on, beside meetings
  int bulk_copies = 0;          // in flight
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Block& block() {
  static Block b;
  return b;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "zokernels emulation: %s (block %ld, thread %d)\n", what,
               static_cast<long>(block().x), block().current);
  std::abort();
}

inline void yield() {
  Block& b = block();
  swapcontext(&b.thread[static_cast<size_t>(b.current)].context, &b.scheduler);
}

inline void meet(Meeting& m, int count) {
  Block& b = block();
  if (++m.here == count) {
    m.here = 0;
    ++m.generation;
    return;
  }
  const uint64_t mine = m.generation;
  while (m.generation == mine) {
    b.thread[static_cast<size_t>(b.current)].waiting = true;
    yield();
  }
  b.thread[static_cast<size_t>(b.current)].waiting = false;
}

inline int warp_size(int warp) {
  const int left = block().threads - warp * kWarp;
  return left < kWarp ? left : kWarp;
}

inline void meet_warp() {
  Block& b = block();
  const int warp = b.current / kWarp;
  meet(b.warp[static_cast<size_t>(warp)], warp_size(warp));
}

inline uint64_t* slot(int thread) { return block().slots.data() + thread * 8; }

inline void run_fiber() {
  Block& b = block();
  b.body();
  for (const auto& group : b.thread[static_cast<size_t>(b.current)].groups)
    if (!group.empty()) fail("a thread ended with copies in flight");
  if (b.thread[static_cast<size_t>(b.current)].products)
    fail("a thread ended with products in flight");
  b.thread[static_cast<size_t>(b.current)].done = true;
  --b.alive;
  yield();
}

// Runs one block to its end.
inline void run_block(int threads, size_t shared_bytes) {
  const auto asked = [](const char* what) {
    const char* order = std::getenv("ZK_EMULATE_ORDER");
    return order && std::strstr(order, what);
  };
  static const bool reverse = asked("reverse"), ahead = asked("warps");
  Block& b = block();
  b.threads = b.alive = threads;
  ++b.number;
  b.bulk_copies = 0;
  if (b.thread.size() < static_cast<size_t>(threads)) b.thread.resize(static_cast<size_t>(threads));
  b.shared.assign(shared_bytes + 16, '\xFF');
  b.all = {};
  b.warp.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), {});
  b.slots.assign(static_cast<size_t>(threads) * 8, 0);
  for (int t = 0; t < threads; ++t) {
    Thread& f = b.thread[static_cast<size_t>(t)];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.done = f.waiting = false;
    f.groups.assign(1, {});
    f.products = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  const auto events = [&b, threads] {
    uint64_t n = b.progress + b.all.generation + static_cast<uint64_t>(threads - b.alive);
    for (const Meeting& m : b.warp) n += m.generation;
    return n;
  };
  const int together = ahead ? kWarp : threads;
  while (b.alive) {
    const uint64_t before = events();
    for (int first = 0; first < threads; first += together) {
      uint64_t last;
      do {
        last = events();
        for (int i = first; i < first + together && i < threads; ++i) {
          b.current = reverse ? threads - 1 - i : i;
          Thread& f = b.thread[static_cast<size_t>(b.current)];
          if (!f.done) swapcontext(&b.scheduler, &f.context);
        }
      } while (ahead && events() != last);
    }
    if (events() == before) fail("some threads wait for others that have ended or wait elsewhere");
  }
  if (b.bulk_copies) fail("a block ended with bulk copies in flight");
}

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

template <class... Formal, class... Args>
const char* launch(void (*kernel)(Formal...), int64_t gx, int64_t gy, int64_t gz, int threads,
                   size_t shared_bytes, void*, Args... args) {
  Block& b = block();
  b.body = [&] { kernel(args...); };
  for (int64_t z = 0; z < gz; ++z)
    for (int64_t y = 0; y < gy; ++y)
      for (int64_t x = 0; x < gx; ++x) {
        b.x = x;
        b.y = y;
        b.z = z;
        run_block(threads, shared_bytes);
      }
  return nullptr;
}

}  // namespace emulate

namespace dev {

inline int thread() { return emulate::block().current; }
inline int64_t block_x() { return emulate::block().x; }
inline int64_t block_y() { return emulate::block().y; }
inline int64_t block_z() { return emulate::block().z; }
inline void forget() {}
inline void opaque(uint32_t&) {}
inline void barrier() { emulate::meet(emulate::block().all, emulate::block().threads); }
inline void warp_barrier() { emulate::meet_warp(); }

template <class T>
T shuffle_xor(T x, int mask) {
  const int me = thread();
  std::memcpy(emulate::slot(me), &x, sizeof x);
  emulate::meet_warp();
  T y;
  std::memcpy(&y, emulate::slot(me ^ mask), sizeof y);
  emulate::meet_warp();
  return y;
}

template <class T>
T from_lane(T x, int lane) {
  const int me = thread();
  std::memcpy(emulate::slot(me), &x, sizeof x);
  emulate::meet_warp();
  T y;
  std::memcpy(&y, emulate::slot(me / emulate::kWarp * emulate::kWarp + lane), sizeof y);
  emulate::meet_warp();
  return y;
}

inline int count_lanes(bool yes) {
  const int me = thread(), first = me / emulate::kWarp * emulate::kWarp;
  *emulate::slot(me) = yes;
  emulate::meet_warp();
  int count = 0;
  for (int lane = 0; lane < emulate::warp_size(me / emulate::kWarp); ++lane)
    count += static_cast<int>(*emulate::slot(first + lane));
  emulate::meet_warp();
  return count;
}

inline char* shared() {
  const auto p = reinterpret_cast<uintptr_t>(emulate::block().shared.data());
  return reinterpret_cast<char*>((p + 15) / 16 * 16);
}

inline void aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emulate::fail("an access is not aligned to its size");
}
inline Vec16 load16(const void* p) {
  aligned(p, 16);
  Vec16 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Vec16 load16_if(const void* p, bool valid) {
  return valid ? load16(p) : Vec16{{0u, 0u, 0u, 0u}};
}
inline void store16(void* p, Vec16 v) {
  aligned(p, 16);
  std::memcpy(p, &v, 16);
}
inline Vec8 load8(const void* p) {
  aligned(p, 8);
  Vec8 v;
  std::memcpy(&v, p, 8);
  return v;
}
inline void store8(void* p, Vec8 v) {
  aligned(p, 8);
  std::memcpy(p, &v, 8);
}

inline void copy16(void* to, const void* from, bool valid) {
  aligned(to, 16);
  aligned(from, 16);
  std::memset(to, 0xFF, 16);
  emulate::block().thread[static_cast<size_t>(thread())].groups.back().push_back({to, from, valid});
}
inline void copy16_near(void* to, const void* from, bool valid) { copy16(to, from, valid); }
inline void commit_copies() {
  emulate::block().thread[static_cast<size_t>(thread())].groups.emplace_back();
}
template <int newest>
void wait_copies() {
  auto& groups = emulate::block().thread[static_cast<size_t>(thread())].groups;
  // The last entry is the group that is still open.
  const size_t closed = groups.size() - 1;
  const size_t landing = closed > newest ? closed - newest : 0;
  for (size_t i = 0; i < landing; ++i)
    for (const emulate::Copy& c : groups[i]) {
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
    }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(landing));
}

template <class T>
T* global(T* p) {
  return p;
}

inline float root(float x) { return sqrtf(x); }
inline float log2(float x) { return log2f(x); }
inline uint64_t wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
inline float one_to_two(uint32_t w) { return bits_float(0x3F800000u | (w >> 9)); }
inline void swap_if_odd(uint32_t w, float& x, float& y) {
  if (w & 1u) std::swap(x, y);
}
inline bool either_nan(float x, float y) { return x != x || y != y; }
inline uint32_t bytes_of(uint32_t lo, uint32_t hi, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(hi) << 32 | lo;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7u) * 8 & 0xFFu) << 8 * i;
  return out;
}
inline uint32_t add_upper_half(uint32_t x, uint32_t w) { return x + (w >> 16); }
inline float half_to_float(uint16_t h) { return fp16_float(h); }

template <DType T>
uint32_t pack(float low, float high) {
  if constexpr (T == DType::bf16)
    return bf16_nearest(low) | static_cast<uint32_t>(bf16_nearest(high)) << 16;
  else
    return fp16_nearest(low) | static_cast<uint32_t>(fp16_nearest(high)) << 16;
}

inline void load_turned(const void* p, uint32_t d[4]) {
  aligned(p, 16);
  const int me = thread(), lane = me % emulate::kWarp, first = me - lane;
  std::memcpy(emulate::slot(me), &p, sizeof p);
  emulate::meet_warp();
  for (int m = 0; m < 4; ++m) {
    d[m] = 0;
    for (int half = 0; half < 2; ++half) {
      const char* row;
      std::memcpy(&row, emulate::slot(first + m * 8 + lane % 4 * 2 + half), sizeof row);
      uint16_t element;
      std::memcpy(&element, row + lane / 4 * 2, 2);
      d[m] |= static_cast<uint32_t>(element) << 16 * half;
    }
  }
  emulate::meet_warp();
}

// The fragments of mma.m16n8k16 as the PTX manual lays them out.
template <DType T>
void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  const int me = thread(), lane = me % emulate::kWarp, first = me - lane;
  if (emulate::warp_size(me / emulate::kWarp) != emulate::kWarp)
    emulate::fail("a matrix product needs a whole warp");
  auto* own = reinterpret_cast<uint32_t*>(emulate::slot(me));
  std::memcpy(own, a, 16);
  std::memcpy(own + 4, b, 8);
  emulate::meet_warp();
  const auto element = [&](int owner, int word, int half) {
    const uint32_t u = reinterpret_cast<uint32_t*>(emulate::slot(first + owner))[word];
    const auto h = static_cast<uint16_t>(half ? u >> 16 : u & 0xFFFFu);
    return T == DType::bf16 ? bf16_float(h) : fp16_float(h);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i / 2) * 8, col = lane % 4 * 2 + i % 2;
    double sum = static_cast<double>(d[i]);
    for (int k = 0; k < 16; ++k) {
      const float left = element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      const float right = element(col * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      sum += static_cast<double>(left) * static_cast<double>(right);
    }
    d[i] = static_cast<float>(sum);
  }
  emulate::meet_warp();
}

}  // namespace dev
}  // namespace zk
