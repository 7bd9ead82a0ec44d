// Picks one instruction set, once: the best the CPU has of those chosen automatically, or the one SPARSEKERN_CPU_ISA
// names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sk {
namespace {

#if defined(__x86_64__)
// The built-ins ask the operating system, too, whether it saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
bool always() { return true; }

constexpr InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", avx512::table, has_avx512, false},
    {"avx2", avx2::table, has_avx2, true},
    {"baseline", baseline::table, always, true},
#elif defined(__aarch64__)
    {"neon", neon::table, always, false},
#else
    {"baseline", baseline::table, always, false},
#endif
    {nullptr, nullptr, nullptr, false},
};

struct Choice {
  const InstructionSet* set;
  bool asked;
  std::string error;  // why there is no set
};

Choice choose() {
  const char* variable = std::getenv("SPARSEKERN_CPU_ISA");
  const std::string name = variable ? variable : "";
  std::string names;
  for (const InstructionSet* set = kSets; set->name; set++) {
    if (name.empty() && set->automatic && set->supported()) return {set, false, ""};
    if (name == set->name) {
      if (set->supported()) return {set, true, ""};
      return {nullptr, true, "SPARSEKERN_CPU_ISA is " + name + ", which this CPU does not have"};
    }
    names += (names.empty() ? "" : " or ") + std::string(set->name);
  }
  if (name.empty())
    return {nullptr, false, "none is chosen automatically on this CPU: set SPARSEKERN_CPU_ISA=" + names};
  return {nullptr, true, "SPARSEKERN_CPU_ISA must be " + names + " (or empty: the best this CPU has), got " + name};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const InstructionSet* instruction_sets() { return kSets; }

bool has_kernels() { return chosen().set || chosen().asked; }

const Kernels& kernels() {
  if (!chosen().set) throw std::runtime_error(chosen().error);
  return chosen().set->table();
}

}  // namespace sk
