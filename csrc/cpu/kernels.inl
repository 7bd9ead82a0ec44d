// Everything that is compiled once per instruction set: define SK_ISA (its name) and SK_VECTOR_BYTES, then include
// this.
#include <algorithm>
#include <cstdint>
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

#define SK_STRING2(x) #x
#define SK_STRING(x) SK_STRING2(x)
}  // namespace

const Kernels& table() {
  static const Kernels kernels = {
      SK_STRING(SK_ISA),
      [](const Product<float>& p) { ForwardRun<float>(p).run(); },
      [](const Product<double>& p) { ForwardRun<double>(p).run(); },
      [](const Product<float>& p) { ConvDgradRun<float>(p).run(); },
      [](const Product<double>& p) { ConvDgradRun<double>(p).run(); },
      [](const WeightGrad<float>& p) { WeightGradRun<float>(p).run(); },
      [](const WeightGrad<double>& p) { WeightGradRun<double>(p).run(); },
  };
  return kernels;
}
}  // namespace sk::SK_ISA
