// Y[row, pixel] = bias[row] + sum_k W[row, k] * X[k, pixel] from packed panels: bsr_linear, bsr_linear_dgrad, and
// convolutions of small images.
//
// Who computes what: a task is (tile of pixels, chunk of at most 128 rows). With few tiles the tiles are gathered
// first, by all threads; with many, each task gathers its own tile and does all chunks. Order of summation: as in
// panel_product.inl; tasks share nothing.
template <class T>
class ForwardRun {
 public:
  explicit ForwardRun(const Product<T>& p) : p_(p), chunks_(Chunks<T>::count(p.plan)) {
    pixels_ = p.in.images * p.window.grid[0] * p.window.grid[1];
    vectors_ = (pixels_ + L - 1) / L;
    tiles_ = (vectors_ + 2) / 3;
    panel_ = (p.plan.ks + 1) * kRow<T>;
  }

  void run() {
    if (pixels_ == 0 || p_.plan.rows == 0) return;
    const bool gather_first = tiles_ < kManyTiles;
    const int64_t work = Chunks<T>::work(p_.plan) * pixels_;
    const size_t stream = Chunks<T>::bytes(p_.plan), panels = gather_first ? tiles_ * panel_ * sizeof(T) : 0;
    char* scratch = static_cast<char*>(p_.scratch(0, stream + panels));
    panels_ = reinterpret_cast<T*>(scratch + stream);
    const int64_t taps = p_.window.taps(), channels = p_.in.channels;
    const auto place = [&](int64_t k) {
      const bool flip = p_.window.flipped && k < p_.plan.ks;
      return (flip ? (taps - 1 - k / channels) * channels + k % channels : k) * kRow<T>;
    };
    const int64_t step = p_.window.flipped ? 0 : p_.plan.span_width() * kRow<T>;
    Chunks<T> chunks(p_, p_.plan, scratch, step, place);
    chunks.fill_stream();
    product_ = &chunks;
    if (gather_first) {
      p_.parallel(tiles_, panel_, [](void* self, int64_t i) { static_cast<ForwardRun*>(self)->gather_tile(i); }, this);
      p_.parallel(
          tiles_ * chunks_, work / (tiles_ * chunks_),
          [](void* self, int64_t i) { static_cast<ForwardRun*>(self)->one_chunk(i); }, this);
    } else {
      p_.parallel(
          tiles_, panel_ + work / tiles_, [](void* self, int64_t i) { static_cast<ForwardRun*>(self)->one_tile(i); },
          this);
    }
  }

 private:
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kManyTiles = 4;

  // Vectors before tile i: as equal as can be (13 = 2 + 2 + 3 + 3 + 3), the short ones first.
  int64_t vector_of(int64_t tile) const { return tile * vectors_ / tiles_; }

  void fill(int64_t tile, T* panel) {
    const int64_t first = vector_of(tile) * L, lanes = (vector_of(tile + 1) - vector_of(tile)) * L;
    gather(p_.x, p_.in, p_.window, first, std::min(lanes, pixels_ - first), lanes, kRow<T>, 0, p_.in.channels, panel);
    std::fill_n(panel + p_.plan.ks * kRow<T>, lanes, T(0));  // what SELL's padding reads
  }

  void compute(int64_t tile, int64_t chunk, const T* panel) {
    alignas(64) T y[Chunks<T>::kMaxRows * kRow<T>];
    const int64_t first = vector_of(tile) * L, vectors = vector_of(tile + 1) - vector_of(tile);
    const auto rows = product_->compute(panel, vectors, chunk, y, kRow<T>);
    scatter(y, rows.first, rows.count, first, std::min(vectors * L, pixels_ - first), kRow<T>, p_.out, p_.y);
  }

  void gather_tile(int64_t tile) { fill(tile, panels_ + tile * panel_); }

  void one_chunk(int64_t task) { compute(task / chunks_, task % chunks_, panels_ + task / chunks_ * panel_); }

  void one_tile(int64_t tile) {
    T* panel = static_cast<T*>(p_.scratch(1, size_t(panel_) * sizeof(T)));
    fill(tile, panel);
    for (int64_t c = 0; c < chunks_; c++) compute(tile, c, panel);
  }

  const Product<T>& p_;
  const int64_t chunks_;
  int64_t pixels_, vectors_, tiles_, panel_;
  T* panels_ = nullptr;
  const Chunks<T>* product_ = nullptr;
};
