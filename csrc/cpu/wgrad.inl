// dW[weight] = sum_pixel G[row, pixel] * X[k, pixel], and with it db[row] = sum_pixel G[row, pixel]: the micro-kernels
// of wgrad, and its driver.
//
//   dot: panels [k][pixel], a tile of R rows times N entries of     outer: panels [channel / lanes][pixel][lanes],
//   where one strip; the lanes of each sum are added at the end           neighbouring weights have neighbouring
//   channels
//      row of G    |g g g g g ...|                                     X at pixel   |x x x x|  |x x x x|  |x x x x|
//      row k of X  |x x x x x ...|                                     4 rows of G   g -> acc     acc        acc
//   R + N loads, R * N FMAs per vector of pixels                    N vectors + R broadcasts, R * N FMAs per pixel
//
// Who computes what: pixels are cut into pieces, channels into the plan's spans, both so that a span's X stays in a
// cache. With few pieces, all threads pack a few spans and then share their strips; with many, a task is a range of
// pieces with sums of its own. Order of summation: pixel by pixel of a piece (dot: lane by lane, then over lanes), then
// pieces, then ranges; their numbers are fixed by shape, so threads do not matter.
// Rows k of a convolution with several taps come from planes (shifted.inl) where bands of rows fill their lanes.
// Limits: a strip of one row (blocks one row high) loads X once per FMA.

// Adds (or, at the first piece, writes) the sums of R rows times n <= N entries. Row k of X is at place[k].
// Codegen: R * N FMAs, R + N loads, no spill.
template <class T, int R, int N>
SK_INLINE void dot_kernel(const T* grad, const T* x, const uint32_t* place, int64_t lanes, const int32_t* entry, int n,
                          int64_t row_stride, bool first, T* values) {
  constexpr int L = kLanes<T>, kSums = (R * N + L - 1) / L * L;
  const T* xs[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) xs[j] = x + place[entry[2 * (j < n ? j : n - 1)]];
  Vec<T> acc[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i++) acc[i] = Vec<T>{};
  for (int64_t p = 0; p < lanes; p += L) {
    // The shorter side stays in registers while the other streams past: 12 sums, 3 and 1 are all 16 there are.
    if constexpr (R > N) {
      Vec<T> xv[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) xv[j] = load_once(xs[j] + p);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Vec<T> g = load_once(grad + r * lanes + p);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) acc[j * R + r] = fma<T>(acc[j * R + r], g, xv[j]);
      }
    } else {
      Vec<T> g[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) g[r] = load_once(grad + r * lanes + p);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        if constexpr (R == 1) {
          acc[j] = fma_from<T>(acc[j], g[0], xs[j] + p);
        } else {
          const Vec<T> xv = load_once(xs[j] + p);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) acc[j * R + r] = fma<T>(acc[j * R + r], g[r], xv);
        }
      }
    }
  }
  alignas(64) T sums[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += L) store(sums + i, sum_lanes<T>(acc + i));
  for (int j = 0; j < n; j++)
    for (int r = 0; r < R; r++) {
      T& to = values[entry[2 * j + 1] + r * row_stride];
      to = first ? sums[j * R + r] : to + sums[j * R + r];
    }
}

template <class T, int R, int N>
void dot_strip(const T* grad, const T* x, const uint32_t* place, int64_t lanes, const int32_t* entry, int64_t n,
               int64_t row_stride, bool first, T* values) {
  for (; n >= N; n -= N, entry += 2 * N)
    dot_kernel<T, R, N>(grad, x, place, lanes, entry, N, row_stride, first, values);
  if constexpr (N > 4) {
    if (n > 0 && n <= N / 2) {
      dot_kernel<T, R, N / 2>(grad, x, place, lanes, entry, int(n), row_stride, first, values);
      return;
    }
  }
  if (n > 0) dot_kernel<T, R, N>(grad, x, place, lanes, entry, int(n), row_stride, first, values);
}

// Places of a pixel of X and of the pixel of G that reads it, in numbers from their first.
struct Pair {
  int32_t x, grad;
};

// Adds (or writes) the sums of R rows times N vectors of neighbouring weights.
// Codegen: R * N FMAs, R + N loads, no spill.
template <class T, int R, int N>
SK_INLINE void outer_kernel(const T* const* grad, const T* const* x, const Pair* pair, int64_t n, bool first,
                            int64_t row_stride, T* const* values) {
  const T *gs[R], *xs[N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) gs[r] = grad[r];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) xs[j] = x[j];
  Vec<T> acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[r][j] = Vec<T>{};
  for (const Pair* end = pair + n; pair != end; pair++) {
    const int64_t at = pair->x, g = pair->grad;
    // The shorter side stays in registers, as in dot_kernel.
    if constexpr (R >= N) {
      Vec<T> xv[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) xv[j] = load_once(xs[j] + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Vec<T> b = splat(gs[r][g]);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) acc[r][j] = fma<T>(acc[r][j], b, xv[j]);
      }
    } else {
      Vec<T> b[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) b[r] = splat(gs[r][g]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        const Vec<T> xv = load_once(xs[j] + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][j] = fma<T>(acc[r][j], b[r], xv);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; j++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      T* to = values[j] + r * row_stride;
      store(to, first ? acc[r][j] : load(to) + acc[r][j]);
    }
}

// Channels [begin, end) of `images` images from x on as [channel / lanes][pixel][lanes]; lanes beyond `end` are zeros.
template <class T>
void pack_channels(const T* x, const Images& in, int64_t images, int64_t begin, int64_t end, T* panel) {
  constexpr int L = kLanes<T>;
  const int64_t area = in.height * in.width, pixels = images * area;
  if (in.channels_last) {
    int64_t c = begin;
    for (; c + 2 * L <= end; c += 2 * L, panel += 2 * pixels * L)  // whole cache lines
      for (int64_t p = 0; p < pixels; p++) {
        const T* from = x + p * in.channels + c;
        store(panel + p * L, load(from)), store(panel + (pixels + p) * L, load(from + L));
      }
    for (; c + L <= end; c += L, panel += pixels * L)
      for (int64_t p = 0; p < pixels; p++) store(panel + p * L, load(x + p * in.channels + c));
    for (int64_t p = 0; c < end && p < pixels; p++)
      for (int i = 0; i < L; i++) panel[p * L + i] = c + i < end ? x[p * in.channels + c + i] : T(0);
    return;
  }
  for (int64_t c = begin; c < end; c += L, panel += pixels * L)
    for (int64_t image = 0; image < images; image++) {
      const T* lane[L];
      for (int i = 0; i < L; i++) lane[i] = c + i < end ? x + (image * in.channels + c + i) * area : nullptr;
      pack_lanes(lane, area, L, L, panel + image * area * L);
    }
}

template <class T>
class WeightGradRun {
 public:
  explicit WeightGradRun(const WeightGrad<T>& p) : p_(p), plan_(p.plan), planes_(p.x, p.in, p.window) {
    grid_ = p.window.grid[0] * p.window.grid[1], area_ = p.in.height * p.in.width, taps_ = p.window.taps();
    identity_ = {{1, 1}, {1, 1}, {0, 0}, {1, 1}, {p.window.grid[0], p.window.grid[1]}, false};
    channels_ = std::max<int64_t>(std::min(plan_.span_channels, p.in.channels), 1);
    // Whole images, unless they are too large for it.
    outer_ = plan_.run % L == 0 && (plan_.span_channels % L == 0 || plan_.spans == 1) && taps_ <= kMaxTaps &&
             channels_ * area_ * int64_t(sizeof(T)) <= 4 * kSpanBytes;
    if (outer_) {
      pixels_ = p.in.images;  // whole images
      lanes_ = std::clamp<int64_t>(kSpanBytes / int64_t(sizeof(T)) / (channels_ * area_), 1, 64);
      span_ = (channels_ + L - 1) / L * L * area_;
      grad_ = (plan_.rows + L - 1) / L * L * grid_;
    } else if ((rows_ = rows_of_planes()) > 0) {
      pixels_ = p.in.images * grid_, lanes_ = rows_ * p.window.grid[1];
      span_ = plane_size() / lanes_ + 1, grad_ = plan_.rows;
    } else {
      pixels_ = p.in.images * grid_;
      const int64_t fit = kSpanBytes / int64_t(sizeof(T)) / (channels_ * taps_);
      lanes_ = std::clamp<int64_t>(fit, kMinLanes, kMaxLanes);
      span_ = channels_ * taps_, grad_ = plan_.rows;
    }
    pieces_ = (pixels_ + lanes_ - 1) / lanes_;
    lanes_ = pieces_ ? (pixels_ + pieces_ - 1) / pieces_ : 0;
    if (!outer_) lanes_ = (lanes_ + L - 1) / L * L;
    pieces_ = lanes_ ? (pixels_ + lanes_ - 1) / lanes_ : 0;
    span_ *= lanes_, grad_ *= lanes_;
    ranges_ = pieces_ < kManyPieces || plan_.size * kRanges > kRangeNumbers ? 1 : kRanges;
  }

  void run() {
    if (plan_.overhang || pixels_ == 0) std::fill(p_.values, p_.values + plan_.size, T(0));
    if (pixels_ == 0 && p_.bias) std::fill(p_.bias, p_.bias + plan_.rows, T(0));
    if (pixels_ == 0 || plan_.rows == 0) return;
    const int64_t sums = ranges_ > 1 ? (ranges_ - 1) * numbers() : 0, pairs = outer_ ? taps_ * lanes_ * grid_ : 0;
    const int64_t batch = std::clamp<int64_t>(2 * kSpanBytes / int64_t(sizeof(T)) / span_, 1, plan_.spans);
    const int64_t panels = ranges_ > 1 ? 0 : batch * span_ + grad_, places = outer_ ? 0 : 2 * channels_ * taps_;
    const size_t tables = size_t(pairs) * sizeof(Pair) + size_t(places) * sizeof(uint32_t);
    char* scratch = static_cast<char*>(p_.scratch(0, size_t(sums + panels) * sizeof(T) + tables));
    panel_ = reinterpret_cast<T*>(scratch), partial_ = panel_;
    pairs_ = reinterpret_cast<Pair*>(scratch + (sums + panels) * sizeof(T));
    places_ = reinterpret_cast<uint32_t*>(pairs_);
    outer_ ? find_pairs() : find_places();
    ranges_ > 1 ? each_range() : together(batch);
  }

 private:
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kSpanBytes = 256 << 10, kMinLanes = 64, kManyPieces = 8, kRanges = 8;
  static constexpr int64_t kRangeNumbers = 2 << 20, kStripTask = 8, kSlice = 128, kSumTask = 1 << 14, kMaxTaps = 256;

  // Rows of the grid in a band, if X is to be taken from planes of bands: no copy for each row of taps, only for each
  // column. Bands have to fill their lanes, as G's zeros beyond them would meet whatever X has there. 0 if not.
  int64_t rows_of_planes() const {
    const Window& w = p_.window;
    if (taps_ == 1 || p_.in.channels_last || w.stride[0] > 1 || w.stride[1] > 1) return 0;
    int64_t best = 0;
    for (int64_t rows = 1; rows <= w.grid[0]; rows++) {
      const int64_t lanes = rows * w.grid[1];
      if (w.grid[0] % rows || lanes % L || lanes < kMinLanes || lanes > kMaxLanes) continue;
      if (!best || w.kernel[1] * channels_ * plane(rows) * int64_t(sizeof(T)) <= kSpanBytes) best = rows;
    }
    return w.kernel[1] * channels_ * plane(best) < INT32_MAX ? best : 0;
  }
  // Numbers of the plane of a band of so many rows, and of all planes of a span.
  int64_t plane(int64_t rows) const {
    return (rows + (p_.window.kernel[0] - 1) * p_.window.dilation[0]) * p_.window.grid[1];
  }
  int64_t plane_size() const { return p_.window.kernel[1] * channels_ * plane(rows_); }

  int64_t numbers() const { return plan_.size + plan_.rows; }
  int64_t strip_tasks() const { return (plan_.strips + kStripTask - 1) / kStripTask; }
  int64_t begin_of(int64_t span) const { return span * plan_.span_channels; }
  int64_t end_of(int64_t span) const { return std::min((span + 1) * plan_.span_channels, p_.in.channels); }
  int64_t slices() const { return p_.out.channels_last ? (plan_.rows + kSlice - 1) / kSlice : 1; }
  int64_t count_of(int64_t piece) const { return std::min(lanes_, pixels_ - piece * lanes_); }

  // ---- few pieces: all threads on `batch` spans of one piece at a time ----
  void together(int64_t batch) {
    const int64_t work = plan_.size * (outer_ ? pixels_ * grid_ : pixels_) / pieces_ / plan_.spans;
    for (piece_ = 0; piece_ < pieces_; piece_++)
      for (span0_ = 0; span0_ < plan_.spans; span0_ += batch) {
        batch_ = std::min(batch, plan_.spans - span0_);
        const int64_t packs = batch_ + (span0_ == 0 ? slices() : 0);
        p_.parallel(
            packs, (span_ + grad_) / 2, [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->pack_one(i); },
            this);
        p_.parallel(
            batch_ * strip_tasks(), work / strip_tasks() + 1,
            [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->some_strips(i); }, this);
      }
  }

  T* grad_panel(int64_t batch) const { return panel_ + batch * span_; }

  void pack_one(int64_t i) {
    if (i < batch_) return pack_x(piece_, span0_ + i, panel_ + i * span_);
    pack_grad(piece_, i - batch_, grad_panel_of_batch());
  }

  // G lies behind as many spans as the first batch has, which is the largest.
  T* grad_panel_of_batch() const {
    return grad_panel(std::clamp<int64_t>(2 * kSpanBytes / int64_t(sizeof(T)) / span_, 1, plan_.spans));
  }

  void some_strips(int64_t task) {
    const int64_t tasks = strip_tasks(), nth = task / tasks, begin = task % tasks * kStripTask;
    const T* grad = grad_panel_of_batch();
    strips(span0_ + nth, begin, std::min(begin + kStripTask, plan_.strips), panel_ + nth * span_, grad, piece_,
           piece_ == 0, p_.values);
    if (p_.bias && span0_ + nth == 0) sum_rows(task % tasks, tasks, grad, piece_, piece_ == 0, p_.bias);
  }

  // ---- many pieces: a range of them to each task ----
  void each_range() {
    const int64_t work = plan_.size * (outer_ ? pixels_ * grid_ : pixels_) / ranges_;
    p_.parallel(ranges_, work, [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->one_range(i); }, this);
    p_.parallel((numbers() + kSumTask - 1) / kSumTask, kSumTask * ranges_,
                [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->add_ranges(i); }, this);
  }

  void one_range(int64_t range) {
    T* x = static_cast<T*>(p_.scratch(1, size_t(span_ + grad_) * sizeof(T)));
    T *grad = x + span_, *values = range == 0 ? p_.values : partial_ + (range - 1) * numbers();
    T* bias = range == 0 || !p_.bias ? p_.bias : values + plan_.size;
    if (range > 0 && plan_.overhang) std::fill_n(values, plan_.size, T(0));
    const int64_t begin = range * pieces_ / ranges_, end = (range + 1) * pieces_ / ranges_;
    for (int64_t piece = begin; piece < end; piece++) {
      for (int64_t slice = 0; slice < slices(); slice++) pack_grad(piece, slice, grad);
      for (int64_t span = 0; span < plan_.spans; span++) {
        pack_x(piece, span, x);
        strips(span, 0, plan_.strips, x, grad, piece, piece == begin, values);
      }
      if (bias) sum_rows(0, 1, grad, piece, piece == begin, bias);
    }
  }

  void add_ranges(int64_t task) {
    const int64_t begin = task * kSumTask, end = std::min(begin + kSumTask, numbers());
    for (int64_t range = 1; range < ranges_; range++) {
      const T* from = partial_ + (range - 1) * numbers();
      for (int64_t i = begin; i < std::min(end, plan_.size); i++) p_.values[i] += from[i];
      for (int64_t i = std::max(begin, plan_.size); p_.bias && i < end; i++) p_.bias[i - plan_.size] += from[i];
    }
  }

  // ---- packing ----
  void pack_x(int64_t piece, int64_t span, T* to) const {
    const int64_t first = piece * lanes_, count = count_of(piece);
    if (outer_)
      pack_channels(p_.x + first * area_ * p_.in.channels, p_.in, count, begin_of(span), end_of(span), to);
    else if (rows_)
      fill_planes(piece, begin_of(span), end_of(span), to);
    else
      gather(p_.x, p_.in, p_.window, first, count, lanes_, lanes_, begin_of(span), end_of(span), to);
  }

  void fill_planes(int64_t piece, int64_t begin, int64_t end, T* to) const {
    const int64_t bands = p_.window.grid[0] / rows_, image = piece / bands, top = piece % bands * rows_;
    const auto r = planes_.rows({image, top, top + rows_});
    const T* from = p_.x + image * p_.in.channels * area_ + (r.top + r.first) * p_.in.width;
    for (int64_t j = 0; j < p_.window.kernel[1]; j++)
      for (int64_t c = begin; c < end; c++, to += plane(rows_)) planes_.fill_plane(r, j, from + c * area_, to);
  }

  void pack_grad(int64_t piece, int64_t slice, T* to) const {
    const int64_t first = piece * lanes_, count = count_of(piece), begin = slice * kSlice;
    const int64_t end = p_.out.channels_last ? std::min(begin + kSlice, plan_.rows) : plan_.rows;
    if (outer_)
      pack_channels(p_.grad + first * grid_ * plan_.rows, p_.out, count, begin, end, to + begin * count * grid_);
    else
      gather(p_.grad, p_.out, identity_, first, count, lanes_, lanes_, begin, end, to + begin * lanes_);
  }

  // For each tap, which pixels of X are read by which of G, image by image.
  void find_pairs() {
    const Window& w = p_.window;
    Pair* to = pairs_;
    for (int64_t t = 0; t < taps_; t++) {
      to = pairs_ + t * lanes_ * grid_;
      for (int64_t image = 0; image < lanes_; image++)
        for (int64_t y = 0; y < w.grid[0]; y++) {
          const int64_t v = source(w, 0, y, t / w.kernel[1], p_.in.height);
          for (int64_t x = 0; x < w.grid[1] && v >= 0; x++) {
            const int64_t u = source(w, 1, x, t % w.kernel[1], p_.in.width);
            if (u < 0) continue;
            *to++ = {int32_t((image * area_ + v * p_.in.width + u) * L),
                     int32_t((image * grid_ + y * w.grid[1] + x) * L)};
          }
        }
      per_image_[t] = (to - (pairs_ + t * lanes_ * grid_)) / lanes_;
    }
  }

  // Where in a panel each k of a span lies; of the last span, which may have fewer channels, behind that of the others.
  void find_places() {
    for (int64_t last = 0; last < 2; last++) {
      const int64_t channels = last ? end_of(plan_.spans - 1) - begin_of(plan_.spans - 1) : channels_;
      uint32_t* to = places_ + last * channels_ * taps_;
      for (int64_t tap = 0; tap < taps_; tap++)
        for (int64_t c = 0; c < channels; c++, to++) {
          const int64_t i = tap / p_.window.kernel[1], j = tap % p_.window.kernel[1];
          *to = rows_ ? uint32_t((j * channels + c) * plane(rows_) + i * p_.window.dilation[0] * p_.window.grid[1])
                      : uint32_t((tap * channels + c) * lanes_);
        }
    }
  }
  const uint32_t* places(int64_t span) const { return places_ + (span == plan_.spans - 1 ? channels_ * taps_ : 0); }

  // ---- computing ----
  void strips(int64_t span, int64_t begin, int64_t end, const T* x, const T* grad, int64_t piece, bool first,
              T* values) const {
    const uint32_t* place = outer_ ? nullptr : places(span);
    for (int64_t s = begin; s < end; s++) {
      const int64_t row = plan_.first_row[s], at = plan_.pointer[span * plan_.strips + s];
      const int64_t n = plan_.pointer[span * plan_.strips + s + 1] - at;
      const int32_t* entry = plan_.entries + 2 * at;
      switch (plan_.rows_of[s]) {
        case 4:
          outer_ ? outer<4, 3>(span, row, x, grad, entry, n, piece, first, values)
                 : dot_strip<T, 4, 3>(grad + row * lanes_, x, place, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        case 3:
          outer_ ? outer<3, 4>(span, row, x, grad, entry, n, piece, first, values)
                 : dot_strip<T, 3, 4>(grad + row * lanes_, x, place, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        case 2:
          outer_ ? outer<2, 6>(span, row, x, grad, entry, n, piece, first, values)
                 : dot_strip<T, 2, 6>(grad + row * lanes_, x, place, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        default:
          outer_ ? outer<1, 8>(span, row, x, grad, entry, n, piece, first, values)
                 : dot_strip<T, 1, 8>(grad + row * lanes_, x, place, lanes_, entry, n, plan_.row_stride, first, values);
      }
    }
  }

  // One strip: as many as N vectors of one tap at a time.
  template <int R, int N>
  void outer(int64_t span, int64_t row, const T* x, const T* grad, const int32_t* entry, int64_t n, int64_t piece,
             bool first, T* values) const {
    const int64_t channels = end_of(span) - begin_of(span), images = count_of(piece);
    const T *gs[R], *xs[N];
    T* to[N];
    for (int r = 0; r < R; r++) gs[r] = grad + (row + r) / L * L * images * grid_ + (row + r) % L;
    for (const int32_t* end = entry + 2 * n; entry != end;) {
      const int64_t tap = taps_ == 1 ? 0 : entry[0] / channels;
      const int64_t base = tap * channels, limit = base + channels;
      int m = 0;
      for (; m < N && entry != end && entry[0] < limit; m++, entry += 2 * L)
        xs[m] = x + (entry[0] - base) * images * area_, to[m] = values + entry[1];
      const Pair* pairs = pairs_ + tap * lanes_ * grid_;
      vectors<R, N>(m, gs, xs, pairs, per_image_[tap] * images, first, to);
    }
  }

  template <int R, int N>
  void vectors(int m, const T* const* gs, const T* const* xs, const Pair* pairs, int64_t n, bool first,
               T* const* to) const {
    if (m == N)
      outer_kernel<T, R, N>(gs, xs, pairs, n, first, plan_.row_stride, to);
    else if constexpr (N > 1)
      vectors<R, N - 1>(m, gs, xs, pairs, n, first, to);
  }

  // Part `task` of `tasks` of the rows of G, summed.
  void sum_rows(int64_t task, int64_t tasks, const T* grad, int64_t piece, bool first, T* bias) const {
    const int64_t blocks = (plan_.rows + L - 1) / L, pixels = outer_ ? count_of(piece) * grid_ : lanes_;
    for (int64_t b = task * blocks / tasks; b < (task + 1) * blocks / tasks; b++) {
      const int64_t rows = std::min<int64_t>(L, plan_.rows - b * L);
      alignas(64) T sums[L];
      if (outer_) {
        Vec<T> acc = {};
        for (int64_t p = 0; p < pixels; p++) acc += load(grad + (b * pixels + p) * L);
        store(sums, acc);
      } else {
        Vec<T> acc[L];
        for (int64_t r = 0; r < L; r++) {
          acc[r] = Vec<T>{};
          for (int64_t p = 0; r < rows && p < pixels; p += L) acc[r] += load(grad + (b * L + r) * pixels + p);
        }
        store(sums, sum_lanes<T>(acc));
      }
      for (int64_t r = 0; r < rows; r++) bias[b * L + r] = first ? sums[r] : bias[b * L + r] + sums[r];
    }
  }

  const WeightGrad<T>& p_;
  const Plan& plan_;
  const Planes<T> planes_;
  Window identity_;
  bool outer_;
  int64_t rows_ = 0;                           // of a band of planes; 0: panels
  int64_t grid_, area_, taps_, channels_;      // pixels of an image of G, of X; taps; channels of a span
  int64_t pixels_, lanes_, pieces_, ranges_;   // pixels (outer: images), those of a piece, pieces, ranges
  int64_t span_, grad_;                        // numbers of a panel of X, of G
  int64_t piece_ = 0, span0_ = 0, batch_ = 0;  // where `together` is
  T *panel_ = nullptr, *partial_ = nullptr;
  Pair* pairs_ = nullptr;
  uint32_t* places_ = nullptr;
  int64_t per_image_[kMaxTaps];
};
