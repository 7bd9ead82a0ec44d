// The pybind11 module sparsekern._native: what is not a torch op. It links no torch, is on no call path, and the
// package works without it.

#include <pybind11/pybind11.h>

#include <string>

namespace {

// What this processor can execute, whatever the libraries were compiled for. The same keys on every processor.
pybind11::dict cpu_features() {
  pybind11::dict features;
#if defined(__x86_64__)
// The built-in takes literals only.
#define SPARSEKERN_FEATURE(name) features[name] = __builtin_cpu_supports(name) != 0
#else
#define SPARSEKERN_FEATURE(name) features[name] = false
#endif
  SPARSEKERN_FEATURE("sse2");
  SPARSEKERN_FEATURE("avx");
  SPARSEKERN_FEATURE("avx2");
  SPARSEKERN_FEATURE("fma");
  SPARSEKERN_FEATURE("avx512f");
  SPARSEKERN_FEATURE("avx512bw");
  SPARSEKERN_FEATURE("avx512vl");
#undef SPARSEKERN_FEATURE
#if defined(__aarch64__)
  features["neon"] = true;  // part of every AArch64 processor
#else
  features["neon"] = false;
#endif
  return features;
}

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;  // starts with "Clang"
#else
  return std::string("GCC ") + __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU features and build facts.";
  m.attr("version") = SPARSEKERN_VERSION;
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor: {name: bool}.");
  m.def("compiler", &compiler, "Compiler that built this module, with its version.");
}
