#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace zk {
namespace {

struct Choice {
  const Kernels* table;
  bool supported;
};

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> list;
#if defined(ZK_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    list.push_back({&kernels_avx512(), avx512});
    list.push_back({&kernels_avx2(), avx2});
#endif
    list.push_back({&kernels_portable(), true});
    return list;
  }();
  return all;
}

const Kernels* widest() {
  for (const Choice& c : choices())
    if (c.supported) return c.table;
  return &kernels_portable();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{widest()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const Micro* pair_micro() {
#if defined(ZK_X86)
  static const bool supported =
      __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16");
  if (supported && &kernels() == &kernels_avx512()) return micro_avx512bf16();
#endif
  return nullptr;
}

SelectStatus select_isa(const char* name) {
  for (const Choice& c : choices())
    if (std::strcmp(c.table->name, name) == 0) {
      if (!c.supported) return SelectStatus::unsupported;
      current().store(c.table);
      return SelectStatus::ok;
    }
  // Names that exist, on machines whose build does not have them.
  for (const char* known : {"avx512", "avx2"})
    if (std::strcmp(known, name) == 0) return SelectStatus::unsupported;
  return SelectStatus::unknown;
}

const char* supported_isas() {
  static const std::string names = [] {
    std::string s;
    for (const Choice& c : choices())
      if (c.supported) s += (s.empty() ? "" : ",") + std::string(c.table->name);
    return s;
  }();
  return names.c_str();
}

}  // namespace zk
