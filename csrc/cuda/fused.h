// What the fused products share: their terms, and how they are cut into warps of a block behind
// each other and parts of the sum in the grid.
#pragma once

#include "device.h"
#include "kernels.h"

namespace zk {

// A seed and what the two branches make of it; nothing where there is no such term.
struct Term {
  uint64_t seed = 0;
  float c0 = 0.0f, c1 = 0.0f;
};

ZK_DEVICE Term term_of(const LinearArgs& a, int64_t first, bool two, int k) {
  Term t;
  if (k < static_cast<int>(a.terms.count)) {
    t.seed = static_cast<uint64_t>(a.terms.seeds[k]);
    t.c0 = a.coeffs[first * a.terms.count + k];
    if (two) t.c1 = a.coeffs[(first + 1) * a.terms.count + k];
  }
  return t;
}

// Each part's sums are four bytes an output, written and read again.
constexpr int kMostParts = 8;

inline int64_t blocks_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

// What a product sums over, in pieces (half panels, slices, groups, rounds), one a warp at a time.
// A block has eight warps, warps_k of them behind each other.
struct Pieces {
  int64_t count;
  int most_warps_k;     // a power of two
  int64_t cycles;       // of a multiprocessor, for a piece in each of eight warps
  int64_t activations;  // bytes of a piece, read by every block
  int64_t weights;      // bytes of a piece, read by every warp
  int64_t sums;         // of the product: branches, tokens, outputs
};

struct Plan {
  int warps_k, parts;
};

// The fastest of least_parts to most_parts; blocks(warps_k): blocks of one part. Time is waves of
// blocks, one a multiprocessor. A block takes its pieces, or what it reads at 24 bytes a cycle if
// that is longer, and 1600 cycles for its beginning and end. Sums of parts are written and read
// again at half of that, and a second launch takes 6400. Few parts before many, wide blocks before
// narrow ones: they read activations less often. Arithmetic, not measurements.
template <class Blocks>
Plan fastest(const Pieces& p, int multiprocessors, int least_parts, int most_parts,
             const Blocks& blocks) {
  Plan best{1, 1};
  int64_t least = -1;
  for (int parts = least_parts; parts <= most_parts && parts <= p.count; ++parts) {
    const int64_t each = blocks_of(p.count, parts);
    if (blocks_of(p.count, each) != parts) continue;
    for (int warps_k = 1; warps_k <= p.most_warps_k && warps_k <= each; warps_k *= 2) {
      const int64_t draws = blocks_of(each, warps_k) * p.cycles;
      const int64_t reads = each * (p.activations + p.weights * 8 / warps_k) / 24;
      const int64_t waves = blocks_of(blocks(warps_k) * parts, multiprocessors);
      int64_t time = waves * ((draws > reads ? draws : reads) + 1600);
      if (parts > 1) time += 6400 + parts * p.sums * 8 / (12 * multiprocessors);
      if (least < 0 || time < least) {
        least = time;
        best = {warps_k, parts};
      }
    }
  }
  return best;
}

}  // namespace zk
