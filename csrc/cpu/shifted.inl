// Planes: what a band of rows of the grid reads of X, one plane for each channel and column of taps.
//
//   grid (width 8, kernel 3x3)        planes: for each column of taps j and channel c, the rows of X that a band
//   |. . . . . . . .|                 reads, shifted by the tap and as wide as the grid:
//   |. T T T T T T T| <- a tile         j = 0  |0 x x x x x x x|   j = 1  |x x x x x x x x|   j = 2  |x x x x x x x 0|
//   |T T T T T . . .|                          |0 x x x x x x x|          |x x x x x x x x|          |x x x x x x x 0|
//                                              ...
// Pixels that follow each other in the grid then follow each other in every plane, across rows too, so row k of X for a
// tile is just a place in memory: plane (j, c), the tap's row, the tile's first pixel. X is copied once per column of
// taps; with strides, once per tap.
template <class T>
class Planes {
 public:
  static constexpr int L = kLanes<T>;

  struct Band {
    int64_t image, begin, end;  // rows of the grid
  };
  // Rows of X that a band reads: from `top` on, of which [first, last) exist.
  struct Rows {
    int64_t top, count, first, last;
  };

  Planes(const T* x, const Images& in, const Window& w)
      : x_(x), in_(in), w_(w), width_(w.grid[1]), numbers_(in.images * in.channels * in.height * in.width) {}

  Rows rows(const Band& b) const {
    const int64_t top = b.begin * w_.stride[0] - w_.padding[0];
    const int64_t count = (b.end - b.begin - 1) * w_.stride[0] + (w_.kernel[0] - 1) * w_.dilation[0] + 1;
    const int64_t first = std::clamp<int64_t>(-top, 0, count);
    return {top, count, first, std::clamp<int64_t>(in_.height - top, first, count)};
  }

  // The rows of X, shifted to where tap column j reads: grid column x reads column x + shift.
  SK_INLINE void fill_plane(const Rows& r, int64_t j, const T* from, T* to) const {
    const int64_t shift = j * w_.dilation[1] - w_.padding[1];
    const int64_t low = std::clamp<int64_t>(-shift, 0, width_), high = std::clamp(in_.width - shift, low, width_);
    if (r.first > 0) std::fill_n(to, r.first * width_, T(0));
    if (r.last < r.count) std::fill(to + r.last * width_, to + r.count * width_, T(0));
    const T *first = from + shift, *end = first + (r.last - r.first - 1) * in_.width + width_;
    const bool inside = in_.channels_last || (first >= x_ && end <= x_ + numbers_);
    if (inside && width_ >= L && low <= L && width_ - high <= L) {
      fill_rows(r.last - r.first, low, high, first, to + r.first * width_);
    } else if (width_ == in_.width && high > low && r.last > r.first) {
      // All rows in one piece; what wraps around from row to row is cleared.
      const int64_t begin = r.first * width_ + low, end = (r.last - 1) * width_ + high;
      std::memcpy(to + begin, from + low + shift, size_t(end - begin) * sizeof(T));
      for (int64_t y = r.first; y < r.last; y++) clear_ends(to + y * width_, low, high);
    } else {
      for (int64_t y = r.first; y < r.last; y++) {
        std::copy_n(from + (y - r.first) * in_.width + low + shift, high - low, to + y * width_ + low);
        clear_ends(to + y * width_, low, high);
      }
    }
  }

  // Rows by vectors: each is loaded from where it lies, beyond the ends of the row too, and lanes outside of [low,
  // high) are cleared, of which only the first vector and the last, which may overlap the one before, have any.
  SK_INLINE void fill_rows(int64_t rows, int64_t low, int64_t high, const T* from, T* to) const {
    const int64_t last = width_ - L;
    const auto at_first = mask_between<T>(low, std::min<int64_t>(high, L));
    const auto at_last = mask_between<T>(std::max<int64_t>(low - last, 0), std::max<int64_t>(high - last, 0));
    for (int64_t y = 0; y < rows; y++, from += in_.width, to += width_) {
      store(to, Vec<T>(Mask<T>(load(from)) & at_first));
      for (int64_t x = L; x < last; x += L) store(to + x, load(from + x));
      if (last > 0) store(to + last, Vec<T>(Mask<T>(load(from + last)) & at_last));
    }
  }

  // What one tap reads.
  SK_INLINE void fill_strided(const Band& b, const Rows& r, int64_t tap, const T* from, T* to) const {
    const int64_t step = w_.stride[1], shift = tap % w_.kernel[1] * w_.dilation[1] - w_.padding[1];
    const int64_t low = std::clamp<int64_t>((step - 1 - shift) / step, 0, width_);
    const int64_t high = std::clamp((in_.width - shift + step - 1) / step, low, width_);
    for (int64_t y = 0; y < b.end - b.begin; y++, to += width_) {
      const int64_t row = y * w_.stride[0] + tap / w_.kernel[1] * w_.dilation[0];  // of the band's
      if (row < r.first || row >= r.last) {
        std::fill_n(to, width_, T(0));
        continue;
      }
      const T* line = from + (row - r.first) * in_.width + shift;
      for (int64_t x = low; x < high; x++) to[x] = line[x * step];
      clear_ends(to, low, high);
    }
  }

 private:
  SK_INLINE void clear_ends(T* row, int64_t low, int64_t high) const {
    for (int64_t x = 0; x < low; x++) row[x] = T(0);
    for (int64_t x = high; x < width_; x++) row[x] = T(0);
  }

  const T* x_;
  const Images& in_;
  const Window& w_;
  int64_t width_, numbers_;
};
