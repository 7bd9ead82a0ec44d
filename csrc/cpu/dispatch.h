// The kernel tables that are compiled in, one per instruction set.
#pragma once
#include "../bsr.h"

namespace sk {
namespace baseline {
const Kernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
}
#endif
}  // namespace sk
