// What kernels are given by the process they run in: torch's threads, and scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace sk {

// Below this many multiply-adds a second thread costs more than it saves (a few microseconds to wake).
inline constexpr int64_t kMinWorkPerThread = 1 << 16;

inline void parallel(int64_t tasks, int64_t work, void (*task)(void*, int64_t), void* context) {
  const int64_t grain = kMinWorkPerThread / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, i);
  });
}

struct ScratchBuffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchBuffer() { std::free(data); }
};

inline void* scratch(int slot, size_t bytes) {
  thread_local ScratchBuffer buffers[2];
  ScratchBuffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.bytes);
    if (!buffer.data) {
      buffer.bytes = 0;
      STD_TORCH_CHECK(false, "sparsekern: no memory for ", bytes, " bytes of scratch");
    }
  }
  return buffer.data;
}

}  // namespace sk
