// dX[c, point] = sum over (tap, pixel) that read the point of sum_o W[o, tap, c] * dY[o, pixel]: bsr_conv2d_dgrad where
// many taps of points have no pixel (strides, no padding); elsewhere it is a forward product with flipped taps.
//
// The product W^T dY has a row for every (tap, channel). It is computed tile by tile, and each row of a tile is added
// to the points its tap reads: no zeros are multiplied, whatever the stride, and nothing of the size of im2col is
// stored.
//
// Who computes what: a task is a range of images, whose dX it alone writes.
// Order of summation: over o as in panel_product.inl; a point adds up its taps in the order of tiles, then rows. The
// ranges begin where images begin, and tiles where ranges begin, both by shape alone. Limits: one image is one task, so
// a batch of one runs on one thread.
template <class T>
class ConvDgradRun {
 public:
  explicit ConvDgradRun(const Product<T>& p) : p_(p), plan_(p.plan) {
    if (p.plan.second) Plan::read(p.plan.second, p.plan.second_length, plan_);
    chunks_ = Chunks<T>::count(plan_);
    area_ = p.window.grid[0] * p.window.grid[1];
    tasks_ = std::min(p.out.images, kTasks);
    panel_ = (plan_.ks + 1) * kRow<T>;
  }

  void run() {
    if (tasks_ == 0 || p_.out.channels == 0) return;
    Chunks<T> chunks(p_, plan_, p_.scratch(0, Chunks<T>::bytes(plan_)));
    chunks.fill_stream();
    product_ = &chunks;
    const int64_t work = (Chunks<T>::work(plan_) + plan_.rows) * area_ * p_.out.images / tasks_;
    p_.parallel(tasks_, work, [](void* self, int64_t i) { static_cast<ConvDgradRun*>(self)->some_images(i); }, this);
  }

 private:
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kTasks = 16;

  void some_images(int64_t task) {
    T* panel = static_cast<T*>(p_.scratch(1, size_t(panel_) * sizeof(T)));
    alignas(64) T y[Chunks<T>::kMaxRows * kRow<T> + kSlack];
    const int64_t begin = task * p_.out.images / tasks_, end = (task + 1) * p_.out.images / tasks_;
    const int64_t size = p_.out.channels * p_.out.height * p_.out.width;
    std::fill(p_.y + begin * size, p_.y + end * size, T(0));
    for (int64_t pixel = begin * area_; pixel < end * area_; pixel += 3 * L) {
      const int64_t count = std::min<int64_t>(3 * L, end * area_ - pixel), vectors = (count + L - 1) / L;
      const Window grid = {{1, 1}, {1, 1}, {0, 0}, {1, 1}, {p_.window.grid[0], p_.window.grid[1]}, false};
      gather(p_.x, p_.in, grid, pixel, count, vectors * L, kRow<T>, 0, p_.in.channels, panel);
      std::fill_n(panel + plan_.ks * kRow<T>, vectors * L, T(0));  // what SELL's padding reads
      for (int64_t c = 0; c < chunks_; c++) {
        const auto rows = product_->compute(panel, vectors, c, y, kRow<T>);
        scatter_add(y, rows.first, rows.count, pixel, count, kRow<T>, p_.out, p_.window, p_.y, p_.y + end * size);
      }
    }
  }

  const Product<T>& p_;
  Plan plan_;
  int64_t chunks_, area_, tasks_, panel_;
  const Chunks<T>* product_ = nullptr;
};
