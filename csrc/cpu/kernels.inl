// Everything that is compiled once per instruction set: define SK_ISA (its name) and SK_VECTOR_BYTES, then include
// this.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../bsr.h"
#include "../frozen.h"
#include "dispatch.h"

namespace sk::SK_ISA {
namespace {
#include "simd.inl"
// Order matters: each builds on the ones before.
#include "panel_product.inl"
#include "shifted.inl"
#include "tile.inl"
// Forward, and dgrad of linear.
#include "conv_dgrad.inl"
#include "forward.inl"
#include "planes.inl"
#include "wgrad.inl"
#include "wide.inl"
// Whole networks.
#include "frozen.inl"

template <class T>
void forward(const Product<T>& p) {
  if (WideRun<T>::fits(p))
    WideRun<T>(p).run();
  else if (PlaneRun<T>::fits(p))
    PlaneRun<T>(p).run();
  else
    ForwardRun<T>(p).run();
}

// With stride 1 dX is dY through the taps in reverse, with as much padding as makes it the size of X; worth it unless
// much of it would be padding.
template <class T>
void conv_dgrad(const Product<T>& p) {
  Product<T> flipped = p;
  Window& w = flipped.window;
  w.flipped = true, w.grid[0] = p.out.height, w.grid[1] = p.out.width;
  bool fits = 2 * p.out.height * p.out.width <= 3 * p.window.grid[0] * p.window.grid[1];
  for (int d = 0; d < 2; d++) {
    w.padding[d] = (w.kernel[d] - 1) * w.dilation[d] - w.padding[d];
    fits &= w.stride[d] == 1 && w.padding[d] >= 0;
  }
  fits ? forward(flipped) : ConvDgradRun<T>(p).run();
}

#define SK_STRING2(x) #x
#define SK_STRING(x) SK_STRING2(x)
}  // namespace

const Kernels& table() {
  static const Kernels kernels = {
      SK_STRING(SK_ISA),
      SK_VECTOR_BYTES,
      [](const Product<float>& p) { forward(p); },
      [](const Product<double>& p) { forward(p); },
      [](const Product<float>& p) { conv_dgrad(p); },
      [](const Product<double>& p) { conv_dgrad(p); },
      [](const WeightGrad<float>& p) { WeightGradRun<float>(p).run(); },
      [](const WeightGrad<double>& p) { WeightGradRun<double>(p).run(); },
      [](const Frozen<float>& f) { FrozenRun<float>(f).run(); },
      [](const Frozen<double>& f) { FrozenRun<double>(f).run(); },
  };
  return kernels;
}
}  // namespace sk::SK_ISA
