// Y[row, pixel] = bias[row] + sum_k W[row, k] * X[k, pixel] for convolutions: as panel_product.inl, from the planes
// (shifted.inl) that all tiles of a band of rows share.
//
// Who computes what: a task is a band of rows of an image; with few, tiles are shared out within a band. Order of
// summation: as in panel_product.inl.
template <class T>
class PlaneRun {
 public:
  // Small images leave lanes idle here; panels mix images.
  static bool fits(const Product<T>& p) {
    const Window& w = p.window;
    const int64_t area = w.grid[0] * w.grid[1];
    return p.plan.kind != Plan::kNone && area >= kMinArea;
  }

  explicit PlaneRun(const Product<T>& p)
      : p_(p), w_(p.window), planes_of_(p.x, p.in, p.window), chunks_(Chunks<T>::count(p.plan)) {
    width_ = w_.grid[1], strided_ = w_.stride[0] > 1 || w_.stride[1] > 1;
    copies_ = strided_ ? w_.taps() : w_.kernel[1];
    const int64_t reach = (w_.kernel[0] - 1) * w_.dilation[0], halo = strided_ ? 0 : reach;
    const int64_t row = copies_ * p.in.channels * width_ * int64_t(sizeof(T));  // bytes of all planes per row
    const int64_t most = std::clamp<int64_t>(kPlaneBytes / row - halo, std::min<int64_t>(w_.grid[0], 2), w_.grid[0]);
    bands_ = (w_.grid[0] + most - 1) / most;
    const int64_t rows = (w_.grid[0] + bands_ - 1) / bands_;  // bands differ by one row at most
    // An odd number of cache lines, so that neighbouring planes do not fall onto the same places of the cache.
    constexpr int64_t kLine = 64 / sizeof(T);
    plane_ = (((rows + halo) * width_ + kLine - 1) / kLine | 1) * kLine;
    plain_ = p.in.channels_last ? ((rows - 1) * w_.stride[0] + reach + 1) * p.in.width : 0;
    size_ = (1 + copies_ * p.in.channels) * plane_ + 3 * L;  // a plane of zeros first; tiles may read past the last
  }

  void run() {
    if (p_.in.images == 0 || p_.plan.rows == 0) return;
    const int64_t tasks = p_.in.images * bands_, stream = Chunks<T>::bytes(p_.plan);
    together_ = tasks < kManyBands;
    const int64_t shared = together_ ? size_ + plain_ * p_.in.channels : 0;
    char* scratch = static_cast<char*>(p_.scratch(0, size_t(stream) + size_t(shared) * sizeof(T)));
    Chunks<T> chunks(p_, p_.plan, scratch, 0, [&](int64_t k) { return place(k); });
    chunks.fill_stream();
    product_ = &chunks;
    const int64_t work = Chunks<T>::work(p_.plan) * w_.grid[0] * width_ / bands_;
    if (!together_) {
      p_.parallel(tasks, work, [](void* self, int64_t i) { static_cast<PlaneRun*>(self)->one_band(i); }, this);
      return;
    }
    planes_ = reinterpret_cast<T*>(scratch + stream);
    for (band_ = 0; band_ < tasks; band_++) {
      if (plain_) transpose_band(band_, planes_ + size_);
      p_.parallel(
          copies_ * kSlices, size_ / (copies_ * kSlices),
          [](void* self, int64_t i) {
            PlaneRun* run = static_cast<PlaneRun*>(self);
            run->fill(run->band_, i / kSlices, i % kSlices, run->planes_ + run->size_, run->planes_);
          },
          this);
      const int64_t parts = tiles(band_) * chunks_;
      p_.parallel(
          parts, work / parts,
          [](void* self, int64_t i) {
            PlaneRun* run = static_cast<PlaneRun*>(self);
            run->compute(run->band_, i / run->chunks_, i % run->chunks_, run->planes_);
          },
          this);
    }
  }

 private:
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kMinArea = 64, kManyBands = 4, kPlaneBytes = 256 << 10, kSlices = 4;

  // Where row k of X begins, for the first pixel of a band.
  int64_t place(int64_t k) const {
    if (k == p_.plan.ks) return 0;
    int64_t tap = k / p_.in.channels;
    if (w_.flipped) tap = w_.taps() - 1 - tap;
    const int64_t i = tap / w_.kernel[1], copy = strided_ ? tap : tap % w_.kernel[1];
    const int64_t row = strided_ ? 0 : i * w_.dilation[0] * width_;
    return (1 + copy * p_.in.channels + k % p_.in.channels) * plane_ + row;
  }

  using Band = typename Planes<T>::Band;
  using Rows = typename Planes<T>::Rows;
  Band band(int64_t task) const {
    const int64_t image = task / bands_, b = task % bands_;
    return {image, b * w_.grid[0] / bands_, (b + 1) * w_.grid[0] / bands_};
  }

  int64_t vectors(int64_t task) const {
    const Band b = band(task);
    return ((b.end - b.begin) * width_ + L - 1) / L;
  }
  int64_t tiles(int64_t task) const { return (vectors(task) + 2) / 3; }

  // Where channels are neighbours: the rows of a band as [channel][row][column], by squares transposed.
  void transpose_band(int64_t task, T* to) const {
    const Band b = band(task);
    const Rows r = planes_of_.rows(b);
    const int64_t channels = p_.in.channels, n = (r.last - r.first) * p_.in.width;
    const T* from = p_.x + (b.image * p_.in.height + r.top + r.first) * p_.in.width * channels;
    const T* lane[L];
    int64_t at = 0;
    for (; at + L <= n; at += L) {
      for (int64_t i = 0; i < L; i++) lane[i] = from + (at + i) * channels;
      pack_lanes(lane, channels, L, plain_, to + at);
    }
    for (int64_t c = 0; c < channels; c++)
      for (int64_t i = at; i < n; i++) to[c * plain_ + i] = from[i * channels + c];
  }

  // One of kSlices parts of the planes of a copy; with the first, the plane of zeros. `plain`: from transpose_band.
  void fill(int64_t task, int64_t copy, int64_t slice, const T* plain, T* planes) const {
    const Band b = band(task);
    const Rows r = planes_of_.rows(b);
    if (copy == 0 && slice == 0) std::fill_n(planes, plane_, T(0));
    const int64_t begin = slice * p_.in.channels / kSlices, end = (slice + 1) * p_.in.channels / kSlices;
    const int64_t plane = p_.in.channels_last ? plain_ : p_.in.height * p_.in.width;
    const T* from = plain;  // the first existing row
    if (!p_.in.channels_last) from = p_.x + b.image * p_.in.channels * plane + (r.first + r.top) * p_.in.width;
    from += begin * plane;
    T* to = planes + (1 + copy * p_.in.channels + begin) * plane_;
    for (int64_t c = begin; c < end; c++, from += plane, to += plane_)
      strided_ ? planes_of_.fill_strided(b, r, copy, from, to) : planes_of_.fill_plane(r, copy, from, to);
  }

  // Where the vectors of a tile begin, how many they are, and where its first pixel is in the grid of all images.
  struct Tile {
    int64_t begin, vectors, first, pixels;
  };
  Tile tile(int64_t task, int64_t i) const {
    const Band b = band(task);
    const int64_t all = vectors(task), count = tiles(task), begin = i * all / count, n = (i + 1) * all / count - begin;
    const int64_t first = (b.image * w_.grid[0] + b.begin) * width_ + begin * L;
    return {begin, n, first, std::min(n * L, (b.end - b.begin) * width_ - begin * L)};
  }

  void compute(int64_t task, int64_t i, int64_t chunk, const T* planes) const {
    alignas(64) T y[Chunks<T>::kMaxRows * kRow<T>];
    const Tile t = tile(task, i);
    const auto rows = product_->compute(planes + t.begin * L, t.vectors, chunk, y, kRow<T>);
    scatter(y, rows.first, rows.count, t.first, t.pixels, kRow<T>, p_.out, p_.y);
  }

  void one_band(int64_t task) {
    const bool direct = p_.plan.kind == Plan::kStrip && !p_.out.channels_last;
    // Rows of Y for the whole band, in an odd number of cache lines as the planes: whole rows are written in the end.
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t row = direct ? 0 : (vectors(task) * L / kLine | 1) * kLine + kLine, plain = plain_ * p_.in.channels;
    T* planes = static_cast<T*>(p_.scratch(1, size_t(size_ + plain + Chunks<T>::kMaxRows * row + kLine) * sizeof(T)));
    if (plain_) transpose_band(task, planes + size_);
    for (int64_t i = 0; i < copies_ * kSlices; i++) fill(task, i / kSlices, i % kSlices, planes + size_, planes);
    if (direct) return strips(task, planes);
    T* y = planes + (size_ + plain + kLine - 1) / kLine * kLine;
    for (int64_t c = 0; c < chunks_; c++) {
      for (int64_t i = 0; i < tiles(task); i++) {
        const Tile t = tile(task, i);
        product_->compute(planes + t.begin * L, t.vectors, c, y + t.begin * L, row);
      }
      const Band b = band(task);
      const auto rows = product_->rows(c);
      scatter(y, rows.first, rows.count, (b.image * w_.grid[0] + b.begin) * width_, (b.end - b.begin) * width_, row,
              p_.out, p_.y);
    }
  }

  // Strip by strip along the band, straight into the planes of Y.
  void strips(int64_t task, const T* planes) const {
    const int64_t area = w_.grid[0] * width_, count = tiles(task);
    for (int64_t s = 0; s < p_.plan.strips; s++) {
      const int64_t row = p_.plan.first_row[s];
      for (int64_t i = 0; i < count; i++) {
        const Tile t = tile(task, i);
        T* y = p_.y + (t.first / area * p_.out.channels + row) * area + t.first % area;
        if (t.pixels == t.vectors * L) {
          product_->compute_strip(planes + t.begin * L, t.vectors, s, y, area);
          continue;
        }
        alignas(64) T part[Plan::kStripRows * kRow<T>];
        product_->compute_strip(planes + t.begin * L, t.vectors, s, part, kRow<T>);
        for (int64_t r = 0; r < p_.plan.rows_of[s]; r++) std::copy_n(part + r * kRow<T>, t.pixels, y + r * area);
      }
    }
  }

  const Product<T>& p_;
  const Window& w_;
  const Planes<T> planes_of_;
  const int64_t chunks_;
  bool strided_;
  int64_t bands_, copies_;                // bands of an image, planes of a channel
  int64_t width_, plane_, plain_, size_;  // numbers
  bool together_ = false;
  int64_t band_ = 0;
  T* planes_ = nullptr;
  const Chunks<T>* product_ = nullptr;
};
