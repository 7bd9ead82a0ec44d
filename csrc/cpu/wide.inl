// Y[row, pixel] = bias[row] + sum_k W[row, k] * X[k, pixel] where 16 rows share each k and the channels of a pixel are
// neighbours in memory: bsr_linear and its dgrad, bsr_conv2d and, with stride 1, its dgrad in channels_last.
//
//        rows of the strip (16)              a tile: up to 6 pixels times 2 vectors of rows
//   k   |w w w w w w w w|w w ... |             one entry: 2 loads of W, 6 broadcasts of X, 12 FMAs
//   x0 -> acc acc
//   x1 -> acc acc       X is read in place. With padding, the rows that a band of pixels reads are copied first, zeros
//   ...                 around them, so that k is the same distance from every pixel.
//   x5 -> acc acc
//
// Who computes what: a task is a band of pixels (with few, a part of its strips); within it, strip by strip for 24
// pixels at a time, so that a strip's weights are read from the first-level cache by all tiles but the first. Order of
// summation: an output sums its entries in the order of the plan, in pieces of 256 that are added up.

// Adds n entries to the sums. The weights of an entry are the next kWideRows of a stream or, if Direct, where it says.
// Codegen: NP * NV FMAs, NP + NV loads, no spill.
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
  static bool fits(const Product<T>& p) {
    return p.plan.wide.count > 0 && p.in.channels_last && p.out.channels_last &&
           p.in.images * p.in.height * p.in.width * p.in.channels < INT32_MAX;
  }

  explicit WideRun(const Product<T>& p) : p_(p), w_(p.window), wide_(p.plan.wide), direct_(wide_.row_stride == 1) {
    const Window& w = w_;
    padded_ = w.padding[0] > 0 || w.padding[1] > 0;
    pitch_ = padded_ ? p.in.width + 2 * w.padding[1] : p.in.width;
    halo_ = (w.kernel[0] - 1) * w.dilation[0] + 1;
    if (padded_) {
      const int64_t fit = kBandBytes / int64_t(sizeof(T)) / (pitch_ * p.in.channels);
      const int64_t most = std::clamp<int64_t>((fit - halo_) / w.stride[0] + 1, 1, w.grid[0]);
      per_image_ = (w.grid[0] + most - 1) / most;
      bands_ = p.in.images * per_image_;
      copy_ = (((w.grid[0] + per_image_ - 1) / per_image_ - 1) * w.stride[0] + halo_) * pitch_ * p.in.channels;
    } else {
      bands_ = (p.in.images * w.grid[0] * w.grid[1] + kBlock - 1) / kBlock;
    }
  }

  void run() {
    if (p_.in.images * w_.grid[0] * w_.grid[1] == 0 || p_.out.channels == 0) return;
    constexpr int64_t W = Plan::kWideRows;
    shares_ = bands_ >= kManyBands ? 1 : std::min<int64_t>(wide_.count, kManyBands);
    const bool many_taps = w_.taps() > 1;
    const int64_t stream = direct_ ? 0 : wide_.entry_count * W, copies = shares_ > 1 && padded_ ? bands_ * copy_ : 0;
    const int64_t pairs = many_taps ? 2 * wide_.entry_count : 0;
    char* scratch = static_cast<char*>(p_.scratch(0, size_t(stream + copies) * sizeof(T) + size_t(pairs) * 4 + 64));
    stream_ = reinterpret_cast<T*>(scratch), copies_ = stream_ + stream;
    entries_ = many_taps ? reinterpret_cast<int32_t*>(copies_ + copies) : nullptr;
    if (!direct_ || many_taps)
      p_.parallel(
          wide_.count, 2 * p_.plan.size / wide_.count,
          [](void* self, int64_t i) { static_cast<WideRun*>(self)->fill_strip(i); }, this);
    if (copies)
      p_.parallel(
          bands_, copy_,
          [](void* self, int64_t i) {
            WideRun* run = static_cast<WideRun*>(self);
            run->copy_band(i, run->copies_ + i * run->copy_);
          },
          this);
    const int64_t work = p_.plan.size * p_.in.images * w_.grid[0] * w_.grid[1] / (bands_ * shares_);
    p_.parallel(bands_ * shares_, work, [](void* self, int64_t i) { static_cast<WideRun*>(self)->task(i); }, this);
  }

 private:
  static constexpr int L = kLanes<T>, kTile = 6;
  static constexpr int NV = L >= 16 ? 1 : 2;  // vectors of a tile
  static constexpr int64_t kBlock = 24, kManyBands = 4, kBandBytes = 192 << 10, kPiece = 256;

  using Band = typename Planes<T>::Band;
  Band band(int64_t i) const {
    const int64_t b = i % per_image_;
    return {i / per_image_, b * w_.grid[0] / per_image_, (b + 1) * w_.grid[0] / per_image_};
  }

  // The stream of a strip: its weights entry by entry, 16 rows of each, and how far each k is from a pixel's first.
  void fill_strip(int64_t s) {
    constexpr int W = Plan::kWideRows;
    const int64_t rows = wide_.rows_of[s], stride = wide_.row_stride, begin = wide_.pointer[s];
    const int64_t end = wide_.pointer[s + 1], channels = p_.in.channels;
    for (int64_t e = begin; entries_ && e < end; e++) {
      const int64_t k = wide_.entries[2 * e];
      int64_t tap = k / channels;
      if (w_.flipped) tap = w_.taps() - 1 - tap;
      const int64_t y = tap / w_.kernel[1] * w_.dilation[0], x = tap % w_.kernel[1] * w_.dilation[1];
      entries_[2 * e] = int32_t((y * pitch_ + x) * channels + k % channels);
      entries_[2 * e + 1] = wide_.entries[2 * e + 1];
    }
    if (direct_) return;
    const int32_t* index = wide_.entries + 1;
    for (int64_t e = begin; e < end;) {
      const T* from = p_.values + index[2 * e];
      T* to = stream_ + e * W;
      if (rows == W && e + 4 <= end && index[2 * e + 6] == index[2 * e] + 3) {
        for (int r = 0; r < W; r += 4) transpose_square(from + r * stride, stride, to + r, W);
        e += 4;
      } else {
        for (int64_t r = 0; r < W; r++) to[r] = r < rows ? from[r * stride] : T(0);
        e++;
      }
    }
  }

  struct Rows {
    const T* x;
    int64_t count;  // of numbers
  };
  // Where a band reads X: rows below one another, which need not be all its own.
  Rows rows_read(int64_t i) const {
    const Band b = band(i);
    const auto r = Planes<T>(p_.x, p_.in, w_).rows(b);
    const int64_t row = p_.in.width * p_.in.channels;
    return {p_.x + (b.image * p_.in.height + r.top + r.first) * row, (r.last - r.first) * row};
  }

  // The rows of X that a band reads, with the padding around them.
  void copy_band(int64_t i, T* to) const {
    const Band b = band(i);
    const int64_t channels = p_.in.channels, row = pitch_ * channels, left = w_.padding[1] * channels;
    const int64_t top = b.begin * w_.stride[0] - w_.padding[0], rows = (b.end - b.begin - 1) * w_.stride[0] + halo_;
    for (int64_t y = top; y < top + rows; y++, to += row) {
      if (y < 0 || y >= p_.in.height) {
        std::fill_n(to, row, T(0));
        continue;
      }
      const int64_t n = p_.in.width * channels;
      std::fill_n(to, left, T(0));
      std::memcpy(to + left, p_.x + (b.image * p_.in.height + y) * n, size_t(n) * sizeof(T));
      std::fill(to + left + n, to + row, T(0));
    }
  }

  void task(int64_t i) const {
    const int64_t share = i % shares_, begin = share * wide_.count / shares_, end = (share + 1) * wide_.count / shares_;
    i /= shares_;
    const T* x[kBlock];
    T* y[kBlock];
    const int64_t area = w_.grid[0] * w_.grid[1], channels = p_.in.channels;
    if (!padded_) {
      const int64_t pixels = p_.in.images * area, first = i * pixels / bands_, last = (i + 1) * pixels / bands_;
      Pixel at = pixel_at(first, w_);
      for (int64_t n = 0; n < last - first; n++, advance(at, w_)) {
        x[n] = p_.x + ((at.image * p_.in.height + at.y * w_.stride[0]) * pitch_ + at.x * w_.stride[1]) * channels;
        y[n] = p_.y + (first + n) * p_.out.channels;
      }
      return block(begin, end, last - first, x, y, p_.x + last * channels,
                   pitch_ == w_.grid[1] ? std::min(kBlock, pixels - last) * channels : 0);
    }
    const Band b = band(i);
    T* copy = copies_ + i * copy_;
    if (shares_ == 1) {
      copy = static_cast<T*>(p_.scratch(1, size_t(copy_) * sizeof(T)));
      copy_band(i, copy);
    }
    T* to = p_.y + (b.image * area + b.begin * w_.grid[1]) * p_.out.channels;
    const int64_t blocks = ((b.end - b.begin) * w_.grid[1] + kBlock - 1) / kBlock;
    const Rows next = shares_ == 1 && i + 1 < bands_ ? rows_read(i + 1) : Rows{p_.x, 0};
    int64_t n = 0, nth = 0;
    const auto compute = [&] {
      const int64_t from = nth * next.count / blocks, until = (nth + 1) * next.count / blocks;
      block(begin, end, n, x, y, next.x + from, until - from);
      n = 0, nth++;
    };
    for (int64_t v = 0; v < b.end - b.begin; v++)
      for (int64_t u = 0; u < w_.grid[1]; u++, to += p_.out.channels) {
        x[n] = copy + (v * w_.stride[0] * pitch_ + u * w_.stride[1]) * channels, y[n++] = to;
        if (n == kBlock) compute();
      }
    if (n > 0) compute();
  }

  // Strips [begin, end) for `count` pixels, in tiles as equal as can be. Meanwhile `ahead` numbers from `next` on,
  // which the next block will read, are fetched into the second-level cache, a share with each strip.
  void block(int64_t begin, int64_t end, int64_t count, const T* const* x, T* const* y, const T* next = nullptr,
             int64_t ahead = 0) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t tiles = (count + kTile - 1) / kTile, lines = ahead / kLine, strips = end - begin;
    for (int64_t s = begin; s < end; s++) {
      for (int64_t i = (s - begin) * lines / strips; i < (s - begin + 1) * lines / strips; i++)
        __builtin_prefetch(next + i * kLine, 0, 2);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t at = t * count / tiles;
        switch ((t + 1) * count / tiles - at) {
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
    }
  }

  template <int NP>
  void strip(int64_t s, const T* const* x, T* const* y) const {
    for (int v = 0; v < Plan::kWideRows; v += NV * L)
      if (v < wide_.rows_of[s]) direct_ ? rows<NP, true>(s, v, x, y) : rows<NP, false>(s, v, x, y);
  }

  // Rows v .. v + NV * L of a strip.
  template <int NP, bool Direct>
  void rows(int64_t s, int64_t v, const T* const* x, T* const* y) const {
    const int64_t row = s * Plan::kWideRows + v, n = std::min<int64_t>(NV * L, wide_.rows_of[s] - v);
    const int32_t* entries = entries_ ? entries_ : wide_.entries;
    const int64_t begin = wide_.pointer[s], end = wide_.pointer[s + 1];
    for (int64_t at = begin; at == begin || at < end; at += kPiece) {
      Vec<T> acc[NP][NV];
#pragma GCC unroll 6
      for (int i = 0; i < NP; i++)
#pragma GCC unroll 2
        for (int q = 0; q < NV; q++) acc[i][q] = Vec<T>{};
      wide_kernel<T, NP, NV, Direct>(x, entries + 2 * at, std::min(kPiece, end - at),
                                     Direct ? p_.values + v : stream_ + at * Plan::kWideRows + v, acc);
      add<NP>(acc, row, n, at == begin, y);
    }
  }

  // Writes the sums with the bias, or adds them to what is there.
  template <int NP>
  SK_INLINE void add(Vec<T> (&acc)[NP][NV], int64_t row, int64_t n, bool first, T* const* y) const {
    const T* bias = p_.bias ? p_.bias + row : nullptr;
    if (n == NV * L) {  // no call in here: the sums would have to leave their registers for it
#pragma GCC unroll 2
      for (int q = 0; q < NV; q++) {
        const Vec<T> b = first && bias ? load(bias + q * L) : Vec<T>{};
#pragma GCC unroll 6
        for (int i = 0; i < NP; i++) {
          T* to = y[i] + row + q * L;
          store(to, acc[i][q] + (first ? b : load(to)));
        }
      }
      return;
    }
    alignas(64) T part[NV * L];
#pragma GCC unroll 6
    for (int i = 0; i < NP; i++) {
      T* to = y[i] + row;
#pragma GCC unroll 2
      for (int q = 0; q < NV; q++) store(part + q * L, acc[i][q]);
      for (int64_t r = 0; r < n; r++) to[r] = part[r] + (first ? (bias ? bias[r] : T(0)) : to[r]);
    }
  }

  const Product<T>& p_;
  const Window& w_;
  const Plan::Wide& wide_;
  const bool direct_;
  bool padded_;
  int64_t pitch_, halo_;  // pixels from row to row, rows that one row of pixels reads
  int64_t bands_, per_image_ = 1, copy_ = 0, shares_ = 1;
  T *stream_ = nullptr, *copies_ = nullptr;
  int32_t* entries_ = nullptr;
};
