// Hopper's asynchronous units on the host, as strict as emulate.h: a box lands when somebody waits
// for its barrier, and its place is NaN until then; the sums of a product are NaN until they are
// waited for; whoever changes an operand of a product in flight is told so. Addresses in shared
// memory are what the hardware makes of them: descriptors and swizzles act on their bits.
#pragma once

#include <algorithm>
#include <map>

#include "emulate.h"

namespace zk {
namespace emulate {

// Not a multiple of 1024: a kernel must align what it needs aligned.
constexpr uint32_t kSharedStart = 1040;
constexpr int kProductColumns = kProductTokens;

struct Box {
  char* to;
  BoxedTensor from;
  int64_t col, row, plane;
};

struct BarrierState {
  int arrivals = 0, pending = 0;
  int64_t expected = 0, copied = 0;  // bytes of this phase
  uint64_t phase = 0;
  std::vector<Box> boxes;
  int maker = 0;
  uint64_t made = 0;  // generation of the block's barrier
  bool fenced = false;
};

// One product of a warpgroup.
struct Product {
  DType type;
  uint64_t b = 0;
  int issued = 0, landed = 0;
  uint32_t a[kWarpgroup][4];
  float* d[kWarpgroup];
  uint16_t right[kProductColumns][16];
};

struct Issued {
  size_t product;
  const uint32_t* a;
  uint32_t held[4];
  float* d;
};

struct Lane {
  bool fenced = false;
  size_t issued = 0;
  std::vector<std::vector<Issued>> groups{1};
  std::map<float*, std::vector<float>> sums;  // what d will be
};

struct Warpgroup {
  std::map<size_t, Product> products;
};

struct Hopper {
  uint64_t number = 0;
  std::map<uint32_t, BarrierState> barriers;
  std::vector<Lane> lanes;
  std::vector<Warpgroup> groups;
};

inline Hopper& hopper() {
  static Hopper h;
  Block& b = block();
  if (h.number != b.number) {
    h = {};
    h.number = b.number;
    h.lanes.resize(static_cast<size_t>(b.threads));
    h.groups.resize(static_cast<size_t>((b.threads + kWarpgroup - 1) / kWarpgroup));
  }
  return h;
}

}  // namespace emulate

namespace dev {

using TensorMap = BoxedTensor;
using Barrier = uint64_t;

inline uint32_t shared_address(const void* p) {
  return emulate::kSharedStart + static_cast<uint32_t>(static_cast<const char*>(p) - shared());
}
inline char* shared_at(uint32_t address) {
  const size_t at = address - emulate::kSharedStart;
  if (address < emulate::kSharedStart || at + 16 > emulate::block().shared.size())
    emulate::fail("an address outside of shared memory");
  return shared() + at;
}

// What cuTensorMapEncodeTiled refuses.
inline const char* encode(const BoxedTensor& t, TensorMap& map) {
  const auto stride = [](int64_t s) { return s % 16 == 0 && s >= 0 && s < int64_t{1} << 40; };
  const auto size = [](int64_t n) { return n >= 1 && n <= int64_t{1} << 32; };
  if (reinterpret_cast<uintptr_t>(t.data) % 16 || !stride(t.row_bytes) || !stride(t.plane_bytes) ||
      !size(t.cols) || !size(t.rows) || !size(t.planes) || t.row_bytes < t.cols * 2 ||
      t.box_rows < 1 || t.box_rows > 256)
    return "cuTensorMapEncodeTiled refuses a tensor";
  map = t;
  return nullptr;
}

inline void make_barrier(Barrier* b, int arrivals) {
  aligned(b, 8);
  auto& all = emulate::hopper().barriers;
  if (all.count(shared_address(b))) emulate::fail("a barrier was made twice");
  emulate::BarrierState s;
  s.arrivals = s.pending = arrivals;
  s.maker = thread();
  s.made = emulate::block().all.generation;
  all[shared_address(b)] = s;
}
inline void fence_barriers() {
  for (auto& [at, b] : emulate::hopper().barriers)
    if (b.maker == thread()) b.fenced = true;
}

inline void fence_copies() {}  // seen by tests/ptx alone

inline emulate::BarrierState& barrier_state(Barrier* b) {
  auto& all = emulate::hopper().barriers;
  const auto found = all.find(shared_address(b));
  if (found == all.end()) emulate::fail("a barrier was used before it was made");
  emulate::BarrierState& s = found->second;
  if (!s.fenced || emulate::block().all.generation == s.made)
    emulate::fail("a barrier was used before other threads and units could see it");
  return s;
}

inline void land(const emulate::Box& box) {
  for (int row = 0; row < box.from.box_rows; ++row)
    for (int col = 0; col < kBoxColumns; ++col) {
      const int64_t r = box.row + row, c = box.col + col;
      uint16_t value = 0;
      if (r >= 0 && r < box.from.rows && c >= 0 && c < box.from.cols && box.plane >= 0 &&
          box.plane < box.from.planes)
        std::memcpy(
            &value,
            box.from.data + box.plane * box.from.plane_bytes + r * box.from.row_bytes + c * 2, 2);
      const uint32_t linear = shared_address(box.to) + static_cast<uint32_t>(row * 64 + col * 2);
      std::memcpy(shared_at(linear ^ ((linear >> 7 & 3u) << 4)), &value, 2);
    }
}

// Ends the phase when everything it waits for is there.
inline void settle(emulate::BarrierState& s) {
  if (s.copied > s.expected && s.pending == 0) emulate::fail("more bytes than a barrier expects");
  if (s.pending || s.copied != s.expected) return;
  for (const emulate::Box& box : s.boxes) land(box);
  emulate::block().bulk_copies -= static_cast<int>(s.boxes.size());
  s.boxes.clear();
  s.expected = s.copied = 0;
  s.pending = s.arrivals;
  ++s.phase;
  ++emulate::block().progress;
}

inline void arrive_expecting(Barrier* b, uint32_t bytes) {
  emulate::BarrierState& s = barrier_state(b);
  if (s.pending == 0) settle(s);
  if (s.pending == 0) emulate::fail("an arrival too many at a barrier");
  s.expected += bytes;
  --s.pending;
}
inline void arrive(Barrier* b) { arrive_expecting(b, 0); }

inline void wait(Barrier* b, uint32_t parity) {
  for (;;) {
    emulate::BarrierState& s = barrier_state(b);
    settle(s);
    if ((s.phase & 1u) != parity) return;
    emulate::yield();
  }
}

inline void load_box(void* to, const TensorMap& map, int col, int row, int plane, Barrier* b) {
  emulate::BarrierState& s = barrier_state(b);
  if (shared_address(to) % 512) emulate::fail("a box is not at a multiple of 512 bytes");
  const int bytes = map.box_rows * kBoxColumns * 2;
  shared_at(shared_address(to) + static_cast<uint32_t>(bytes) - 16u);
  std::memset(to, 0xFF, static_cast<size_t>(bytes));
  s.boxes.push_back({static_cast<char*>(to), map, col, row, plane});
  s.copied += bytes;
  ++emulate::block().bulk_copies;
}

inline void load_matrices(uint32_t address, uint32_t d[4]) {
  const int me = thread(), lane = me % emulate::kWarp, first = me - lane;
  if (address % 16) emulate::fail("an access is not aligned to its size");
  *emulate::slot(me) = address;
  emulate::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const auto row = static_cast<uint32_t>(*emulate::slot(first + i * 8 + lane / 4));
    std::memcpy(d + i, shared_at(row) + lane % 4 * 4, 4);
  }
  emulate::meet_warp();
}

inline emulate::Lane& product_lane() {
  return emulate::hopper().lanes[static_cast<size_t>(thread())];
}
inline emulate::Warpgroup& warpgroup() {
  return emulate::hopper().groups[static_cast<size_t>(thread() / kWarpgroup)];
}

// The right factor that a descriptor names: rows of 64 bytes with swizzled chunks, as factor_at.
inline void read_factor(uint64_t b, uint16_t right[][16]) {
  const auto start = static_cast<uint32_t>(b & 0x3FFFu) << 4;
  const auto eight_rows = static_cast<uint32_t>(b >> 32 & 0x3FFFu) << 4;
  if (b >> 62 != 2 || (b >> 49 & 7u) != 0) emulate::fail("a descriptor that is not emulated");
  for (uint32_t n = 0; n < kProductTokens; ++n)
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t linear = start + n / 8 * eight_rows + n % 8 * 64u + k * 2u;
      std::memcpy(&right[n][k], shared_at(linear ^ ((linear >> 7 & 3u) << 4)), 2);
    }
}

inline void settle(float (&)[64]) {}

// A signalling NaN: to add to it changes its bits.
inline constexpr uint32_t kInFlight = 0x7FA0BEEFu;

// Once all threads have issued it: sums[...] += a b, by the fragments of wgmma.m64nNk16.
inline void multiply(emulate::Product& p, int first) {
  const auto value = [&p](uint16_t h) {
    return static_cast<double>(p.type == DType::bf16 ? bf16_float(h) : fp16_float(h));
  };
  static double left[64][16], right[16][kProductTokens];
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 8; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, col = t % 4 * 2 + i % 2 + i / 4 * 8;
      left[row][col] = value(static_cast<uint16_t>(p.a[t][i / 2] >> (i % 2 * 16)));
    }
  read_factor(p.b, p.right);
  for (int n = 0; n < kProductTokens; ++n)
    for (int k = 0; k < 16; ++k) right[k][n] = value(p.right[n][k]);
  static double all[64][kProductTokens];
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kProductTokens; ++n) {
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += left[m][k] * right[k][n];
      all[m][n] = sum;
    }
  for (int t = 0; t < kWarpgroup; ++t) {
    auto& sums = emulate::hopper().lanes[static_cast<size_t>(first + t)].sums[p.d[t]];
    for (int i = 0; i < 64; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + t % 4 * 2 + i % 2;
      sums[static_cast<size_t>(i)] =
          static_cast<float>(static_cast<double>(sums[static_cast<size_t>(i)]) + all[row][col]);
    }
  }
}

inline void begin_products() { product_lane().fenced = true; }

template <DType T>
void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  emulate::Lane& lane = product_lane();
  if (emulate::block().threads % kWarpgroup) emulate::fail("a product needs a whole warpgroup");
  if (!lane.fenced)
    emulate::fail("a product without begin_products after its operands were written");
  if (!lane.sums.count(d)) {
    lane.sums[d].assign(d, d + 64);
    std::fill(d, d + 64, bits_float(kInFlight));
  }
  const size_t index = lane.issued++;
  lane.groups.back().push_back({index, a, {a[0], a[1], a[2], a[3]}, d});
  ++emulate::block().thread[static_cast<size_t>(thread())].products;
  emulate::Product& p = warpgroup().products[index];
  const auto me = static_cast<size_t>(thread() % kWarpgroup);
  if (p.issued && (p.b != b || p.type != T))
    emulate::fail("a warpgroup's threads issue unlike products");
  p.type = T;
  p.b = b;
  std::copy(a, a + 4, p.a[me]);
  p.d[me] = d;
  if (++p.issued == kWarpgroup) {
    multiply(p, thread() / kWarpgroup * kWarpgroup);
    ++emulate::block().progress;
  }
}

inline void commit_products() {
  product_lane().groups.emplace_back();
  product_lane().fenced = false;
}

template <int newest>
void wait_products() {
  emulate::Lane& lane = product_lane();
  const size_t closed = lane.groups.size() - 1;
  const size_t landing = closed > newest ? closed - newest : 0;
  for (size_t g = 0; g < landing; ++g)
    for (const emulate::Issued& own : lane.groups[g]) {
      while (warpgroup().products[own.product].issued < kWarpgroup) emulate::yield();
      if (!std::equal(own.held, own.held + 4, own.a))
        emulate::fail("a register operand of a product in flight was written");
      auto& all = warpgroup().products;
      emulate::Product& p = all[own.product];
      if (++p.landed == kWarpgroup) {
        uint16_t now[kProductTokens][16];
        read_factor(p.b, now);
        if (std::memcmp(now, p.right, sizeof now))
          emulate::fail("shared memory that a product in flight reads was written");
        all.erase(own.product);
      }
      --emulate::block().thread[static_cast<size_t>(thread())].products;
    }
  lane.groups.erase(lane.groups.begin(),
                    lane.groups.begin() + static_cast<std::ptrdiff_t>(landing));
  for (auto sum = lane.sums.begin(); sum != lane.sums.end();) {
    float* const d = sum->first;
    bool more = false;
    for (const auto& group : lane.groups)
      for (const emulate::Issued& own : group) more = more || own.d == d;
    if (more) {
      ++sum;
      continue;
    }
    for (int i = 0; i < 64; ++i)
      if (float_bits(d[i]) != kInFlight) emulate::fail("a sum of a product in flight was written");
    std::copy(sum->second.begin(), sum->second.end(), d);
    sum = lane.sums.erase(sum);
  }
  emulate::meet_warp();  // a warp waits as one
}

}  // namespace dev
}  // namespace zk
