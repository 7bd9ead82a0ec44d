// Rows of W times a panel of X: the micro-kernels of forward and dgrad.
//
//                     lanes (1 to 3 vectors of pixels)          STRIP: up to 4 rows share each load of X
//     k  |x x x|                       | acc acc acc |            one entry: 3 loads, 4 broadcasts, 12 FMAs
//        |x x x|  <- panel of X   w -> | acc acc acc |
//        |x x x|                  w -> | acc acc acc |          SELL: 4 rows, each with its own k
//                                 w -> | acc acc acc |            one step: 1 load, 4 shuffles, 12 FMAs with a load
//                                 each
//
// The kernels read a stream: the weights in the order of use, and beside them where in the panel each finds its X. It
// is written once per call from the plan and the values (strided reads of the values would cost more, tile by tile).
// Panels and sums have rows of 3 vectors, however many are used.
//
// Order of summation: each output sums its k in the order of the plan (STRIP: in pieces of 256, SELL: span by span), in
// one accumulator, so it depends neither on threads nor on the batch around it.
// Limits: fewer pixels than one vector leave lanes idle; rows that share nothing load X once per FMA.

// Distance of the rows of a panel, in numbers.
template <class T>
constexpr int64_t kRow = 3 * kLanes<T>;

// Codegen: R * NV FMAs, R + NV loads, no spill.
template <class T, int R, int NV>
SK_INLINE void strip_kernel(const T* x, const uint32_t* offset, const T* w, int64_t n, const T* bias, bool first, T* y,
                            int64_t y_stride) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  for (const uint32_t* end = offset + n; offset != end; offset++, w += 4) {
    const T* xk = reinterpret_cast<const T*>(reinterpret_cast<const char*>(x) + *offset);
    Vec<T> xv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) xv[v] = load_once(xk + v * L);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec<T> wr = splat(w[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] = fma<T>(acc[r][v], wr, xv[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const Vec<T> b = bias ? splat(bias[r]) : Vec<T>{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      T* to = y + r * y_stride + v * L;
      store(to, acc[r][v] + (first ? b : load(to)));
    }
  }
}

// In pieces of kPiece entries, whose sums are added up: rounding errors then grow as those of dense products do.
template <class T, int R, int NV>
SK_INLINE void strip(const T* x, const uint32_t* offset, const T* w, int64_t n, const T* bias, T* y, int64_t y_stride) {
  constexpr int64_t kPiece = 256;
  strip_kernel<T, R, NV>(x, offset, w, std::min(n, kPiece), bias, true, y, y_stride);
  for (int64_t at = kPiece; at < n; at += kPiece)
    strip_kernel<T, R, NV>(x, offset + at, w + 4 * at, std::min(n - at, kPiece), bias, false, y, y_stride);
}

// Strip s, written to y and the rows y_stride after it.
template <class T, int NV>
void one_strip(const Plan& plan, const uint32_t* offsets, const T* weights, const T* bias, const T* x, int64_t s, T* y,
               int64_t y_stride) {
  const int64_t at = plan.pointer[s], n = plan.pointer[s + 1] - at;
  const T *b = bias ? bias + plan.first_row[s] : nullptr, *w = weights + 4 * at;
  switch (plan.rows_of[s]) {
    case 4:
      return strip<T, 4, NV>(x, offsets + at, w, n, b, y, y_stride);
    case 3:
      return strip<T, 3, NV>(x, offsets + at, w, n, b, y, y_stride);
    case 2:
      return strip<T, 2, NV>(x, offsets + at, w, n, b, y, y_stride);
    default:
      return strip<T, 1, NV>(x, offsets + at, w, n, b, y, y_stride);
  }
}

// Where the four rows of a step find their X. 16 bits each (in units of 8 bytes, which an address takes for free) are
// one load for all four, and loads are what binds SELL; panels too long for that take 32 bits.
struct NearStep {
  static constexpr int64_t kUnit = 8;
  uint16_t at[4];
  template <class T>
  SK_INLINE void find(const T* x, const T** xs) const {
    uint64_t all;
    std::memcpy(&all, at, sizeof all);
    const char* base = reinterpret_cast<const char*>(x);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) xs[r] = reinterpret_cast<const T*>(base + kUnit * uint16_t(all >> (16 * r)));
  }
};

struct FarStep {
  static constexpr int64_t kUnit = 1;
  uint32_t at[4];
  template <class T>
  SK_INLINE void find(const T* x, const T** xs) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) xs[r] = reinterpret_cast<const T*>(reinterpret_cast<const char*>(x) + at[r]);
  }
};

template <class T, int NV>
SK_INLINE void sell_row(Vec<T>* acc, Vec<T> w, const T* x) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) acc[v] = fma_from<T>(acc[v], w, x + v * kLanes<T>);
}

// One group: 4 rows, `steps` steps, added to what the spans before have summed up in y.
// Codegen: 4 * NV FMAs, 4 * NV + sizeof(T) / 4 loads, no spill.
template <class T, int NV, class Step>
SK_INLINE void sell_kernel(const T* x, const Step* step, const T* w, int64_t steps, const int32_t* rows, T* y,
                           int64_t y_stride) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[4][NV];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  asm("" : "+r"(x));  // one base, not the sum of two in each address
  for (const Step* end = step + steps; step != end; step++, w += 4) {
    const T* xs[4];
    step->find(x, xs);
    const Four<T> four(w);
    sell_row<T, NV>(acc[0], four.template get<0>(), xs[0]);
    sell_row<T, NV>(acc[1], four.template get<1>(), xs[1]);
    sell_row<T, NV>(acc[2], four.template get<2>(), xs[2]);
    sell_row<T, NV>(acc[3], four.template get<3>(), xs[3]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    T* to = y + rows[r] * y_stride;
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(to + v * L, load(to + v * L) + acc[r][v]);
  }
}

template <class T, int NV, class Step>
void sell_segment(const Plan& plan, const Step* steps, const T* weights, const T* bias, const T* x, int64_t span_step,
                  int64_t segment, T* y, int64_t y_stride) {
  constexpr int L = kLanes<T>;
  const int64_t base = plan.bounds[segment], rows = plan.bounds[segment + 1] - base;
  for (int64_t r = 0; r <= rows; r++) {  // one row more, which takes the padding
    const Vec<T> b = bias && r < rows ? splat(bias[base + r]) : Vec<T>{};
    for (int v = 0; v < NV; v++) store(y + r * y_stride + v * L, b);
  }
  for (int64_t span = 0; span < plan.spans; span++) {
    const int32_t* groups = plan.group_pointer + segment * plan.spans + span;
    for (int64_t g = groups[0]; g < groups[1]; g++) {
      const int64_t at = plan.step_pointer[g];
      sell_kernel<T, NV, Step>(x + span * span_step, steps + at, weights + 4 * at, plan.step_pointer[g + 1] - at,
                               plan.group_rows + 4 * g, y, y_stride);
    }
  }
}

// Four neighbours in each of four rows, transposed: to[4 j + i] = from[i * stride + j], rows of `to` `to_stride` apart.
template <class T>
SK_INLINE void transpose_square(const T* from, int64_t stride, T* to, int64_t to_stride) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  const auto row = [&](int64_t r) -> const Quad& { return *reinterpret_cast<const Quad*>(from + r * stride); };
  const auto out = [&](int64_t r) -> Quad& { return *reinterpret_cast<Quad*>(to + r * to_stride); };
  const auto &a = row(0), &b = row(1), &c = row(2), &d = row(3);
  const Quad ab = shuffle<0, 4, 1, 5>(a, b), AB = shuffle<2, 6, 3, 7>(a, b);
  const Quad cd = shuffle<0, 4, 1, 5>(c, d), CD = shuffle<2, 6, 3, 7>(c, d);
  out(0) = shuffle<0, 1, 4, 5>(ab, cd), out(1) = shuffle<2, 3, 6, 7>(ab, cd);
  out(2) = shuffle<0, 1, 4, 5>(AB, CD), out(3) = shuffle<2, 3, 6, 7>(AB, CD);
}

// The chunks of at most 128 rows that a plan is computed in, each into a panel of its own.
template <class T>
class Chunks {
 public:
  static constexpr int L = kLanes<T>, kMaxRows = Plan::kSegmentRows + 1;  // one row more, for what pads SELL
  struct Rows {
    int64_t first, count;
  };

  // `scratch` points to bytes(plan) of it. Row k of X is the one at place(k) * sizeof(T) bytes (k = plan.ks: zeros);
  // `span_step` is how far a SELL span is from the one before, which its places count from.
  template <class Place>
  Chunks(const Product<T>& p, const Plan& plan, void* scratch, int64_t span_step, Place place)
      : p_(p),
        plan_(plan),
        span_step_(span_step),
        weights_(static_cast<T*>(scratch)),
        offsets_(weights_ + 4 * entries(plan)),
        table_(reinterpret_cast<uint32_t*>(weights_) + table_at(plan)) {
    near_ = true;
    for (int64_t k = 0; k <= plan.ks; k++) {
      table_[k] = uint32_t(place(k) * int64_t(sizeof(T)));
      near_ &= table_[k] % NearStep::kUnit == 0 && table_[k] / NearStep::kUnit <= UINT16_MAX;
    }
  }

  // Of a panel: row k is row k.
  Chunks(const Product<T>& p, const Plan& plan, void* scratch)
      : Chunks(p, plan, scratch, plan.span_width() * kRow<T>, [](int64_t k) { return k * kRow<T>; }) {}

  static int64_t count(const Plan& plan) {
    return plan.kind == Plan::kStrip ? (plan.strips + kChunkStrips - 1) / kChunkStrips : plan.segments;
  }

  // A multiple of what keeps vectors behind it aligned.
  static size_t bytes(const Plan& plan) { return size_t(table_at(plan) + plan.ks + 1) * 4 / 64 * 64 + 64; }

  // Multiply-adds per pixel.
  static int64_t work(const Plan& plan) { return plan.kind == Plan::kStrip ? plan.size : 4 * plan.steps; }

  void fill_stream() {
    const int64_t tasks = plan_.kind == Plan::kStrip ? count(plan_) : plan_.segments * plan_.spans;
    p_.parallel(
        tasks, 4 * entries(plan_) / (tasks + 1),
        [](void* self, int64_t i) { static_cast<Chunks*>(self)->fill_some(i); }, this);
  }

  Rows rows(int64_t chunk) const {
    if (plan_.kind == Plan::kSell) return {plan_.bounds[chunk], plan_.bounds[chunk + 1] - plan_.bounds[chunk]};
    const int64_t first = plan_.first_row[strip_of(chunk)], last = strip_of(chunk + 1) - 1;
    return {first, plan_.first_row[last] + plan_.rows_of[last] - first};
  }

  // STRIP: the rows of one strip times `vectors` of X, from `panel` on, written to y and the rows y_stride after it.
  void compute_strip(const T* panel, int64_t vectors, int64_t s, T* y, int64_t y_stride) const {
    auto* kernel = vectors == 3 ? one_strip<T, 3> : vectors == 2 ? one_strip<T, 2> : one_strip<T, 1>;
    kernel(plan_, static_cast<const uint32_t*>(offsets_), weights_, p_.bias, panel, s, y, y_stride);
  }

  // Rows of one chunk times `vectors` of X, from `panel` on, written to kMaxRows rows of y.
  Rows compute(const T* panel, int64_t vectors, int64_t chunk, T* y, int64_t y_stride) const {
    if (plan_.kind == Plan::kStrip) {
      const int64_t begin = strip_of(chunk), first = plan_.first_row[begin];
      for (int64_t s = begin; s < strip_of(chunk + 1); s++)
        compute_strip(panel, vectors, s, y + (plan_.first_row[s] - first) * y_stride, y_stride);
    } else if (near_) {
      segment<NearStep>(panel, vectors, chunk, y, y_stride);
    } else {
      segment<FarStep>(panel, vectors, chunk, y, y_stride);
    }
    return rows(chunk);
  }

 private:
  static constexpr int64_t kChunkStrips = Plan::kSegmentRows / Plan::kStripRows;

  static int64_t entries(const Plan& plan) { return plan.kind == Plan::kStrip ? plan.entry_count : plan.steps; }

  // In units of 4 bytes: behind the weights and the offsets.
  static int64_t table_at(const Plan& plan) {
    return entries(plan) * int64_t(4 * sizeof(T) + (plan.kind == Plan::kStrip ? 4 : 16)) / 4;
  }

  int64_t strip_of(int64_t chunk) const { return chunk * plan_.strips / count(plan_); }

  template <class Step>
  void segment(const T* panel, int64_t vectors, int64_t chunk, T* y, int64_t y_stride) const {
    auto* kernel = vectors == 3   ? sell_segment<T, 3, Step>
                   : vectors == 2 ? sell_segment<T, 2, Step>
                                  : sell_segment<T, 1, Step>;
    kernel(plan_, static_cast<const Step*>(offsets_), weights_, p_.bias, panel, span_step_, chunk, y, y_stride);
  }

  void fill_some(int64_t task) {
    if (plan_.kind == Plan::kStrip) {
      for (int64_t s = strip_of(task); s < strip_of(task + 1); s++) fill_strip(s);
    } else if (near_) {
      fill_steps<NearStep>(task);
    } else {
      fill_steps<FarStep>(task);
    }
  }

  void fill_strip(int64_t s) {
    const int64_t rows = plan_.rows_of[s], stride = plan_.row_stride, end = plan_.pointer[s + 1];
    uint32_t* offsets = static_cast<uint32_t*>(offsets_);
    int64_t e = plan_.pointer[s];
    for (int64_t i = e; i < end; i++) offsets[i] = table_[plan_.entries[2 * i]];
    const int32_t* index = plan_.entries + 1;
    if (rows == 4 && stride == 1) {
      for (; e < end; e++) std::memcpy(weights_ + 4 * e, p_.values + index[2 * e], 4 * sizeof(T));
    } else if (rows == 4) {
      for (; e + 4 <= end; e += 4) {
        const T* from = p_.values + index[2 * e];
        if (index[2 * e + 6] == index[2 * e] + 3)  // four neighbours in each of four rows: a square to transpose
          transpose_square(from, stride, weights_ + 4 * e, 4);
        else
          for (int64_t i = 0; i < 4; i++) gather_rows(e + i, 4, stride);
      }
    }
    for (; e < end; e++) gather_rows(e, rows, stride);
  }

  SK_INLINE void gather_rows(int64_t e, int64_t rows, int64_t stride) {
    const T* from = p_.values + plan_.entries[2 * e + 1];
    for (int64_t r = 0; r < rows; r++) weights_[4 * e + r] = from[r * stride];
  }

  // The steps of one (segment, span).
  template <class Step>
  void fill_steps(int64_t task) {
    using At = std::remove_reference_t<decltype(Step{}.at[0])>;
    const uint32_t base = uint32_t(task % plan_.spans * span_step_ * int64_t(sizeof(T)));
    const int64_t first = plan_.step_pointer[plan_.group_pointer[task]];
    const int64_t last = plan_.step_pointer[plan_.group_pointer[task + 1]];
    At* at = static_cast<Step*>(offsets_)->at;
    int64_t i = 4 * first;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4 && sizeof(At) == 2) {
      for (; i + 8 <= 4 * last; i += 8) {  // half the time of one by one
        const auto load8 = [&](const int32_t* p) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
        };
        const __m256i bytes = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table_), load8(plan_.step_k), 4);
        const __m256i units = _mm256_srli_epi32(_mm256_sub_epi32(bytes, _mm256_set1_epi32(int(base))), 3);
        const __m128i low = _mm256_castsi256_si128(units), high = _mm256_extracti128_si256(units, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + i), _mm_packus_epi32(low, high));
        const __m256i index = load8(plan_.step_value);
        const __m256 real = _mm256_castsi256_ps(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(-1)));
        const float* from = reinterpret_cast<const float*>(p_.values);
        const __m256 value = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, index, real, 4);
        _mm256_storeu_ps(reinterpret_cast<float*>(weights_) + i, value);
      }
    }
#endif
    for (; i < 4 * last; i++) {
      const int32_t index = plan_.step_value[i], padding = index >> 31;  // all ones for -1
      const T value = p_.values[index & ~padding];                       // a load without a branch
      weights_[i] = padding ? T(0) : value;
      at[i] = At((table_[plan_.step_k[i]] - base) / Step::kUnit);
    }
  }

  const Product<T>& p_;
  const Plan& plan_;
  const int64_t span_step_;
  T* weights_;
  void* offsets_;    // STRIP: uint32_t per entry, SELL: a Step per step
  uint32_t* table_;  // bytes from the first row of X to row k
  bool near_;
};
