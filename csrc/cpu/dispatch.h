// The instruction sets that are compiled in, each with its table of kernels, and the choice among them.
#pragma once
#include "../bsr.h"

namespace sk {
#if defined(__x86_64__)
namespace avx512 {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
#endif
#if defined(__aarch64__)
namespace neon {
const Kernels& table();
}
#else
namespace baseline {
const Kernels& table();
}
#endif

struct InstructionSet {
  const char* name;
  const Kernels& (*table)();
  bool (*supported)();  // by this CPU and its operating system
  bool automatic;       // chosen unasked: only where the test suite has run on it
};

// Those compiled in, the best first; the entry after the last one has no name.
const InstructionSet* instruction_sets();

// False where no set is chosen automatically and none was asked for: the ops are then left to plain torch. Asked for in
// vain, a set is an error of every call instead.
bool has_kernels();
}  // namespace sk
