// The correction on AVX-512 F, BW, DQ, VL.
#define ZK_AVX512
#define ZK_CORRECT sparse_correct_avx512
#include "sparse.inl"
