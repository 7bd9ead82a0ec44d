// Runs kernels without torch or Python, so that they can be built for another processor and run in an emulator, or with
// sanitizers: `driver PROBLEMS [RESULTS]`. native_driver.py writes the problems and compares the results, which are
// written one after another; printed are the name of the instruction set and the CRC-32 of all results.
//
// A problem is 27 int64 (op, bytes per number; images, channels, height, width, channels_last of the input and of the
// output; the window; lengths of plan, values, bias, x, and result, -1 for no bias), the plan, and the arrays. Op 0 is
// forward, 1 conv_dgrad, 2 wgrad, whose `values` are the gradient and whose results are the values and, behind them,
// the bias.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "bsr.h"

#ifndef KERNELS
#define KERNELS sk::kernels  // what dispatch.cpp chooses
#else
namespace sk::SK_ISA {
const Kernels& table();
}
#endif

namespace {

// Nothing may be read before it is written.
template <class T>
void forget(T* p, size_t n) {
  for (size_t i = 0; i < n; i++) p[i] = std::numeric_limits<T>::quiet_NaN();
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
};

void* scratch(int slot, size_t bytes) {
  static Buffer buffers[2];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer = {std::aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
    forget(static_cast<float*>(buffer.data), bytes / sizeof(float));
  }
  return buffer.data;
}

// The last task first: an order that no thread pool would choose.
void parallel(int64_t tasks, int64_t, void (*task)(void*, int64_t), void* context) {
  for (int64_t i = tasks; i > 0; i--) task(context, i - 1);
}

struct File {
  std::FILE* file;
  File(const char* name, const char* mode) : file(std::fopen(name, mode)) {
    if (!file) std::perror(name), std::exit(1);
  }
  File(const File&) = delete;
  ~File() { std::fclose(file); }
};

// Arrays are exactly as long as their numbers: a sanitizer sees what is read beyond.
template <class T>
std::vector<T> read(File& from, int64_t n) {
  std::vector<T> to(n > 0 ? n : 0);
  if (!to.empty() && std::fread(to.data(), sizeof(T), to.size(), from.file) != to.size())
    std::fputs("the file ends too early\n", stderr), std::exit(1);
  return to;
}

sk::Images images(const int64_t* at) { return {at[0], at[1], at[2], at[3], at[4] != 0}; }

uint32_t crc32(uint32_t crc, const void* data, size_t bytes) {
  crc = ~crc;
  for (const auto *p = static_cast<const unsigned char*>(data), *end = p + bytes; p != end; p++) {
    crc ^= *p;
    for (int i = 0; i < 8; i++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
  }
  return ~crc;
}

template <class T>
void solve(const std::vector<int64_t>& h, File& from, std::FILE* to, uint32_t& crc) {
  const sk::Images in = images(&h[2]), out = images(&h[7]);
  sk::Window w = {};
  for (int d = 0; d < 2; d++)
    w.kernel[d] = h[12 + d], w.stride[d] = h[14 + d], w.padding[d] = h[16 + d], w.dilation[d] = h[18 + d],
    w.grid[d] = h[20 + d];
  const auto numbers = read<int32_t>(from, h[22]);
  const auto values = read<T>(from, h[23]), bias = read<T>(from, h[24]), x = read<T>(from, h[25]);
  std::vector<T> result(h[26]);
  forget(result.data(), result.size());
  sk::Plan plan;
  if (!sk::Plan::read(numbers.data(), h[22], plan)) std::fputs("no plan\n", stderr), std::exit(1);
  const sk::Kernels& kernels = KERNELS();
  if (h[0] == 2) {
    sk::WeightGrad<T> p = {};
    p.plan = plan, p.grad = values.data(), p.x = x.data(), p.values = result.data();
    p.bias = h[24] < 0 ? nullptr : result.data() + plan.size;
    p.in = in, p.out = out, p.window = w, p.parallel = parallel, p.scratch = scratch;
    if constexpr (sizeof(T) == 4)
      kernels.wgrad32(p);
    else
      kernels.wgrad64(p);
  } else {
    sk::Product<T> p = {};
    p.plan = plan, p.values = values.data(), p.bias = h[24] < 0 ? nullptr : bias.data(), p.x = x.data();
    p.y = result.data(), p.in = in, p.out = out, p.window = w, p.parallel = parallel, p.scratch = scratch;
    if constexpr (sizeof(T) == 4)
      (h[0] == 0 ? kernels.forward32 : kernels.conv_dgrad32)(p);
    else
      (h[0] == 0 ? kernels.forward64 : kernels.conv_dgrad64)(p);
  }
  for (T& number : result) number += T(0);  // of -0 and 0, 0
  crc = crc32(crc, result.data(), result.size() * sizeof(T));
  if (to && !result.empty()) std::fwrite(result.data(), sizeof(T), result.size(), to);
}

}  // namespace

int main(int count, char** words) {
  if (count < 2 || count > 3) return std::fputs("usage: driver PROBLEMS [RESULTS]\n", stderr), 2;
  try {
    std::printf("%s ", KERNELS().name);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
  File from(words[1], "rb");
  std::FILE* to = count == 3 ? std::fopen(words[2], "wb") : nullptr;
  const int64_t problems = read<int64_t>(from, 1)[0];
  uint32_t crc = 0;
  for (int64_t i = 0; i < problems; i++) {
    const std::vector<int64_t> header = read<int64_t>(from, 27);
    header[1] == 4 ? solve<float>(header, from, to, crc) : solve<double>(header, from, to, crc);
  }
  if (to) std::fclose(to);
  std::printf("%08x\n", unsigned(crc));
}
