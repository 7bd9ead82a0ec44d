// Every micro-kernel as a function of its own, for tests/test_codegen.py to disassemble; nothing here is run. A new
// tile is one line in the table below; a new kernel also states its FMAs and loads in a `Codegen:` line above it.
// clang-format off: a table stays a table
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "bsr.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sk::SK_ISA {
namespace {
// As in kernels.inl.
#include "cpu/simd.inl"
#include "cpu/panel_product.inl"
#include "cpu/shifted.inl"
#include "cpu/tile.inl"
#include "cpu/wgrad.inl"
#include "cpu/wide.inl"

// Kernels that leave their sums to the caller, with the sums in registers as there.
namespace whole {
template <class T, int NP, int NV, bool Direct>
SK_INLINE void wide_kernel(const T* const* x, const int32_t* entry, int64_t n, const T* w, T* y) {
  Vec<T> acc[NP][NV] = {};
  SK_ISA::wide_kernel<T, NP, NV, Direct>(x, entry, n, w, acc);
#pragma GCC unroll 6
  for (int i = 0; i < NP; i++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) store(y + (i * NV + v) * kLanes<T>, acc[i][v]);
}
}  // namespace whole

template <auto F>
struct Function;
template <class... A, void (*F)(A...)>
struct Function<F> {
  static void call(A... a) { F(a...); }
};

}  // namespace

#define TILE(KERNEL, ...)                                              \
  reinterpret_cast<void*>(Function<KERNEL<float, __VA_ARGS__>>::call), \
  reinterpret_cast<void*>(Function<KERNEL<double, __VA_ARGS__>>::call)

// Or the compiler would leave them out.
extern void* const micro_kernels[];
void* const micro_kernels[] = {
#ifdef TILES
    TILES
#else
    TILE(strip_kernel, 4, 3), TILE(strip_kernel, 4, 2), TILE(strip_kernel, 4, 1),
    TILE(strip_kernel, 3, 3), TILE(strip_kernel, 3, 2), TILE(strip_kernel, 3, 1),
    TILE(strip_kernel, 2, 3), TILE(strip_kernel, 2, 2), TILE(strip_kernel, 2, 1),
    TILE(strip_kernel, 1, 3), TILE(strip_kernel, 1, 2), TILE(strip_kernel, 1, 1),
    TILE(sell_kernel, 3, NearStep), TILE(sell_kernel, 2, NearStep), TILE(sell_kernel, 1, NearStep),
    TILE(sell_kernel, 3, FarStep), TILE(sell_kernel, 2, FarStep), TILE(sell_kernel, 1, FarStep),
    TILE(dot_kernel, 4, 3), TILE(dot_kernel, 3, 4), TILE(dot_kernel, 2, 6), TILE(dot_kernel, 2, 3),
    TILE(dot_kernel, 1, 8), TILE(dot_kernel, 1, 4),
    TILE(outer_kernel, 4, 3), TILE(outer_kernel, 4, 2), TILE(outer_kernel, 4, 1),
    TILE(outer_kernel, 3, 4), TILE(outer_kernel, 3, 3), TILE(outer_kernel, 3, 2), TILE(outer_kernel, 3, 1),
    TILE(outer_kernel, 2, 6), TILE(outer_kernel, 2, 5), TILE(outer_kernel, 2, 4), TILE(outer_kernel, 2, 3),
    TILE(outer_kernel, 2, 2), TILE(outer_kernel, 2, 1),
    TILE(outer_kernel, 1, 8), TILE(outer_kernel, 1, 7), TILE(outer_kernel, 1, 6), TILE(outer_kernel, 1, 5),
    TILE(outer_kernel, 1, 4), TILE(outer_kernel, 1, 3), TILE(outer_kernel, 1, 2), TILE(outer_kernel, 1, 1),
    TILE(whole::wide_kernel, 6, 2, true), TILE(whole::wide_kernel, 6, 2, false), TILE(whole::wide_kernel, 6, 1, false),
    TILE(whole::wide_kernel, 5, 2, true), TILE(whole::wide_kernel, 5, 2, false), TILE(whole::wide_kernel, 5, 1, false),
    TILE(whole::wide_kernel, 4, 2, true), TILE(whole::wide_kernel, 4, 2, false), TILE(whole::wide_kernel, 4, 1, false),
    TILE(whole::wide_kernel, 3, 2, true), TILE(whole::wide_kernel, 3, 2, false), TILE(whole::wide_kernel, 3, 1, false),
    TILE(whole::wide_kernel, 2, 2, true), TILE(whole::wide_kernel, 2, 2, false), TILE(whole::wide_kernel, 2, 1, false),
    TILE(whole::wide_kernel, 1, 2, true), TILE(whole::wide_kernel, 1, 2, false), TILE(whole::wide_kernel, 1, 1, false),
#endif
};

}  // namespace sk::SK_ISA
