// Rows of W times a panel of X: the micro-kernels of forward and dgrad.
//
//                     lanes (1 to 3 vectors of pixels)          STRIP: up to 4 rows share each load of X
//     k  |x x x|                       | acc acc acc |            one entry: 3 loads, 4 broadcasts, 12 FMAs
//        |x x x|  <- panel of X   w -> | acc acc acc |
//        |x x x|                  w -> | acc acc acc |          SELL: 4 rows, each with its own k
//                                 w -> | acc acc acc |            one step: 1 load, 4 shuffles, 12 FMAs with a load
//                                 each
//
// Order of summation: each output sums its k in the order of the plan (SELL: span by span), in one accumulator, so it
// depends neither on threads nor on the batch around it.
// Limits: STRIP reads values in their own order, dgrad thus with a stride; SELL copies them to the order of its steps
// first. Fewer pixels than one vector leave lanes idle.

template <class T, int R, int NV>
SK_INLINE void strip_kernel(const T* x, const int32_t* entry, int64_t n, const T* values, int64_t row_stride,
                            const T* bias, bool first, T* y) {
  constexpr int L = kLanes<T>, P = NV * L;
  Vec<T> acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  for (const int32_t* end = entry + 2 * n; entry != end; entry += 2) {
    const T* xk = x + int64_t(entry[0]) * P;
    const T* w = values + entry[1];
    Vec<T> xv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) xv[v] = load_once(xk + v * L);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec<T> wr = splat(w[r * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] += wr * xv[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const Vec<T> b = bias ? splat(bias[r]) : Vec<T>{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(y + r * P + v * L, acc[r][v] + (first ? b : load(y + r * P + v * L)));
  }
}

// In pieces of kPiece entries, whose sums are added up: rounding errors then grow as those of dense products do.
template <class T, int R, int NV>
SK_INLINE void strip(const T* x, const int32_t* entry, int64_t n, const T* values, int64_t row_stride, const T* bias,
                     T* y) {
  constexpr int64_t kPiece = 256;
  strip_kernel<T, R, NV>(x, entry, std::min(n, kPiece), values, row_stride, bias, true, y);
  for (int64_t at = kPiece; at < n; at += kPiece)
    strip_kernel<T, R, NV>(x, entry + 2 * at, std::min(n - at, kPiece), values, row_stride, bias, false, y);
}

template <class T, int NV>
void strip_chunk(const Plan& plan, const T* values, const T* bias, const T* x, int64_t begin, int64_t end, T* y) {
  constexpr int P = NV * kLanes<T>;
  const int64_t base = plan.first_row[begin];
  for (int64_t s = begin; s < end; s++) {
    const int32_t row = plan.first_row[s], *entry = plan.entries + 2 * int64_t(plan.pointer[s]);
    const int64_t n = plan.pointer[s + 1] - plan.pointer[s];
    const T* b = bias ? bias + row : nullptr;
    T* to = y + (row - base) * P;
    switch (plan.rows_of[s]) {
      case 4:
        strip<T, 4, NV>(x, entry, n, values, plan.row_stride, b, to);
        break;
      case 3:
        strip<T, 3, NV>(x, entry, n, values, plan.row_stride, b, to);
        break;
      case 2:
        strip<T, 2, NV>(x, entry, n, values, plan.row_stride, b, to);
        break;
      default:
        strip<T, 1, NV>(x, entry, n, values, plan.row_stride, b, to);
    }
  }
}

template <class T, int NV>
SK_INLINE void sell_row(Vec<T>* acc, Vec<T> w, const T* x) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) acc[v] += w * load(x + v * kLanes<T>);
}

// One group: 4 rows, `steps` steps, added to what the spans before have summed up in y.
template <class T, int NV>
SK_INLINE void sell_kernel(const T* x, const int32_t* k, const T* w, int64_t steps, const int32_t* rows, T* y) {
  constexpr int L = kLanes<T>, P = NV * L;
  Vec<T> acc[4][NV];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  for (const T* end = w + 4 * steps; w != end; w += 4, k += 4) {
    const Four<T> four(w);
    sell_row<T, NV>(acc[0], four.template get<0>(), x + int64_t(k[0]) * P);
    sell_row<T, NV>(acc[1], four.template get<1>(), x + int64_t(k[1]) * P);
    sell_row<T, NV>(acc[2], four.template get<2>(), x + int64_t(k[2]) * P);
    sell_row<T, NV>(acc[3], four.template get<3>(), x + int64_t(k[3]) * P);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      T* to = y + rows[r] * P + v * L;
      store(to, load(to) + acc[r][v]);
    }
}

template <class T, int NV>
void sell_segment(const Plan& plan, const T* stream, const T* bias, const T* x, int64_t segment, T* y) {
  constexpr int L = kLanes<T>, P = NV * L;
  const int64_t base = plan.bounds[segment], rows = plan.bounds[segment + 1] - base;
  for (int64_t r = 0; r <= rows; r++) {  // one row more, which takes the padding
    const Vec<T> b = bias && r < rows ? splat(bias[base + r]) : Vec<T>{};
    for (int v = 0; v < NV; v++) store(y + r * P + v * L, b);
  }
  const int32_t* groups = plan.group_pointer + segment * plan.spans;
  for (int64_t g = groups[0]; g < groups[plan.spans]; g++) {
    const int64_t step = plan.step_pointer[g];
    sell_kernel<T, NV>(x, plan.step_k + 4 * step, stream + 4 * step, plan.step_pointer[g + 1] - step,
                       plan.group_rows + 4 * g, y);
  }
}

// The chunks of at most 128 rows that a plan is computed in, each into a panel of its own.
template <class T>
class Chunks {
 public:
  static constexpr int L = kLanes<T>, kMaxRows = Plan::kSegmentRows + 1;  // one row more, for what pads SELL
  struct Rows {
    int64_t first, count;
  };

  Chunks(const Product<T>& p, T* stream) : p_(p), plan_(p.plan), stream_(stream) {}

  static int64_t count(const Plan& plan) {
    return plan.kind == Plan::kStrip ? (plan.strips + kChunkStrips - 1) / kChunkStrips : plan.segments;
  }

  // Numbers of scratch for the copy of the values, a multiple of what keeps vectors behind it aligned.
  static int64_t stream_size(const Plan& plan) {
    return plan.kind == Plan::kSell ? (4 * plan.steps + 15) / 16 * 16 : 0;
  }

  // Multiply-adds per pixel.
  static int64_t work(const Plan& plan) { return plan.kind == Plan::kStrip ? plan.size : 4 * plan.steps; }

  void fill_stream() {
    if (plan_.kind != Plan::kSell) return;
    p_.parallel((4 * plan_.steps + kStreamTask - 1) / kStreamTask, kStreamTask,
                [](void* self, int64_t i) { static_cast<Chunks*>(self)->fill_some(i); }, this);
  }

  // Rows of one chunk times the panel (`vectors` wide, its row plan.ks zeros), written to y [kMaxRows][vectors * L].
  Rows compute(const T* panel, int64_t vectors, int64_t chunk, T* y) const {
    if (plan_.kind == Plan::kStrip) {
      const int64_t all = count(plan_), begin = chunk * plan_.strips / all, end = (chunk + 1) * plan_.strips / all;
      auto* kernel = vectors == 3 ? strip_chunk<T, 3> : vectors == 2 ? strip_chunk<T, 2> : strip_chunk<T, 1>;
      kernel(plan_, p_.values, p_.bias, panel, begin, end, y);
      const int64_t row = plan_.first_row[begin];
      return {row, plan_.first_row[end - 1] + plan_.rows_of[end - 1] - row};
    }
    auto* kernel = vectors == 3 ? sell_segment<T, 3> : vectors == 2 ? sell_segment<T, 2> : sell_segment<T, 1>;
    kernel(plan_, stream_, p_.bias, panel, chunk, y);
    return {plan_.bounds[chunk], plan_.bounds[chunk + 1] - plan_.bounds[chunk]};
  }

 private:
  static constexpr int64_t kChunkStrips = Plan::kSegmentRows / Plan::kStripRows, kStreamTask = 1 << 15;

  void fill_some(int64_t task) {
    const int64_t begin = task * kStreamTask, end = std::min(begin + kStreamTask, 4 * plan_.steps);
    for (int64_t i = begin; i < end; i++) {
      const int32_t at = plan_.step_value[i], padding = at >> 31;  // all ones for -1
      const T value = p_.values[at & ~padding];                    // a load without a branch
      stream_[i] = padding ? T(0) : value;
    }
  }

  const Product<T>& p_;
  const Plan& plan_;
  T* stream_;
};
