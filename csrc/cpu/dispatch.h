// Choice of the instruction set at run time.
#pragma once

#include "kernels.h"

namespace zk {

// The kernels in use: the widest the machine supports unless `select_isa` was called.
const Kernels& kernels();

// The innermost loops on pairs of bfloat16, by number of vectors; null where the machine lacks them
// or has something faster behind torch's product (AMX).
const Micro* pair_micro();

enum class SelectStatus : int { ok = 0, unknown = 1, unsupported = 2 };
SelectStatus select_isa(const char* name);

// Names of the instruction sets this machine can run, widest first, separated by commas.
const char* supported_isas();

}  // namespace zk
