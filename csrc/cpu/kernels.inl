// Everything that is compiled once per instruction set: define SK_ISA (its name) and SK_VECTOR_BYTES, then include
// this.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../bsr.h"
#include "dispatch.h"

namespace sk::SK_ISA {
namespace {
#include "simd.inl"
// Order matters: each builds on the ones before.
#include "panel_product.inl"
#include "tile.inl"
// Forward, and dgrad of linear.
#include "conv_dgrad.inl"
#include "forward.inl"
#include "wgrad.inl"
#include "wide.inl"

template <class T>
void forward(const Product<T>& p) {
  WideRun<T>::fits(p) ? WideRun<T>(p, false).run() : ForwardRun<T>(p).run();
}

template <class T>
void conv_dgrad(const Product<T>& p) {
  WideRun<T>::fits(p) ? WideRun<T>(p, true).run() : ConvDgradRun<T>(p).run();
}

#define SK_STRING2(x) #x
#define SK_STRING(x) SK_STRING2(x)
}  // namespace

const Kernels& table() {
  static const Kernels kernels = {
      SK_STRING(SK_ISA),
      [](const Product<float>& p) { forward(p); },
      [](const Product<double>& p) { forward(p); },
      [](const Product<float>& p) { conv_dgrad(p); },
      [](const Product<double>& p) { conv_dgrad(p); },
      [](const WeightGrad<float>& p) { WeightGradRun<float>(p).run(); },
      [](const WeightGrad<double>& p) { WeightGradRun<double>(p).run(); },
  };
  return kernels;
}
}  // namespace sk::SK_ISA
