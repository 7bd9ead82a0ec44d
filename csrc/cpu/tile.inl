// Tiles of activations: from memory, in either layout, to the panel the micro-kernels read, and back.
//
// A tile is `lanes` neighbouring pixels of the grid (image, y, x flattened), the last `lanes - count` of them padding.
// Its panel holds one row of `lanes` numbers per k = tap * channels + channel, so that a kernel that wants pixel p's
// neighbour through a tap just reads row k; nothing like im2col of the whole input ever exists.
//
//               lanes                     No tap reads across an edge: where a window hangs over, and in padding
//       k = 0  |........|                 lanes, the panel holds zeros.
//       k = 1  |........|
//       ...

constexpr int64_t kMaxLanes = 256, kSlack = 64;

struct Pixel {
  int64_t image, y, x;
};

inline Pixel pixel_at(int64_t index, const Window& w) {
  const int64_t area = w.grid[0] * w.grid[1], rest = index % area;
  return {index / area, rest / w.grid[1], rest % w.grid[1]};
}

inline void advance(Pixel& p, const Window& w) {
  if (++p.x == w.grid[1]) {
    p.x = 0;
    if (++p.y == w.grid[0]) p.y = 0, ++p.image;
  }
}

// Where grid coordinate `at` reads through tap `tap` of dimension `d`, or -1.
inline int64_t source(const Window& w, int d, int64_t at, int64_t tap, int64_t length) {
  const int64_t s = at * w.stride[d] - w.padding[d] + tap * w.dilation[d];
  return s >= 0 && s < length ? s : -1;
}

// Pixels side by side in one row of the grid: lanes [at, at + length) of a tile, from grid point (y, x) of an image on.
struct Run {
  int64_t at, length, image, y, x;
};

// The runs of the tile of `count` pixels from `first`.
inline int find_runs(const Window& w, int64_t first, int64_t count, Run* runs) {
  int n = 0;
  Pixel p = pixel_at(first, w);
  for (int64_t i = 0; i < count;) {
    Run& r = runs[n++];
    r = {i, std::min(w.grid[1] - p.x, count - i), p.image, p.y, p.x};
    i += r.length, p.x += r.length - 1;
    advance(p, w);
  }
  return n;
}

// What a run reads through one tap where the stride is 1: its lanes [low, high), of which lane 0 is at `offset` of
// channel 0. Empty where the row does not exist.
struct Reach {
  int64_t low, high, offset;
};

inline Reach reach(const Run& r, const Images& in, const Window& w, int64_t i, int64_t j) {
  const int64_t y = r.y * w.stride[0] - w.padding[0] + i * w.dilation[0], x = r.x - w.padding[1] + j * w.dilation[1];
  if (y < 0 || y >= in.height) return {0, 0, 0};
  const int64_t low = std::clamp(-x, int64_t(0), r.length);
  return {low, std::clamp(in.width - x, low, r.length), (r.image * in.channels * in.height + y) * in.width + x};
}

// Squares of numbers, one vector each way: panel[i][..] <- lane[..][i] for L lanes.
template <class T>
SK_INLINE void pack_square(const T* const* lane, int64_t c, int64_t stride, T* panel) {
  constexpr int L = kLanes<T>;
  Vec<T> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) r[i] = lane[i] ? load(lane[i] + c) : Vec<T>{};
  transpose<T>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) store(panel + (c + i) * stride, r[i]);
}

// Panel rows of one tap from lane pointers (null: zeros), `channels` numbers behind each. Two squares at a time read
// whole cache lines: lanes are often 4096 bytes apart, where few of them fit the first-level cache together.
template <class T>
void pack_lanes(const T* const* lane, int64_t channels, int64_t lanes, int64_t stride, T* panel) {
  constexpr int L = kLanes<T>, kAhead = 256 / sizeof(T);
  int64_t c = 0;
  for (; c + 2 * L <= channels; c += 2 * L)
    for (int64_t q = 0; q < lanes; q += L) {
      for (int i = 0; i < L; i++)
        if (lane[q + i]) __builtin_prefetch(lane[q + i] + c + kAhead);
      pack_square(lane + q, c, stride, panel + q);
      pack_square(lane + q, c + L, stride, panel + q);
    }
  for (; c + L <= channels; c += L)
    for (int64_t q = 0; q < lanes; q += L) pack_square(lane + q, c, stride, panel + q);
  for (; c < channels; c++)
    for (int64_t i = 0; i < lanes; i++) panel[c * stride + i] = lane[i] ? lane[i][c] : T(0);
}

template <class T>
void gather_channels_last(const T* x, const Images& in, const Window& w, int64_t first, int64_t count, int64_t lanes,
                          int64_t stride, int64_t begin, int64_t end, T* panel) {
  const T* lane[kMaxLanes];
  for (int64_t tap = 0; tap < w.taps(); tap++) {
    Pixel p = pixel_at(first, w);
    for (int64_t i = 0; i < lanes; i++, advance(p, w)) {
      const int64_t y = i < count ? source(w, 0, p.y, tap / w.kernel[1], in.height) : -1;
      const int64_t z = y < 0 ? -1 : source(w, 1, p.x, tap % w.kernel[1], in.width);
      lane[i] = z < 0 ? nullptr : x + ((p.image * in.height + y) * in.width + z) * in.channels + begin;
    }
    pack_lanes(lane, end - begin, lanes, stride, panel + tap * (end - begin) * stride);
  }
}

// Channels first, one tap, any stride: one number at a time.
template <class T>
void gather_numbers(const T* x, const Images& in, const Window& w, int64_t first, int64_t count, int64_t lanes,
                    int64_t stride, int64_t tap, int64_t begin, int64_t end, T* panel) {
  const int64_t plane = in.height * in.width;
  int64_t offset[kMaxLanes];
  Pixel p = pixel_at(first, w);
  for (int64_t i = 0; i < lanes; i++, advance(p, w)) {
    const int64_t y = i < count ? source(w, 0, p.y, tap / w.kernel[1], in.height) : -1;
    const int64_t z = y < 0 ? -1 : source(w, 1, p.x, tap % w.kernel[1], in.width);
    offset[i] = z < 0 ? -1 : p.image * in.channels * plane + y * in.width + z;
  }
  for (int64_t c = begin; c < end; c++, panel += stride)
    for (int64_t i = 0; i < lanes; i++) panel[i] = offset[i] < 0 ? T(0) : x[offset[i] + c * plane];
}

// Channels first, stride 1: each vector of a panel row is put together from one piece per run it touches, a load of
// neighbours and a mask. What does not depend on the channel is worked out once for as many taps as fit; then channel
// by channel, so that all taps read a plane while it is in the cache.
template <class T>
class PieceGather {
 public:
  PieceGather(const T* x, const Images& in, const Window& w, int64_t first, int64_t count, int64_t lanes,
              int64_t stride, int64_t begin, int64_t end, T* panel)
      : x_(x),
        in_(in),
        w_(w),
        vectors_(lanes / L),
        stride_(stride),
        begin_channel_(begin),
        end_channel_(end),
        panel_(panel),
        plane_(in.height * in.width) {
    Run runs[kMaxLanes];
    const int n = find_runs(w, first, count, runs);
    for (int64_t i = 0, tap = 0; i < w.kernel[0]; i++)
      for (int64_t j = 0; j < w.kernel[1]; j++, tap++) {
        if (taps_ == kMaxTaps || pieces_ + vectors_ + n > kMaxPieces) flush();
        if (!add_tap(runs, n, i, j, tap))
          gather_numbers(x, in, w, first, count, lanes, stride, tap, begin, end, panel + tap * (end - begin) * stride);
      }
    flush();
  }

 private:
  static constexpr int L = kLanes<T>, kMaxTaps = 32, kMaxPieces = 1024;

  // False where a load would leave the tensor; the tap is then not added.
  bool add_tap(const Run* runs, int n, int64_t i, int64_t j, int64_t tap) {
    const int64_t last = (in_.channels - 1) * plane_ + L, total = in_.images * in_.channels * plane_;
    const int64_t place = i * w_.dilation[0] * in_.width + j * w_.dilation[1];
    if (taps_ > 0 && w_.padding[0] == 0 && w_.padding[1] == 0) {
      // No window hangs over an edge: the pieces are those of the first tap, further on.
      const int64_t shift = place - place_of_first_;
      if (highest_ + shift + last > total) return false;
      tap_[taps_] = tap, shift_[taps_] = shift, begin_of_[taps_++] = 0;
      return true;
    }
    const int before = pieces_;
    int* begin = begin_ + taps_ * vectors_;
    if (taps_ == 0) place_of_first_ = place, highest_ = 0;
    for (int64_t v = 0, run = 0; v < vectors_; v++) {
      begin[v] = pieces_;
      for (; run < n && runs[run].at < (v + 1) * L; run++) {
        const Reach r = reach(runs[run], in_, w_, i, j);
        const int64_t shift = runs[run].at - v * L, low = std::max(r.low + shift, int64_t(0));
        const int64_t high = std::min<int64_t>(r.high + shift, L);
        if (low < high) {
          const int64_t offset = r.offset - shift;
          if (offset < 0 || offset + last > total) return pieces_ = before, false;
          highest_ = std::max(highest_, offset);
          offset_[pieces_] = offset, mask_[pieces_++] = mask_between<T>(low, high);
        }
        if (runs[run].at + runs[run].length > (v + 1) * L) break;  // it goes on in the next vector
      }
    }
    begin[vectors_] = pieces_;
    tap_[taps_] = tap, shift_[taps_] = 0, begin_of_[taps_] = taps_ * int(vectors_);
    taps_++;
    return true;
  }

  void flush() {
    for (int64_t c = begin_channel_; c < end_channel_; c++) {
      for (int t = 0; t < taps_; t++) {
        const T* x = x_ + c * plane_ + shift_[t];
        T* to = panel_ + (tap_[t] * (end_channel_ - begin_channel_) + c - begin_channel_) * stride_;
        const int* begin = begin_ + begin_of_[t];
        for (int64_t v = 0; v < vectors_; v++) {
          Mask<T> bits = {};
          for (int p = begin[v]; p < begin[v + 1]; p++) bits |= Mask<T>(load(x + offset_[p])) & mask_[p];
          store(to + v * L, Vec<T>(bits));
        }
      }
    }
    taps_ = pieces_ = 0;
  }

  const T* x_;
  const Images& in_;
  const Window& w_;
  const int64_t vectors_, stride_, begin_channel_, end_channel_;
  T* panel_;
  const int64_t plane_;
  int taps_ = 0, pieces_ = 0;
  int64_t place_of_first_ = 0, highest_ = 0;
  int64_t tap_[kMaxTaps], shift_[kMaxTaps];
  int begin_of_[kMaxTaps];
  int begin_[kMaxTaps * (kMaxLanes / L) + 1];
  int64_t offset_[kMaxPieces];
  Mask<T> mask_[kMaxPieces];
};

// Channels [begin, end) of the panel of the `count` pixels from `first`: rows tap * (end - begin) + channel - begin of
// `lanes` numbers, `stride` apart.
template <class T>
void gather(const T* x, const Images& in, const Window& w, int64_t first, int64_t count, int64_t lanes, int64_t stride,
            int64_t begin, int64_t end, T* panel) {
  if (in.channels_last) return gather_channels_last(x, in, w, first, count, lanes, stride, begin, end, panel);
  if (w.stride[1] == 1) {
    PieceGather<T>(x, in, w, first, count, lanes, stride, begin, end, panel);
    return;
  }
  for (int64_t tap = 0; tap < w.taps(); tap++)
    gather_numbers(x, in, w, first, count, lanes, stride, tap, begin, end, panel + tap * (end - begin) * stride);
}

// The first n columns of a square of a panel become rows of y.
template <class T>
SK_INLINE void unpack_square(const T* panel, int64_t lanes, int64_t n, T* y, int64_t stride) {
  constexpr int L = kLanes<T>;
  Vec<T> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) v[i] = load(panel + i * lanes);
  transpose<T>(v);
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (i < n) store(y + i * stride, v[i]);
}

// Rows [row, row + rows) of the output, from a panel of them (row-major, `lanes` numbers each), at `count` pixels.
template <class T>
void scatter(const T* panel, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t lanes, const Images& out,
             T* y) {
  constexpr int L = kLanes<T>;
  const int64_t area = out.height * out.width;
  if (!out.channels_last) {
    while (count > 0) {
      const int64_t image = first / area, at = first % area, n = std::min(count, area - at);
      T* to = y + (image * out.channels + row) * area + at;
      for (int64_t r = 0; r < rows; r++) {
        int64_t i = 0;
        for (; i + L <= n; i += L) store(to + r * area + i, load(panel + r * lanes + i));
        for (; i < n; i++) to[r * area + i] = panel[r * lanes + i];
      }
      first += n, count -= n, panel += n;
    }
    return;
  }
  T* to = y + first * out.channels + row;
  int64_t r = 0;
  for (; r + 2 * L <= rows; r += 2 * L)  // whole cache lines, as in pack_lanes
    for (int64_t q = 0; q < count; q += L) {
      const int64_t n = std::min<int64_t>(L, count - q);
      unpack_square(panel + r * lanes + q, lanes, n, to + q * out.channels + r, out.channels);
      unpack_square(panel + (r + L) * lanes + q, lanes, n, to + q * out.channels + r + L, out.channels);
    }
  for (; r + L <= rows; r += L)
    for (int64_t q = 0; q < count; q += L)
      unpack_square(panel + r * lanes + q, lanes, std::min<int64_t>(L, count - q), to + q * out.channels + r,
                    out.channels);
  for (; r < rows; r++)
    for (int64_t i = 0; i < count; i++) to[i * out.channels + r] = panel[r * lanes + i];
}

// scatter_add, channels last, for the `n` channels from `channel` on of one tap.
template <class T>
void scatter_add_channels_last(const T* panel, int64_t tap, int64_t channel, int64_t n, int64_t first, int64_t count,
                               int64_t lanes, const Images& in, const Window& w, T* x) {
  constexpr int L = kLanes<T>;
  T* lane[kMaxLanes];
  Pixel p = pixel_at(first, w);
  for (int64_t i = 0; i < count; i++, advance(p, w)) {
    const int64_t y = source(w, 0, p.y, tap / w.kernel[1], in.height);
    const int64_t z = y < 0 ? -1 : source(w, 1, p.x, tap % w.kernel[1], in.width);
    lane[i] = z < 0 ? nullptr : x + ((p.image * in.height + y) * in.width + z) * in.channels + channel;
  }
  int64_t r = 0;
  for (; r + L <= n; r += L)
    for (int64_t q = 0; q < count; q += L) {
      Vec<T> v[L];
      for (int i = 0; i < L; i++) v[i] = load(panel + (r + i) * lanes + q);
      transpose<T>(v);
      for (int64_t i = 0; i < std::min<int64_t>(L, count - q); i++)
        if (lane[q + i]) store(lane[q + i] + r, load(lane[q + i] + r) + v[i]);
    }
  for (; r < n; r++)
    for (int64_t i = 0; i < count; i++)
      if (lane[i]) lane[i][r] += panel[r * lanes + i];
}

// scatter_add, channels first: by whole vectors where the stride is 1, which add zeros to what lies around a run; never
// beyond `end`, where another thread may write.
template <class T>
void scatter_add_rows(const T* panel, int64_t tap, int64_t channel, int64_t n, const Run* runs, int found,
                      int64_t lanes, const Images& in, const Window& w, T* x, const T* end) {
  constexpr int L = kLanes<T>;
  const int64_t plane = in.height * in.width, i = tap / w.kernel[1], j = tap % w.kernel[1];
  struct Piece {
    int64_t from, to, length;
    Mask<T> mask;
  } pieces[kMaxLanes];
  int count = 0;
  x += channel * plane;
  for (int k = 0; k < found; k++) {
    const Run& run = runs[k];
    if (w.stride[1] == 1) {
      const Reach r = reach(run, in, w, i, j);
      for (int64_t p = r.low; p < r.high; p += L) {
        const int64_t length = std::min<int64_t>(L, r.high - p);
        pieces[count++] = {run.at + p, r.offset + p, length, mask_between<T>(0, length)};
      }
    } else {
      const int64_t y = source(w, 0, run.y, i, in.height);
      for (int64_t p = 0; p < run.length && y >= 0; p++) {
        const int64_t z = source(w, 1, run.x + p, j, in.width);
        T* to = x + (run.image * in.channels * in.height + y) * in.width + z;
        for (int64_t r = 0; r < n && z >= 0; r++) to[r * plane] += panel[r * lanes + run.at + p];
      }
    }
  }
  for (int64_t r = 0; r < n; r++, panel += lanes, x += plane)
    for (int k = 0; k < count; k++) {
      const Piece& p = pieces[k];
      const T* from = panel + p.from;
      T* to = x + p.to;
      if (to + L <= end)
        store(to, load(to) + Vec<T>(Mask<T>(load(from)) & p.mask));
      else
        for (int64_t q = 0; q < p.length; q++) to[q] += from[q];
    }
}

// Adds rows [row, row + rows) of a panel, row = tap * channels + channel, to the points of the input that the tile's
// pixels read through those taps: what gather would have read, the other way round. The panel has kSlack numbers behind
// it.
template <class T>
void scatter_add(const T* panel, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t lanes,
                 const Images& in, const Window& w, T* x, const T* end) {
  Run runs[kMaxLanes];
  const int found = find_runs(w, first, count, runs);
  while (rows > 0) {  // tap by tap
    const int64_t tap = row / in.channels, channel = row % in.channels, n = std::min(rows, in.channels - channel);
    if (in.channels_last)
      scatter_add_channels_last(panel, tap, channel, n, first, count, lanes, in, w, x);
    else
      scatter_add_rows(panel, tap, channel, n, runs, found, lanes, in, w, x, end);
    panel += n * lanes, row += n, rows -= n;
  }
}
