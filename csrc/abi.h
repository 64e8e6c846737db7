// Version of the native ops' signatures, checked by zokernels/_load.py.
#pragma once

namespace zk {

constexpr int kAbiVersion = 6;

}  // namespace zk
