// The pybind11 module sparsekern._native: what is not a torch op. It links no torch, is on no call path, and the
// package works without it.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// ---- ceilings: what the kernels' rates are compared with ---------------------------------------------------------
// The same loops for vectors of 16, 32 and 64 bytes. always_inline, so that each is compiled with the instructions of
// the function with a target attribute that it ends up in.

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <int kBytes>
struct Vector {
  typedef float type __attribute__((vector_size(kBytes)));
};

constexpr int kChains = 12;  // independent sums: two pipes of four to five cycles each, all in registers

// The compiler must take a vector to be changed, or needed, here: it would work out constant sums by itself.
#if defined(__x86_64__)
#define SPARSEKERN_OPAQUE(vector) asm volatile("" : "+x"(vector))
#else
#define SPARSEKERN_OPAQUE(vector) asm volatile("" : "+w"(vector))
#endif

template <int kBytes>
inline __attribute__((always_inline)) void multiply_add(long rounds) {
  using V = typename Vector<kBytes>::type;
  V sums[kChains], factor = V{} + 0.999f, term = V{} + 0.001f;  // the sums tend to 1: none overflows or is denormal
  SPARSEKERN_OPAQUE(factor);
  SPARSEKERN_OPAQUE(term);
  for (int i = 0; i < kChains; ++i) sums[i] = factor * float(i + 1);
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
  }
  for (int i = 0; i < kChains; ++i) SPARSEKERN_OPAQUE(sums[i]);
}
#undef SPARSEKERN_OPAQUE

template <int kBytes>
inline __attribute__((always_inline)) float add_up(const float* data, std::size_t floats, long rounds) {
  using V = typename Vector<kBytes>::type;
  constexpr std::size_t kWidth = kBytes / sizeof(float), kSums = 8;
  V sums[kSums] = {};
  for (long round = 0; round < rounds; ++round) {
    for (std::size_t at = 0; at + kSums * kWidth <= floats; at += kSums * kWidth) {
      for (std::size_t i = 0; i < kSums; ++i) sums[i] += *reinterpret_cast<const V*>(data + at + i * kWidth);
    }
    asm volatile("" ::: "memory");  // each round reads anew
  }
  float total = 0;
  for (std::size_t i = 0; i < kSums; ++i) {
    for (std::size_t j = 0; j < kWidth; ++j) total += sums[i][j];
  }
  return total;
}

struct Loops {
  const char* isa;
  int vector_bytes;
  void (*multiply_add)(long rounds);
  float (*add_up)(const float* data, std::size_t floats, long rounds);
};

void multiply_add_baseline(long rounds) { multiply_add<16>(rounds); }
float add_up_baseline(const float* data, std::size_t floats, long rounds) { return add_up<16>(data, floats, rounds); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void multiply_add_avx2(long rounds) { multiply_add<32>(rounds); }
__attribute__((target("avx2,fma"))) float add_up_avx2(const float* data, std::size_t floats, long rounds) {
  return add_up<32>(data, floats, rounds);
}
__attribute__((target("avx512f"))) void multiply_add_avx512(long rounds) { multiply_add<64>(rounds); }
__attribute__((target("avx512f"))) float add_up_avx512(const float* data, std::size_t floats, long rounds) {
  return add_up<64>(data, floats, rounds);
}
#endif

// The widest that this processor has.
Loops best_loops() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {"avx512f", 64, multiply_add_avx512, add_up_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2+fma", 32, multiply_add_avx2, add_up_avx2};
  }
  return {"sse2, multiplication and addition apart", 16, multiply_add_baseline, add_up_baseline};
#else
  return {"baseline", 16, multiply_add_baseline, add_up_baseline};
#endif
}

// Median of work per second over slices of a millisecond or so, for `seconds`; `run(n)` does n units of `work` each.
// A slice in which the system ran something else does not count then.
template <class Run>
double median_rate(double seconds, double work, Run run) {
  constexpr double kSlice = 1e-3;
  long units = 1;
  for (;;) {  // warms up, too
    const auto start = Clock::now();
    run(units);
    if (seconds_since(start) >= kSlice) break;
    units *= 2;
  }
  std::vector<double> rates;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    run(units);
    rates.push_back(double(units) * work / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return rates[rates.size() / 2];
}

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) {
    throw std::invalid_argument("seconds must be above 0 and at most 60, got " + std::to_string(seconds));
  }
}

std::pair<double, std::string> fma_peak(double seconds) {
  check_seconds(seconds);
  const Loops loops = best_loops();
  const double flops = 2.0 * kChains * loops.vector_bytes / sizeof(float);  // of one round
  constexpr long kRounds = 1000;
  const double rate = median_rate(seconds, flops * kRounds, [&](long n) { loops.multiply_add(n * kRounds); });
  return {rate / 1e9, loops.isa};
}

std::pair<double, std::string> read_bandwidth(std::size_t bytes, double seconds) {
  constexpr std::size_t kStep = 512, kPart = 1 << 20;  // bytes; a step is eight of the widest vectors
  if (bytes < 4096 || bytes > std::size_t(1) << 32) {
    throw std::invalid_argument("bytes must be from 4096 to 2**32, got " + std::to_string(bytes));
  }
  check_seconds(seconds);
  const Loops loops = best_loops();
  // Large buffers are read in parts of a megabyte, so that a slice of time is short.
  const std::size_t step = bytes > kPart ? kPart : kStep;
  const std::size_t floats = bytes / step * step / sizeof(float), part = std::min(floats, kPart / sizeof(float));
  constexpr std::align_val_t kPage{4096};
  float* data = static_cast<float*>(::operator new(floats * sizeof(float), kPage));
  // Different data on every page: pages that were never written are all one page of zeros, and read faster.
  for (std::size_t i = 0; i < floats; ++i) data[i] = 1.0f + float(i % 1021);
  volatile float sink = 0;
  std::size_t at = 0;
  const double rate = median_rate(seconds, double(part * sizeof(float)), [&](long n) {
    if (part == floats) {
      sink = loops.add_up(data, floats, n);
      return;
    }
    for (long i = 0; i < n; ++i) {
      sink = loops.add_up(data + at, part, 1);
      at = (at + part) % floats;
    }
  });
  (void)sink;
  ::operator delete(data, kPage);
  return {rate / 1e9, loops.isa};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  namespace py = pybind11;
  m.doc() = "CPU features, build facts, and the ceilings of one core.";
  m.attr("version") = SPARSEKERN_VERSION;
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor: {name: bool}.");
  m.def("compiler", &compiler, "Compiler that built this module, with its version.");
  m.def("fma_peak", &fma_peak, py::arg("seconds") = 0.1, py::call_guard<py::gil_scoped_release>(),
        "float32 multiply-adds in registers on the calling thread, for about `seconds`: (GFLOP/s, instruction set).");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("seconds") = 0.1,
        py::call_guard<py::gil_scoped_release>(),
        "The calling thread reads a buffer of `bytes` over and over: (GB/s of 1e9 bytes, instruction set).");
}
