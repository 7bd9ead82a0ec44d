// What sparsekern/freeze writes and cpu/frozen.inl runs: a whole network as one int32 array (header, steps, packed
// indices) and one array of packed weights. Written and read by one version of this package, checked by its magic.
#pragma once
#include "bsr.h"

namespace sk {

// Where the activations of one tile lie in its arena, in numbers: channel c of pixel (y, x) of vector v of the tile is
// the vector of samples at base + y * row + c * channel + x * pixel + v * group.
struct View {
  int32_t base, row, channel, pixel, group;
};

struct FrozenHeader {
  static constexpr int32_t kMagic = 0x5F21;  // changes with the format

  int32_t magic, lanes;     // numbers in a vector of the instruction set that it is packed for
  int32_t inputs, outputs;  // numbers per sample
  int32_t arena;            // numbers of scratch per tile
  int32_t work;             // multiply-adds per sample (saturated)
  int32_t table, steps;     // FrozenStep[steps] from program[table] on
  int32_t wide;             // the first of those that run once per tile instead of once per vector
};

struct FrozenStep {
  enum Kind : int32_t { kInput, kOutput, kClear, kPool, kProduct };

  int32_t kind;
  // The activations that it writes (kOutput: reads; kClear: writes zeros around).
  int32_t channels, height, width;
  View in, out;

  int32_t stride[2];  // of a product's or a pool's window; a product's padding is in its view, its taps in the offsets
  int32_t relu;

  // kPool
  int32_t kernel[2], padding[2], dilation[2], inside[2];  // inside: height and width of what it reads

  // kClear: rows above and below, columns left and right; whether there is a channel of zeros behind the others
  int32_t border[4], zeros;

  // kProduct
  int32_t fused;  // the next step, a pool, takes its rows as they come: `out` has room for one window of them
  int32_t add;    // whether there is a residual to be added
  View residual;
  int32_t sell, narrow;                  // format; whether offsets have 16 bits
  int32_t spans;                         // span s owns groups program[span_groups + s] .. program[span_groups + s + 1]
  int32_t span_groups, groups, offsets;  // where in the program; groups: FrozenGroup each; offsets: in vectors
  int32_t bias, weights;                 // where in the constants
  int32_t in_channels, last_tap;         // from where the first tap of a window reads to where the last one does
};

// Up to 4 rows of W. STRIP: they share `steps` offsets; SELL: each has its own, step by step.
struct FrozenGroup {
  int32_t steps, rows, row[4];
};

template <class T>
struct Frozen {
  const int32_t* program;
  const T* constants;
  const T* x;  // [batch, inputs]
  T* y;        // [batch, outputs]
  int64_t batch;
  Parallel parallel;
  Scratch scratch;
};

}  // namespace sk
