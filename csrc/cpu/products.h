// Products with displaced weights: which plan a product follows, and the ops that run it.
#pragma once

#include "tensors.h"

namespace zk {

// How a product is cut into tasks.
//
// fused: few tokens; rows are displaced into the cache and multiplied there (product.inl).
// tiles: outputs in tiles of `rows` that are displaced into scratch and multiplied by torch; tokens
// in blocks where the tiles alone would leave threads idle (a tile's noise is then drawn once a
// block, which a block of 512 tokens outweighs twentyfold). Sizes are measured: csrc/README.md.
struct Plan {
  bool fused;
  DType compute;  // type of the displaced weights and of the product's factors
  int64_t rows, row_tiles, block, blocks;
  int64_t fill;  // fused: rows displaced at a time

  // Bytes of displaced weights a task holds.
  int64_t held_bytes(int64_t fan_in, int64_t fan_out, int64_t branches) const {
    const int64_t outputs = std::min(fused ? fill : rows, fan_out);
    const int64_t depth = fused ? std::min(fan_in, kProductDepth) : fan_in;
    return branches * outputs * depth * dtype_size(compute);
  }
};

Plan plan_product(int64_t fan_in, int64_t fan_out, int64_t tokens, int64_t branches, DType dtype,
                  bool transposed, int64_t threads);

// Types whose vendor product is slower than converting to float32 and multiplying there.
void widen_products(bool bf16, bool f16);
// For measurements and tests.
void set_tile_sizes(int64_t bytes, int64_t min_rows);
void set_fused_tokens(int64_t most);

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
              int64_t param_id, int64_t row_offset, int64_t col_offset, int64_t distribution,
              bool shared, bool transposed);

Tensor update_linear_(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor seeds, Tensor coeffs,
                      Tensor pending_seeds, Tensor pending_coeffs,
                      std::optional<Tensor> pending_decay, int64_t rounding, int64_t param_id,
                      int64_t row_offset, int64_t col_offset, int64_t distribution, bool shared);

Tensor linear_cross_entropy(Tensor x, Tensor w, std::optional<Tensor> bias, Tensor targets,
                            Tensor seeds, Tensor coeffs, int64_t param_id, int64_t row_offset,
                            int64_t col_offset, int64_t distribution, bool shared,
                            int64_t ignore_index);

}  // namespace zk
