// What a few moving elements of a weight add to a product: torch-free, one function an instruction
// set.
#pragma once

#include "kernels.h"

namespace zk {

// Tokens that are corrected together: two vectors.
constexpr int64_t kCorrectionTokens = 32;

// y[t, target[e]] += difference[e] x[t, source[e]] for every element e in order, summed in float32
// from zero; then y[t, o] = round(y[t, o] + sum + bias[o]).
struct CorrectionArgs {
  DType dtype = DType::f32;  // of x and y
  int64_t fan_in = 0, fan_out = 0;
  const int32_t* source = nullptr;  // [count], columns of x
  const int32_t* target = nullptr;  // [count], columns of y
  int64_t count = 0;
  // Sixteen columns each: which ones the elements meet.
  const unsigned char* source_chunks = nullptr;  // [(fan_in + 15) / 16]
  const unsigned char* target_chunks = nullptr;  // [(fan_out + 15) / 16]

  int64_t scratch_floats() const {
    return ((fan_in + 15) / 16 + (fan_out + 15) / 16) * 16 * kCorrectionTokens;
  }
};

// Tokens [0, tokens), at most kCorrectionTokens, of one branch; rows of x and y are contiguous and
// `fan_in` and `fan_out` long. `scratch` has scratch_floats().
using Correct = void (*)(const CorrectionArgs&, const void* x, void* y, int64_t tokens,
                         const float* difference, const void* bias, DType bias_dtype,
                         float* scratch);

void sparse_correct_portable(const CorrectionArgs&, const void*, void*, int64_t, const float*,
                             const void*, DType, float*);
#if defined(ZK_X86)
void sparse_correct_avx2(const CorrectionArgs&, const void*, void*, int64_t, const float*,
                         const void*, DType, float*);
void sparse_correct_avx512(const CorrectionArgs&, const void*, void*, int64_t, const float*,
                           const void*, DType, float*);
#endif

}  // namespace zk
