// A frozen network, run tile by tile: up to 3 vectors of samples go through all its steps before the next tile begins,
// so that activations stay in the cache and in the layout the kernels read.
//
//   maps    [row][channel][pixel][L samples], zeros around them stored: a tap is a constant offset, so that any 3
//           output pixels are 3 vectors that read the same offsets from 3 base addresses. One vector at a time.
//   panels  [channel][3 vectors of samples]: the same kernels, the 3 vectors in the place of 3 pixels.
//
//   STRIP: up to 4 rows share each load of X.        SELL: 4 rows, each with its own offsets.
//     one step: 3 loads, 4 broadcasts, 12 FMAs         one step: 1 + 1 loads, 4 shuffles, 12 FMAs with a load each
//
// Order of summation: an output sums its k span by span, in the order of the program, so that neither threads nor the
// batch around it matter. Limits: a batch that is no multiple of the lanes leaves lanes idle.

template <class T>
struct FrozenProduct {
  const int32_t* span_groups;
  const FrozenGroup* groups;
  const void* offsets;
  const T *weights, *bias;
  int64_t spans, y_channel, add_channel;
  bool relu;
};

// Where the vectors of a product tile are: what tap 0 of channel 0 reads, channel 0 of the output, of the residual.
template <class T>
struct FrozenPlace {
  const T* x[3];
  T* y[3];
  const T* add[3];  // [0] null: nothing to add
};

// The sums of R rows, NV vectors each: what they start from, and what becomes of them. All that is read lies in local
// copies, which stores of results cannot change in the compiler's eyes.
template <class T, int R, int NV>
struct FrozenSums {
  Vec<T> acc[R][NV];
  int64_t y[R];

  SK_INLINE void begin(const FrozenProduct<T>& p, const FrozenPlace<T>& at, const int32_t* row, bool first) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) y[r] = row[r] * p.y_channel;
    if (!first) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[r][v] = load(at.y[v] + y[r]);
      return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec<T> b = splat(p.bias[row[r]]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] = b;
    }
    if (!at.add[0]) return;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] += load(at.add[v] + row[r] * p.add_channel);
  }

  SK_INLINE void end(const FrozenPlace<T>& at, bool relu) const {
    const Vec<T> low = splat(relu ? T(0) : -std::numeric_limits<T>::infinity());
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) store(at.y[v] + y[r], low > acc[r][v] ? low : acc[r][v]);  // NaN stays NaN
  }
};

template <class T, int R, int NV>
SK_INLINE void frozen_strip(const FrozenProduct<T>& p, const FrozenPlace<T>& at, const FrozenGroup& g,
                            const int32_t* offset, const T* w, bool first, bool last) {
  constexpr int L = kLanes<T>;
  FrozenSums<T, R, NV> sums;
  sums.begin(p, at, g.row, first);
  auto& acc = sums.acc;
  const T *x0 = at.x[0], *x1 = at.x[NV > 1 ? 1 : 0], *x2 = at.x[NV > 2 ? 2 : 0];
  for (const int32_t* end = offset + g.steps; offset != end; offset++, w += R) {
    const int64_t k = int64_t(*offset) * L;
    Vec<T> x[3];
    x[0] = load_once(x0 + k);
    if constexpr (NV > 1) x[1] = load_once(x1 + k);
    if constexpr (NV > 2) x[2] = load_once(x2 + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec<T> wr = splat(w[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] += wr * x[v];
    }
  }
  sums.end(at, last && p.relu);
}

// The byte offsets of the 4 rows of one step: as few loads as can be, the loop is bound by them.
SK_INLINE void frozen_offsets(const uint16_t* offset, int64_t (&bytes)[4]) {
  constexpr int S = SK_VECTOR_BYTES == 64 ? 6 : SK_VECTOR_BYTES == 32 ? 5 : 4;
  constexpr uint64_t mask = uint64_t(0xFFFF) << S;
  uint64_t four;
  std::memcpy(&four, offset, 8);
  asm("" : "+r"(four));  // or it would be four loads again
  bytes[0] = int64_t(four << S & mask), bytes[1] = int64_t(four >> (16 - S) & mask);
  bytes[2] = int64_t(four >> (32 - S) & mask), bytes[3] = int64_t(four >> (48 - S) & mask);
}
SK_INLINE void frozen_offsets(const int32_t* offset, int64_t (&bytes)[4]) {
  for (int i = 0; i < 4; i++) bytes[i] = int64_t(offset[i]) * SK_VECTOR_BYTES;
}

template <class T, int NV>
SK_INLINE void frozen_fma(Vec<T> (&acc)[NV], Vec<T> w, const T* x0, const T* x1, const T* x2, int64_t bytes) {
  const auto at = [bytes](const T* x) {
    return load(reinterpret_cast<const T*>(reinterpret_cast<const char*>(x) + bytes));
  };
  acc[0] += w * at(x0);
  if constexpr (NV > 1) acc[1] += w * at(x1);
  if constexpr (NV > 2) acc[2] += w * at(x2);
}

template <class T, int R, int NV, class Offset>
SK_INLINE void frozen_sell(const FrozenProduct<T>& p, const FrozenPlace<T>& at, const FrozenGroup& g,
                           const Offset* offset, const T* w, bool first, bool last) {
  FrozenSums<T, R, NV> sums;
  sums.begin(p, at, g.row, first);
  auto& acc = sums.acc;
  const T *x0 = at.x[0], *x1 = at.x[NV > 1 ? 1 : 0], *x2 = at.x[NV > 2 ? 2 : 0];
  for (const T* end = w + R * int64_t(g.steps); w != end; w += R, offset += R) {
    if constexpr (R == 4) {
      const Four<T> four(w);
      int64_t bytes[4];
      frozen_offsets(offset, bytes);
      frozen_fma<T, NV>(acc[0], four.template get<0>(), x0, x1, x2, bytes[0]);
      frozen_fma<T, NV>(acc[1], four.template get<1>(), x0, x1, x2, bytes[1]);
      frozen_fma<T, NV>(acc[2], four.template get<2>(), x0, x1, x2, bytes[2]);
      frozen_fma<T, NV>(acc[3], four.template get<3>(), x0, x1, x2, bytes[3]);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        frozen_fma<T, NV>(acc[r], splat(w[r]), x0, x1, x2, int64_t(offset[r]) * SK_VECTOR_BYTES);
    }
  }
  sums.end(at, last && p.relu);
}

// All rows of W at one place. Offset: int32_t for STRIP; what SELL has.
template <class T, int NV, bool Sell, class Offset>
void frozen_product(const FrozenProduct<T>& product, const FrozenPlace<T>& place) {
  const FrozenProduct<T> p = product;
  const FrozenPlace<T> at = place;
  const Offset* offset = static_cast<const Offset*>(p.offsets);
  const T* w = p.weights;
  for (int64_t s = 0; s < p.spans; s++) {
    const bool first = s == 0, last = s == p.spans - 1;
    for (int64_t i = p.span_groups[s]; i < p.span_groups[s + 1]; i++) {
      const FrozenGroup g = p.groups[i];
#define SK_ROWS(R)                                              \
  case R:                                                       \
    if constexpr (Sell)                                         \
      frozen_sell<T, R, NV>(p, at, g, offset, w, first, last);  \
    else                                                        \
      frozen_strip<T, R, NV>(p, at, g, offset, w, first, last); \
    break;
      switch (g.rows) { SK_ROWS(4) SK_ROWS(3) SK_ROWS(2) SK_ROWS(1) }
#undef SK_ROWS
      offset += Sell ? int64_t(g.rows) * g.steps : int64_t(g.steps);
      w += int64_t(g.rows) * g.steps;
    }
  }
}

// `length` neighbouring numbers of up to L samples, sample i from x + i * stride on, to vectors `pixel` apart.
template <class T>
void frozen_pack(const T* x, int64_t samples, int64_t stride, int64_t length, int64_t pixel, T* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= length; i += L, to += L * pixel) {
    Vec<T> r[L];
    for (int n = 0; n < L; n++) r[n] = n < samples ? load(x + n * stride + i) : Vec<T>{};
    transpose<T>(r);
    for (int n = 0; n < L; n++) store(to + n * pixel, r[n]);
  }
  for (; i < length; i++, to += pixel)
    for (int n = 0; n < L; n++) to[n] = n < samples ? x[n * stride + i] : T(0);
}

template <class T>
void frozen_unpack(const T* from, int64_t pixel, int64_t samples, int64_t stride, int64_t length, T* y) {
  constexpr int L = kLanes<T>, B = 64 / SK_VECTOR_BYTES;  // whole cache lines: samples lie in the same sets
  const int64_t n = std::min<int64_t>(L, samples);
  int64_t i = 0;
  for (; i + B * L <= length; i += B * L, from += B * L * pixel) {
    Vec<T> r[B][L];
    for (int b = 0; b < B; b++) {
      for (int k = 0; k < L; k++) r[b][k] = load(from + (b * L + k) * pixel);
      transpose<T>(r[b]);
    }
    for (int k = 0; k < n; k++)
      for (int b = 0; b < B; b++) store(y + k * stride + i + b * L, r[b][k]);
  }
  for (; i < length; i++, from += pixel)
    for (int k = 0; k < n; k++) y[k * stride + i] = from[k];
}

template <class T>
class FrozenRun {
 public:
  explicit FrozenRun(const Frozen<T>& f) : f_(f) {
    std::memcpy(&head_, f.program, sizeof head_);
    vectors_ = (f.batch + L - 1) / L, tiles_ = (vectors_ + 2) / 3;
  }

  void run() {
    if (f_.batch == 0) return;
    f_.parallel(
        tiles_, int64_t(head_.work) * f_.batch / tiles_,
        [](void* self, int64_t i) { static_cast<const FrozenRun*>(self)->tile(i); }, this);
  }

 private:
  static constexpr int L = kLanes<T>;

  // A part of the batch and its scratch: samples [first, first + count), `vectors` of them.
  struct Tile {
    T* arena;
    int64_t first, count, vectors;
  };

  // Vectors before tile i: as equal as can be.
  int64_t vector_of(int64_t tile) const { return tile * vectors_ / tiles_; }

  FrozenStep step(int64_t i) const {
    FrozenStep s;
    std::memcpy(&s, f_.program + head_.table + i * int64_t(sizeof s / sizeof(int32_t)), sizeof s);
    return s;
  }

  void tile(int64_t i) const {
    const int64_t vector = vector_of(i), vectors = vector_of(i + 1) - vector;
    const int64_t first = vector * L, count = std::min(vectors * L, f_.batch - first);
    T* arena = static_cast<T*>(f_.scratch(1, size_t(head_.arena) * sizeof(T)));
    // Maps: one vector of samples at a time, the others' maps need no room. Views with a group stride keep the three.
    for (int64_t v = 0; v < vectors && head_.wide > 0; v++)
      run_steps({arena, first + v * L, std::min<int64_t>(count - v * L, L), 1}, 0, head_.wide, v);
    run_steps({arena, first, count, vectors}, head_.wide, head_.steps, 0);
  }

  void run_steps(const Tile& t, int64_t begin, int64_t end, int64_t vector) const {
    for (int64_t i = begin; i < end; i++) {
      const FrozenStep s = step(i);
      const T* in = t.arena + s.in.base + vector * s.in.group;
      T* out = t.arena + s.out.base + vector * s.out.group;
      if (s.kind == FrozenStep::kInput || s.kind == FrozenStep::kOutput) {
        for (int64_t v = 0; v < t.vectors; v++) exchange(s, t, v, out + v * s.out.group);
      } else if (s.kind == FrozenStep::kClear) {
        clear(s, out);
      } else if (s.kind == FrozenStep::kPool) {
        for (int64_t y = 0; y < s.height; y++) pool_row(s, y * s.stride[0] - s.padding[0], in, out + y * s.out.row);
      } else if (i >= head_.wide) {
        panel(s, t, in, out);
      } else if (!s.fused) {
        pixels(s, t, vector, 0, s.height, in, out);
      } else {
        const FrozenStep pool = step(++i);
        T* pooled = t.arena + pool.out.base + vector * pool.out.group;
        for (int64_t y = 0; y < pool.height; y++) {
          pixels(s, t, vector, y * pool.stride[0], pool.kernel[0], in, out);
          pool_row(pool, 0, out, pooled + y * pool.out.row);
        }
      }
    }
  }

  // Vector v of the tile, from x or to y.
  void exchange(const FrozenStep& s, const Tile& t, int64_t v, T* at) const {
    const int64_t samples = std::min<int64_t>(t.count - v * L, L), first = t.first + v * L;
    // Channels of one pixel each are side by side in the tensor, as the pixels of a row are.
    const bool flat = s.height * s.width == 1;
    const int64_t length = flat ? s.channels : s.width, apart = flat ? s.out.channel : s.out.pixel;
    for (int64_t c = 0, i = 0; c < (flat ? 1 : s.channels); c++)
      for (int64_t y = 0; y < s.height; y++, i += length) {
        T* row = at + c * s.out.channel + y * s.out.row;
        if (s.kind == FrozenStep::kInput)
          frozen_pack(f_.x + first * head_.inputs + i, samples, head_.inputs, length, apart, row);
        else
          frozen_unpack(row, apart, samples, head_.outputs, length, f_.y + first * head_.outputs + i);
      }
  }

  void clear(const FrozenStep& s, T* out) const {
    const int64_t width = s.border[2] + s.width + s.border[3];
    for (int64_t y = -s.border[0]; y < s.height + s.border[1]; y++)
      for (int64_t c = 0; c < s.channels + s.zeros; c++) {
        T* row = out + y * s.out.row + c * s.out.channel - s.border[2] * s.out.pixel;
        if (c == s.channels || y < 0 || y >= s.height) {
          std::fill_n(row, width * s.out.pixel, T(0));
        } else {
          std::fill_n(row, s.border[2] * s.out.pixel, T(0));
          std::fill_n(row + (s.border[2] + s.width) * s.out.pixel, s.border[3] * s.out.pixel, T(0));
        }
      }
  }

  // One row of a max pool whose windows begin in row y0 of `in`. What lies outside does not count; NaN wins.
  __attribute__((noinline)) static void pool_row(const FrozenStep& s, int64_t y0, const T* in, T* out) {
    const int64_t row = s.dilation[0] * int64_t(s.in.row), pixel = s.dilation[1] * int64_t(s.in.pixel);
    const auto rows = inside(y0, s.dilation[0], s.kernel[0], s.inside[0]);
    const bool small = rows.second == 2 && s.kernel[1] == 2;
    const Vec<T> low = splat(s.relu ? T(0) : -std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < s.channels; c++) {
      const T* from = in + c * int64_t(s.in.channel) + y0 * s.in.row + rows.first * row;
      T* to = out + c * int64_t(s.out.channel);
      for (int64_t x = 0; x < s.width; x++, to += s.out.pixel) {
        const int64_t x0 = x * s.stride[1] - s.padding[1];
        const auto columns = inside(x0, s.dilation[1], s.kernel[1], s.inside[1]);
        const T* at = from + x0 * s.in.pixel + columns.first * pixel;
        const Vec<T> most = small && columns.second == 2 ? largest<2>(at, 2, 2, row, pixel)
                                                         : largest<0>(at, rows.second, columns.second, row, pixel);
        store(to, low > most ? low : most);
      }
    }
  }

  // The first tap and the number of taps of a window from `begin` on that lie in [0, size).
  static std::pair<int64_t, int64_t> inside(int64_t begin, int64_t dilation, int64_t taps, int64_t size) {
    if (begin >= 0 && begin + (taps - 1) * dilation < size) return {0, taps};
    int64_t first = 0, end = taps;
    while (first < taps && begin + first * dilation < 0) first++;
    while (end > first && begin + (end - 1) * dilation >= size) end--;
    return {first, end - first};
  }

  // Over rows x columns taps, N x N of them where the compiler knows it.
  template <int N>
  static SK_INLINE Vec<T> largest(const T* at, int64_t rows, int64_t columns, int64_t row, int64_t pixel) {
    Vec<T> most = splat(-std::numeric_limits<T>::infinity());
    Mask<T> nan = {};
    for (int64_t i = 0; i < (N ? N : rows); i++)
      for (int64_t j = 0; j < (N ? N : columns); j++) {
        const Vec<T> v = load(at + i * row + j * pixel);
        most = v > most ? v : most, nan |= v != v;
      }
    return Vec<T>(Mask<T>(most) | nan);  // all bits set are a NaN
  }

  using Run = void (*)(const FrozenProduct<T>&, const FrozenPlace<T>&);

  template <int NV>
  static Run run_of(const FrozenStep& s) {
    if (!s.sell) return frozen_product<T, NV, false, int32_t>;
    return s.narrow ? frozen_product<T, NV, true, uint16_t> : frozen_product<T, NV, true, int32_t>;
  }
  static Run run_of(const FrozenStep& s, int64_t vectors) {
    return vectors == 3 ? run_of<3>(s) : vectors == 2 ? run_of<2>(s) : run_of<1>(s);
  }

  FrozenProduct<T> product(const FrozenStep& s) const {
    return {f_.program + s.span_groups,
            reinterpret_cast<const FrozenGroup*>(f_.program + s.groups),
            f_.program + s.offsets,
            f_.constants + s.weights,
            f_.constants + s.bias,
            s.spans,
            s.out.channel,
            s.residual.channel,
            s.relu != 0};
  }

  void panel(const FrozenStep& s, const Tile& t, const T* in, T* out) const {
    FrozenPlace<T> at;
    for (int v = 0; v < 3; v++) {
      at.x[v] = in + v * s.in.group, at.y[v] = out + v * s.out.group;
      at.add[v] = s.add ? t.arena + s.residual.base + v * s.residual.group : nullptr;
    }
    run_of(s, t.vectors)(product(s), at);
  }

  // What the next place reads anew, the last tap of all channels, and writes: too scattered for the processor to
  // foresee.
  static void prefetch(const FrozenStep& s, const T* x, T* y) {
    for (int64_t c = 0; c < s.in_channels; c++, x += s.in.channel) __builtin_prefetch(x), __builtin_prefetch(x + 16);
    for (int64_t c = 0; c < s.channels; c++, y += s.out.channel)
      __builtin_prefetch(y, 1), __builtin_prefetch(y + 16, 1);
  }

  // Rows [y0, y0 + rows) of the output, written to the first rows of `out`.
  void pixels(const FrozenStep& s, const Tile& t, int64_t vector, int64_t y0, int64_t rows, const T* in, T* out) const {
    const T* add = s.add ? t.arena + s.residual.base + vector * s.residual.group : nullptr;
    const int64_t all = rows * s.width, vectors = std::min<int64_t>(all, 3);
    const FrozenProduct<T> p = product(s);
    const Run run = run_of(s, vectors);
    FrozenPlace<T> next = {};
    int64_t y = 0, x = 0;  // of the next pixel
    const auto advance = [&](int64_t first) {
      if (first + vectors > all) {  // the last pixels are computed twice where they do not fill a place
        y = (all - vectors) / s.width, x = (all - vectors) % s.width;
      }
      for (int64_t v = 0; v < vectors; v++) {
        next.x[v] = in + (y0 + y) * s.stride[0] * s.in.row + x * s.stride[1] * s.in.pixel;
        next.y[v] = out + y * s.out.row + x * s.out.pixel;
        next.add[v] = add ? add + (y0 + y) * s.residual.row + x * s.residual.pixel : nullptr;
        if (++x == s.width) x = 0, y++;
      }
    };
    advance(0);
    for (int64_t i = 0; i < all; i += vectors) {
      const FrozenPlace<T> at = next;
      advance(i + vectors);
      prefetch(s, next.x[0] + s.last_tap, next.y[0]);
      run(p, at);
    }
  }

  const Frozen<T>& f_;
  FrozenHeader head_;
  int64_t vectors_, tiles_;
};
