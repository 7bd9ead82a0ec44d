// dW[weight] = sum_pixel G[row, pixel] * X[k, pixel], and with it db[row] = sum_pixel G[row, pixel]: the micro-kernel
// of wgrad, and its driver.
//
//      row of G  |g g g g g ...|      a tile of R rows times N entries of one strip: R + N loads, R * N FMAs per vector
//      row k of X  |x x x x ...|      of pixels; at the end the lanes of each accumulator are summed
//
// Who computes what: pixels are cut into pieces that fit the second-level cache (by shape alone). With one piece, all
// threads gather it and then share its strips; with more, a task is a range of pieces with sums of its own.
// Order of summation: lane by lane over the pixels of a piece, then over lanes, pieces and ranges, in that order;
// ranges are a number fixed by shape, so threads do not matter. Limits: a strip of one row (blocks one row high) loads
// X once per FMA.

// Adds (or, at the first piece, writes) the sums of R rows times n <= N entries.
template <class T, int R, int N>
SK_INLINE void dot_kernel(const T* grad, const T* x, int64_t lanes, const int32_t* entry, int n, int64_t row_stride,
                          bool first, T* values) {
  constexpr int L = kLanes<T>, kSums = (R * N + L - 1) / L * L;
  const T* xs[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) xs[j] = x + int64_t(entry[2 * (j < n ? j : n - 1)]) * lanes;
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
        for (int j = 0; j < N; j++) acc[j * R + r] += g * xv[j];
      }
    } else {
      Vec<T> g[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) g[r] = load_once(grad + r * lanes + p);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        const Vec<T> xv = R > 1 ? load_once(xs[j] + p) : load(xs[j] + p);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[j * R + r] += g[r] * xv;
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
void dot_strip(const T* grad, const T* x, int64_t lanes, const int32_t* entry, int64_t n, int64_t row_stride,
               bool first, T* values) {
  for (; n > 0; n -= N, entry += 2 * N)
    dot_kernel<T, R, N>(grad, x, lanes, entry, n < N ? int(n) : N, row_stride, first, values);
}

template <class T>
SK_INLINE T sum_row(const T* row, int64_t lanes) {
  Vec<T> acc = {};
  for (int64_t p = 0; p < lanes; p += kLanes<T>) acc += load(row + p);
  T sum = 0;
  for (int i = 0; i < kLanes<T>; i++) sum += acc[i];
  return sum;
}

template <class T>
class WeightGradRun {
 public:
  explicit WeightGradRun(const WeightGrad<T>& p) : p_(p), plan_(p.plan) {
    pixels_ = p.in.images * p.window.grid[0] * p.window.grid[1];
    const int64_t fit = kPieceBytes / int64_t(sizeof(T)) / (plan_.ks + 1);
    const int64_t piece = std::clamp(fit / L * L, int64_t(64), kMaxLanes);
    pieces_ = (pixels_ + piece - 1) / piece;
    lanes_ = pieces_ ? ((pixels_ + pieces_ - 1) / pieces_ + L - 1) / L * L : 0;
    pieces_ = lanes_ ? (pixels_ + lanes_ - 1) / lanes_ : 0;
    ranges_ = std::min(pieces_, kRanges);
    if (plan_.size * ranges_ > kRangeNumbers) ranges_ = 1;
    identity_ = {{1, 1}, {1, 1}, {0, 0}, {1, 1}, {p.window.grid[0], p.window.grid[1]}};
    grad_at_ = plan_.ks * lanes_;
    panel_ = grad_at_ + plan_.rows * lanes_;
    x_slices_ = slices(p.in), grad_slices_ = slices(p.out);
  }

  void run() {
    if (plan_.overhang || pixels_ == 0) std::fill(p_.values, p_.values + plan_.size, T(0));
    if (pixels_ == 0 && p_.bias) std::fill(p_.bias, p_.bias + plan_.rows, T(0));
    if (pixels_ == 0 || plan_.rows == 0) return;
    const int64_t work = plan_.size * pixels_;
    if (ranges_ > 1) {
      partial_ = static_cast<T*>(p_.scratch(0, size_t((ranges_ - 1) * (plan_.size + plan_.rows)) * sizeof(T)));
      p_.parallel(
          ranges_, work / ranges_, [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->one_range(i); },
          this);
      p_.parallel((plan_.strips + kStripTask - 1) / kStripTask, ranges_ * plan_.size / (plan_.strips / kStripTask + 1),
                  [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->add_ranges(i); }, this);
      return;
    }
    panels_ = static_cast<T*>(p_.scratch(0, size_t(panel_) * sizeof(T)));
    const int64_t tasks = (plan_.strips + kStripTask - 1) / kStripTask;
    for (piece_ = 0; piece_ < pieces_; piece_++) {
      p_.parallel(
          x_slices_ + grad_slices_, panel_ / (x_slices_ + grad_slices_),
          [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->gather_slice(i); }, this);
      p_.parallel(
          tasks, work / pieces_ / (tasks + 1) + 1,
          [](void* self, int64_t i) { static_cast<WeightGradRun*>(self)->some_strips(i); }, this);
    }
  }

 private:
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kPieceBytes = 384 << 10, kRanges = 8, kRangeNumbers = 4 << 20, kStripTask = 8, kSlice = 128;

  static int64_t slices(const Images& im) { return im.channels_last ? (im.channels + kSlice - 1) / kSlice : 1; }

  // X's panel and behind it G's; `slice` is one of x_slices_ + grad_slices_ parts that threads fill side by side.
  void fill(int64_t piece, int64_t slice, T* panel) {
    if (slice < x_slices_)
      fill_slice(p_.x, p_.in, p_.window, piece, slice, panel);
    else
      fill_slice(p_.grad, p_.out, identity_, piece, slice - x_slices_, panel + grad_at_);
  }

  void fill_slice(const T* from, const Images& im, const Window& window, int64_t piece, int64_t slice, T* panel) {
    const int64_t first = piece * lanes_, count = std::min(lanes_, pixels_ - first);
    if (im.channels_last)
      gather_channels_last(from, im, window, first, count, lanes_, lanes_, slice * kSlice,
                           std::min((slice + 1) * kSlice, im.channels), panel);
    else
      gather(from, im, window, first, count, lanes_, lanes_, panel);
  }

  void gather_slice(int64_t slice) { fill(piece_, slice, panels_); }

  void some_strips(int64_t task) {
    const int64_t begin = task * kStripTask, end = std::min(begin + kStripTask, plan_.strips);
    strips(begin, end, panels_, piece_ == 0, p_.values, p_.bias);
  }

  void one_range(int64_t range) {
    T* panel = static_cast<T*>(p_.scratch(1, size_t(panel_) * sizeof(T)));
    T* values = range == 0 ? p_.values : partial(range);
    T* bias = range == 0 || !p_.bias ? p_.bias : values + plan_.size;
    const int64_t begin = range * pieces_ / ranges_, end = (range + 1) * pieces_ / ranges_;
    for (int64_t piece = begin; piece < end; piece++) {
      for (int64_t slice = 0; slice < x_slices_ + grad_slices_; slice++) fill(piece, slice, panel);
      strips(0, plan_.strips, panel, piece == begin, values, bias);
    }
  }

  // The sums of range 1 and on: of all values, and behind them of all rows for the bias.
  T* partial(int64_t range) const { return partial_ + (range - 1) * (plan_.size + plan_.rows); }

  void add_ranges(int64_t task) {
    const int64_t begin = task * kStripTask, end = std::min(begin + kStripTask, plan_.strips);
    for (int64_t s = begin; s < end; s++) {
      const int64_t row = plan_.first_row[s], rows = plan_.rows_of[s];
      for (int64_t i = 1; i < ranges_; i++) {
        const T* from = partial(i);
        for (int64_t e = plan_.pointer[s]; e < plan_.pointer[s + 1]; e++)
          for (int64_t r = 0; r < rows; r++) {
            const int64_t at = plan_.entries[2 * e + 1] + r * plan_.row_stride;
            p_.values[at] += from[at];
          }
        for (int64_t r = row; p_.bias && r < row + rows; r++) p_.bias[r] += from[plan_.size + r];
      }
    }
  }

  void strips(int64_t begin, int64_t end, const T* panel, bool first, T* values, T* bias) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t row = plan_.first_row[s];
      const T* grad = panel + grad_at_ + row * lanes_;
      for (int64_t r = 0; bias && r < plan_.rows_of[s]; r++) {
        const T sum = sum_row(grad + r * lanes_, lanes_);
        bias[row + r] = first ? sum : bias[row + r] + sum;
      }
      const int32_t* entry = plan_.entries + 2 * int64_t(plan_.pointer[s]);
      const int64_t n = plan_.pointer[s + 1] - plan_.pointer[s];
      switch (plan_.rows_of[s]) {
        case 4:
          dot_strip<T, 4, 3>(grad, panel, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        case 3:
          dot_strip<T, 3, 4>(grad, panel, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        case 2:
          dot_strip<T, 2, 6>(grad, panel, lanes_, entry, n, plan_.row_stride, first, values);
          break;
        default:
          dot_strip<T, 1, 8>(grad, panel, lanes_, entry, n, plan_.row_stride, first, values);
      }
    }
  }

  const WeightGrad<T>& p_;
  const Plan& plan_;
  Window identity_;
  int64_t pixels_, pieces_, lanes_, ranges_, grad_at_, panel_, x_slices_, grad_slices_, piece_ = 0;
  T *partial_ = nullptr, *panels_ = nullptr;
};
