// Y[row, pixel] = bias[row] + sum_k W[row, k] * X[k, pixel] where 16 rows share each k and the channels of a pixel are
// neighbours in memory: bsr_linear and its dgrad, bsr_conv2d and its dgrad in channels_last. Nothing is packed but W.
//
//        rows of the strip (16)              a tile: up to 6 pixels times 2 vectors of rows
//   k   |w w w w w w w w|w w ... |             one entry: 2 loads of W, 6 broadcasts of X, 12 FMAs
//   x0 -> acc acc
//   x1 -> acc acc       A tap whose point exists for none of the 6 pixels is skipped; where it exists for some, the
//   ...                 others read a row of zeros.
//   x5 -> acc acc
//
// Who computes what: a task is a block of at most 24 pixels, strip by strip, so that a strip's weights are read from
// the first-level cache by all but the first tile. In dgrad with strides, pixels are numbered phase by phase (x modulo
// stride), for neighbours of one phase read through the same taps.
// Order of summation: an output sums its entries in the order of the plan, in one accumulator per 256 entries.

// Weights of NV * lanes rows, from w on, `step` numbers from entry to entry where they are in a stream (Direct: where
// the entry says). kWideRows of them are there even where the strip has fewer.
template <class T, int NP, int NV, bool Direct>
SK_INLINE void wide_kernel(const T* const* x, const int32_t* entry, int64_t n, const T* w, Vec<T> (&acc)[NP][NV]) {
  constexpr int L = kLanes<T>;
  const T* xs[NP];
#pragma GCC unroll 6
  for (int i = 0; i < NP; i++) xs[i] = x[i];
  for (const int32_t* end = entry + 2 * n; entry != end; entry += 2) {
    const int64_t k = entry[0];
    const T* from = Direct ? w + entry[1] : w;
    Vec<T> wv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) wv[v] = load_once(from + v * L);
#pragma GCC unroll 6
    for (int i = 0; i < NP; i++) {
      const Vec<T> b = splat(xs[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[i][v] = fma<T>(acc[i][v], b, wv[v]);
    }
    if (!Direct) w += Plan::kWideRows;
  }
}

template <class T>
class WideRun {
 public:
  // Whether these activations can be read and written in place.
  static bool fits(const Product<T>& p) { return p.plan.wide.count > 0 && p.in.channels_last && p.out.channels_last; }

  // Forward, and dgrad of linear: the grid of pixels is that of Y, which reads X through the window. `transposed`:
  // dgrad of a convolution, where it is X that reads Y.
  WideRun(const Product<T>& p, bool transposed) : p_(p), wide_(p.plan.wide), transposed_(transposed) {
    height_ = transposed ? p.out.height : p.window.grid[0];
    width_ = transposed ? p.out.width : p.window.grid[1];
    pixels_ = p.in.images * height_ * width_;
    direct_ = wide_.row_stride == 1;
  }

  void run() {
    if (pixels_ == 0 || p_.out.channels == 0) return;
    const int64_t blocks = (pixels_ + kBlock - 1) / kBlock;
    // Few pixels: strips are shared out as well.
    const int64_t shares = blocks >= kManyBlocks ? 1 : std::min<int64_t>(wide_.count, kManyBlocks);
    const int64_t stream = direct_ ? 0 : wide_.entry_count * Plan::kWideRows;
    T* scratch = static_cast<T*>(p_.scratch(0, size_t(stream + p_.in.channels) * sizeof(T)));
    stream_ = scratch, zeros_ = scratch + stream;
    std::fill_n(scratch + stream, p_.in.channels, T(0));
    if (!direct_)
      p_.parallel(
          wide_.count, stream / wide_.count, [](void* self, int64_t i) { static_cast<WideRun*>(self)->fill_strip(i); },
          this);
    shares_ = shares, blocks_ = blocks;
    p_.parallel(
        blocks * shares, p_.plan.size * pixels_ / (blocks * shares),
        [](void* self, int64_t i) { static_cast<WideRun*>(self)->block(i); }, this);
  }

 private:
  static constexpr int L = kLanes<T>, kTile = 6, kBlock = 24, kMaxTaps = 64;
  static constexpr int NV = L >= 16 ? 1 : 2;  // vectors of a tile
  static constexpr int64_t kManyBlocks = 4;

  // The stream of a strip: its weights entry by entry, 16 rows of each.
  void fill_strip(int64_t s) {
    constexpr int W = Plan::kWideRows;
    const int64_t rows = wide_.rows_of[s], stride = wide_.row_stride;
    const int64_t begin = wide_.pointer[wide_.part_pointer[s]], end = wide_.pointer[wide_.part_pointer[s + 1]];
    const int32_t* index = wide_.entries + 1;
    for (int64_t e = begin; e < end;) {
      const T* from = p_.values + index[2 * e];
      T* to = const_cast<T*>(stream_) + e * W;
      if (rows == W && e + 4 <= end && index[2 * e + 6] == index[2 * e] + 3) {
        for (int r = 0; r < W; r += 4) transpose_square(from + r * stride, stride, to + r, W);
        e += 4;
      } else {
        for (int64_t r = 0; r < W; r++) to[r] = r < rows ? from[r * stride] : T(0);
        e++;
      }
    }
  }

  // What pixel `at` reads through each tap; pixels beyond the last read nothing.
  void find(int64_t at, const T** taps) const {
    const Window& w = p_.window;
    const Images& in = p_.in;
    const int64_t area = height_ * width_;
    const bool exists = at < pixels_;
    const int64_t image = at / area;
    const auto [y, x] = exists ? place(at % area) : Place{0, 0};
    for (int64_t i = 0, t = 0; i < w.kernel[0]; i++) {
      const int64_t v = exists ? point(0, y, i, in.height) : -1;
      for (int64_t j = 0; j < w.kernel[1]; j++, t++) {
        const int64_t u = v < 0 ? -1 : point(1, x, j, in.width);
        taps[t * kBlock] = u < 0 ? nullptr : p_.x + ((image * in.height + v) * in.width + u) * in.channels;
      }
    }
  }

  struct Place {
    int64_t y, x;
  };

  // Pixel `at` of an image: row by row, or phase by phase.
  Place place(int64_t at) const {
    const int64_t s = transposed_ ? p_.window.stride[1] : 1;
    const int64_t y = at / width_;
    at %= width_;
    if (s == 1) return {y, at};
    for (int64_t phase = 0;; phase++) {
      const int64_t n = (width_ - phase + s - 1) / s;
      if (at < n) return {y, at * s + phase};
      at -= n;
    }
  }

  // Coordinate `d` of what is read through a tap, or -1.
  int64_t point(int d, int64_t at, int64_t tap, int64_t length) const {
    const Window& w = p_.window;
    if (!transposed_) return source(w, d, at, tap, length);
    const int64_t s = at + w.padding[d] - tap * w.dilation[d];
    return s >= 0 && s % w.stride[d] == 0 && s / w.stride[d] < length ? s / w.stride[d] : -1;
  }

  void block(int64_t task) {
    const int64_t block = task / shares_, share = task % shares_;
    const int64_t first = block * pixels_ / blocks_, count = (block + 1) * pixels_ / blocks_ - first;
    const int64_t taps = p_.window.taps();
    const T** x = static_cast<const T**>(p_.scratch(1, size_t(taps) * kBlock * sizeof(T*)));
    T* y[kBlock];
    for (int64_t i = 0; i < kBlock; i++) {
      find(i < count ? first + i : pixels_, x + i);
      if (i < count) y[i] = target(first + i);
    }
    for (int64_t s = share * wide_.count / shares_; s < (share + 1) * wide_.count / shares_; s++)
      for (int64_t at = 0; at < count; at += kTile) switch (std::min<int64_t>(kTile, count - at)) {
          case 6:
            strip<6>(s, x + at, y + at);
            break;
          case 5:
            strip<5>(s, x + at, y + at);
            break;
          case 4:
            strip<4>(s, x + at, y + at);
            break;
          case 3:
            strip<3>(s, x + at, y + at);
            break;
          case 2:
            strip<2>(s, x + at, y + at);
            break;
          default:
            strip<1>(s, x + at, y + at);
        }
  }

  T* target(int64_t at) const {
    if (!transposed_) return p_.y + at * p_.out.channels;
    const auto [y, x] = place(at % (height_ * width_));
    return p_.y + ((at / (height_ * width_) * height_ + y) * width_ + x) * p_.out.channels;
  }

  template <int NP>
  void strip(int64_t s, const T* const* x, T* const* y) const {
    for (int v = 0; v < Plan::kWideRows; v += NV * L)
      if (v < wide_.rows_of[s]) direct_ ? rows<NP, true>(s, v, x, y) : rows<NP, false>(s, v, x, y);
  }

  // Rows v .. v + NV * L of a strip.
  template <int NP, bool Direct>
  void rows(int64_t s, int64_t v, const T* const* x, T* const* y) const {
    const int64_t row = wide_.first_row[s] + v, n = std::min<int64_t>(NV * L, wide_.rows_of[s] - v);
    Vec<T> acc[NP][NV];
#pragma GCC unroll 6
    for (int i = 0; i < NP; i++)
#pragma GCC unroll 2
      for (int q = 0; q < NV; q++) acc[i][q] = Vec<T>{};
    bool written = false;
    int64_t summed = 0;
    for (int64_t p = wide_.part_pointer[s]; p < wide_.part_pointer[s + 1]; p++) {
      const T* const* tap = x + wide_.tap[p] * kBlock;
      const T* points[NP];
      bool any = false;
#pragma GCC unroll 6
      for (int i = 0; i < NP; i++) any |= tap[i] != nullptr, points[i] = tap[i] ? tap[i] : zeros_;
      if (!any) continue;
      const int64_t at = wide_.pointer[p], count = wide_.pointer[p + 1] - at;
      if (summed > 0 && summed + count > kPiece) {
        flush<NP>(acc, row, n, written, y);
        written = true, summed = 0;
      }
      wide_kernel<T, NP, NV, Direct>(points, wide_.entries + 2 * at, count,
                                     Direct ? p_.values + v : stream_ + at * Plan::kWideRows + v, acc);
      summed += count;
    }
    flush<NP>(acc, row, n, written, y);
  }

  static constexpr int64_t kPiece = 256;

  // Adds the sums to y, or writes them with the bias the first time, and clears them.
  template <int NP>
  SK_INLINE void flush(Vec<T> (&acc)[NP][NV], int64_t row, int64_t n, bool add, T* const* y) const {
    alignas(64) T part[NV * L], bias[NV * L] = {};
    if (p_.bias) std::copy_n(p_.bias + row, n, bias);
#pragma GCC unroll 6
    for (int i = 0; i < NP; i++) {
      T* to = y[i] + row;
#pragma GCC unroll 2
      for (int q = 0; q < NV; q++) {
        if (n == NV * L)
          store(to + q * L, acc[i][q] + (add ? load(to + q * L) : load(bias + q * L)));
        else
          store(part + q * L, acc[i][q]);
        acc[i][q] = Vec<T>{};
      }
      for (int64_t r = 0; n < NV * L && r < n; r++) to[r] = part[r] + (add ? to[r] : bias[r]);
    }
  }

  const Product<T>& p_;
  const Plan::Wide& wide_;
  const bool transposed_;
  bool direct_;
  int64_t height_, width_, pixels_, blocks_ = 0, shares_ = 0;
  const T *stream_ = nullptr, *zeros_ = nullptr;
};
