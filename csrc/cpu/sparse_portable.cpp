// The correction on plain C++.
#define ZK_CORRECT sparse_correct_portable
#include "sparse.inl"
