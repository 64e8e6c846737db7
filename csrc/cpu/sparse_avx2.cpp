// The correction on AVX2, FMA and F16C.
#define ZK_AVX2
#define ZK_CORRECT sparse_correct_avx2
#include "sparse.inl"
