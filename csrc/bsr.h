// What bindings and kernels share: POD views of a plan and of the activations. No torch, no allocation, no threads
// here.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sk {

// A plan as sparsekern/plan.py writes it: one int32 array, a header and then the arrays named below.
//
// The contract, checked in Python when the pattern is built: every k is in [0, ks] (ks only as SELL padding), every
// value index in [0, size) or -1 (SELL padding), row numbers within their range, pointers monotone. The bindings check
// that header and tensors belong together; kernels check nothing.
struct Plan {
  static constexpr int32_t kMagic = 0x5B53, kHeader = 18, kStrip = 0, kSell = 1, kNone = 2;
  static constexpr int kStripRows = 4, kSegmentRows = 128, kWideRows = 16;

  int32_t kind;
  int64_t rows, ks, size;  // outputs, rows of packed X, numbers in the values
  int64_t block[2];        // their block size
  bool overhang;           // some of those numbers lie beyond the edge and are not weights
  int64_t row_stride;      // STRIP: distance of the weights of neighbouring rows

  // STRIP: strip s owns rows first_row[s] .. + rows_of[s] and in span i entries pointer[i * strips + s] .. Span i are
  // span_channels channels from i * span_channels on (fewer at the end), k = tap * (channels of the span) + channel;
  // forward and dgrad have one span. Entries come in runs of neighbours a multiple of `run` long.
  int64_t strips, entry_count, span_channels, run;
  const int32_t *first_row, *rows_of, *pointer;
  const int32_t* entries;  // pairs: k, index of the first row's weight
  int64_t spans;

  // SELL: `spans` of k; segment s owns rows bounds[s] .. bounds[s + 1]; (segment, span) owns groups group_pointer[s *
  // spans + span]
  // ..
  int64_t segments, steps;
  const int32_t *bounds, *group_pointer;
  const int32_t *group_rows, *step_pointer;  // group g: 4 rows within the segment; steps step_pointer[g] ..
  const int32_t *step_k, *step_value;        // step: 4 k, 4 value indices

  // WIDE, behind the first plan where blocks are 16 rows high, and for linear in its place (kNone): strips of 16 rows,
  // as STRIP (count is 0 where there is none). Only the last of a matrix may have fewer rows.
  struct Wide {
    int64_t count, entry_count, row_stride;
    const int32_t *rows_of, *pointer;
    const int32_t* entries;  // pairs: k, index of the first row's weight
  } wide;

  // dgrad of a convolution with several taps has rows = input channels and k = tap * outputs + output; behind it, for
  // strides and the like, another whole plan with rows = tap * input channels + channel and k = outputs.
  const int32_t* second;
  int64_t second_length;

  // Rows of X in a span; the last may be shorter.
  int64_t span_width() const { return (ks + spans - 1) / spans; }

  // False when `plan` is no plan or its length does not fit its header.
  static bool read(const int32_t* plan, int64_t length, Plan& out) {
    if (length < kHeader || plan[0] != kMagic) return false;
    out = Plan{};
    out.kind = plan[1], out.rows = plan[2], out.ks = plan[3], out.size = plan[4], out.overhang = plan[5] != 0;
    out.row_stride = plan[6], out.block[0] = plan[11], out.block[1] = plan[12];
    const int32_t* at = plan + kHeader;
    const int32_t* const end = plan + length;
    if (out.kind == kStrip) {
      const int64_t strips = plan[7], entries = plan[8], spans = plan[9];
      if (end - at < (2 + spans) * strips + 1 + 2 * entries) return false;
      out.strips = strips, out.entry_count = entries, out.spans = spans;
      out.span_channels = plan[10], out.run = plan[16];
      out.first_row = at, at += strips;
      out.rows_of = at, at += strips;
      out.pointer = at, at += spans * strips + 1;
      out.entries = at, at += 2 * entries;
    } else if (out.kind == kSell) {
      const int64_t segments = plan[7], spans = plan[8], groups = plan[9], steps = plan[10];
      if (end - at < (segments + 1) + (segments * spans + 1) + 4 * groups + (groups + 1) + 8 * steps) return false;
      out.segments = segments, out.spans = spans, out.steps = steps;
      out.bounds = at, at += segments + 1;
      out.group_pointer = at, at += segments * spans + 1;
      out.group_rows = at, at += 4 * groups;
      out.step_pointer = at, at += groups + 1;
      out.step_k = at, at += 4 * steps;
      out.step_value = at, at += 4 * steps;
    } else if (out.kind != kNone) {
      return false;
    }
    if (const int64_t strips = plan[13], entries = plan[14]; strips > 0) {
      if (end - at < 2 * strips + 1 + 2 * entries) return false;
      out.wide = {strips, entries, plan[15], at, at + strips, at + 2 * strips + 1};
      at += 2 * strips + 1 + 2 * entries;
    }
    if (plan[17] > 0) out.second = at, out.second_length = end - at, at = end;
    return at == end;
  }
};

// Activations, and the way a grid of pixels reads them. Linear is the case of `images` images of one pixel.
//   index of (image, channel, y, x):  channels_last ? ((image * height + y) * width + x) * channels + channel
//                                                   : ((image * channels + channel) * height + y) * width + x
// Pixel (y, x) of the grid reads, through tap (i, j), the point (y * stride - padding + i * dilation, ...) of the
// images, or zero where that point does not exist.
struct Images {
  int64_t images, channels, height, width;
  bool channels_last;
};

struct Window {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t grid[2];  // height and width of the grid of pixels
  bool flipped;     // tap t of the plan is the last but t of the window
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// Runs task(context, i) for every i in [0, tasks), each on some thread of torch's pool; `work` is the cost of one task
// in multiply-adds, by which small jobs stay on one thread.
using Parallel = void (*)(int64_t tasks, int64_t work, void (*task)(void* context, int64_t i), void* context);

// Per-thread scratch that only grows: `slot` 0 belongs to a caller, 1 to its tasks. 64-byte aligned, never zeroed.
using Scratch = void* (*)(int slot, size_t bytes);

// Y[row, pixel] = bias[row] + sum_k W[row, k] * X[k, pixel]: forward, and dgrad of linear, where Y is `out`.
// dgrad of a convolution comes with the window of its forward, which `out` is read through, and the grid of X.
template <class T>
struct Product {
  Plan plan;
  const T *values, *bias, *x;
  T* y;
  Images in, out;
  Window window;
  Parallel parallel;
  Scratch scratch;
};

// dW[weight] = sum_pixel G[row, pixel] * X[k, pixel]: wgrad of linear and convolution; with it, where `bias` is not
// null, the gradient of the bias, sum_pixel G[row, pixel].
template <class T>
struct WeightGrad {
  Plan plan;  // STRIP
  const T *grad, *x;
  T *values, *bias;
  Images in, out;
  Window window;
  Parallel parallel;
  Scratch scratch;
};

template <class T>
struct Frozen;  // frozen.h

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int vector_bytes;
  void (*forward32)(const Product<float>&);
  void (*forward64)(const Product<double>&);
  void (*conv_dgrad32)(const Product<float>&);
  void (*conv_dgrad64)(const Product<double>&);
  void (*wgrad32)(const WeightGrad<float>&);
  void (*wgrad64)(const WeightGrad<double>&);
  void (*frozen32)(const Frozen<float>&);
  void (*frozen64)(const Frozen<double>&);
};

// The set in use: the best the CPU has, or the one SPARSEKERN_CPU_ISA names. Chosen once, at load.
const Kernels& kernels();

}  // namespace sk
