// Picks one instruction set, once: the best the CPU has, or the one SPARSEKERN_CPU_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sk {
namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("SPARSEKERN_CPU_ISA");
  const std::string name = wanted ? wanted : "";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2" && !avx2) throw std::runtime_error("SPARSEKERN_CPU_ISA is avx2, but this CPU has no AVX2 and FMA");
  if (avx2 && (name.empty() || name == "avx2")) return avx2::table();
#endif
  if (name.empty() || name == "baseline") return baseline::table();
#if defined(__x86_64__)
  throw std::runtime_error("SPARSEKERN_CPU_ISA must be baseline or avx2, got " + name);
#else
  throw std::runtime_error("SPARSEKERN_CPU_ISA must be baseline, got " + name);
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sk
