// Vectors of the instruction set being compiled (SK_VECTOR_BYTES wide), through compiler vector extensions: one source
// for all sets. Included inside the set's namespace.

#define SK_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd {
  static constexpr int kLanes = SK_VECTOR_BYTES / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(SK_VECTOR_BYTES), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Bits __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(SK_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename Simd<T>::Vector;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
SK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
SK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Bits of a vector, to keep some lanes and clear the others.
template <class T>
using Mask = typename Simd<T>::Bits;

// All bits in lanes [low, high), 0 <= low <= high <= lanes.
template <class T>
SK_INLINE Mask<T> mask_between(int64_t low, int64_t high) {
  constexpr int L = kLanes<T>;
  using Bit = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  struct Ones {
    Bit bit[3 * L] = {};
    constexpr Ones() {
      for (int i = L; i < 2 * L; i++) bit[i] = -1;
    }
  };
  static constexpr Ones ones;
  const auto from = [](const Bit* p) { return Mask<T>(load(reinterpret_cast<const T*>(p))); };
  return from(ones.bit + L - low) & from(ones.bit + 2 * L - high);
}

// Whether a vector is a register. Vectors of 64 bytes without AVX-512 are not; tests run the source that way.
#if defined(__x86_64__) && (SK_VECTOR_BYTES < 64 || defined(__AVX512F__))
#define SK_X86_REGISTERS
#endif

// What the compiler knows of a vector ends here.
template <class V>
SK_INLINE void opaque([[maybe_unused]] V& v) {
#if defined(SK_X86_REGISTERS)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// A load that is not folded into its uses: g++ would otherwise repeat it as the memory operand of each of the four FMAs
// that share it, and the loop would be bound by loads.
template <class T>
SK_INLINE Vec<T> load_once(const T* p) {
  Vec<T> v = load(p);
  opaque(v);
  return v;
}

// acc + a * b, one instruction where there is one. Loads that several of them share must be opaque (load_once).
template <class T>
SK_INLINE Vec<T> fma(Vec<T> acc, Vec<T> a, Vec<T> b) {
  return acc + a * b;
}

// acc + a * (the vector at p, which is aligned where the instruction set asks for it): the load is part of the
// instruction.
template <class T>
SK_INLINE Vec<T> fma_from(Vec<T> acc, Vec<T> a, const T* p) {
#if defined(__FMA__) && defined(SK_X86_REGISTERS)
  const auto& b = *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
  if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "m"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+v"(acc) : "v"(a), "m"(b));
  return acc;
#else
  return acc + a * load(p);
#endif
}

template <class V, class T, int... I>
SK_INLINE V splat_lanes(T s, std::integer_sequence<int, I...>) {
  return V{(static_cast<void>(I), s)...};
}

template <class T>
SK_INLINE Vec<T> splat(T s) {
  return splat_lanes<Vec<T>>(s, std::make_integer_sequence<int, kLanes<T>>{});
}

// Lanes I... of a and, counted on from there, b.
template <int... I, class V>
SK_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Lanes{I...});
#endif
}

template <class V, class Q, int... J>
SK_INLINE V repeat_of(Q q, std::integer_sequence<int, J...>) {
  return V{q[J & (16 / int(sizeof(q[0])) - 1)]...};
}

// The 16 bytes at p in every 16 bytes of a vector. One instruction on x86, which g++ does not find by itself.
template <class T>
SK_INLINE Vec<T> load_repeated(const T* p) {
  typedef T Quad __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
  const Quad& quad = *reinterpret_cast<const Quad*>(p);
  Vec<T> v;
#if defined(SK_X86_REGISTERS) && SK_VECTOR_BYTES == 64
  asm("vbroadcastf32x4 %1, %0" : "=v"(v) : "m"(quad));
#elif defined(SK_X86_REGISTERS) && SK_VECTOR_BYTES == 32
  asm("vbroadcastf128 %1, %0" : "=x"(v) : "m"(quad));
#else
  v = repeat_of<Vec<T>>(quad, std::make_integer_sequence<int, kLanes<T>>{});
  opaque(v);  // or the compiler would make four loads of it again
#endif
  return v;
}

// Lane R of every 16 bytes in all lanes of those 16 bytes.
template <int R, class V, int... J>
SK_INLINE V splat_within(V v, std::integer_sequence<int, J...>) {
  constexpr int n = 16 / int(sizeof(v[0]));
  return shuffle<(J / n * n + R)...>(v, v);
}

// Four neighbouring numbers, each to be splat in turn: a load for every 16 bytes of them, and a shuffle each.
template <class T>
struct Four {
  static constexpr int N = 16 / sizeof(T);
  Vec<T> v[4 / N];
  explicit SK_INLINE Four(const T* p) {
#pragma GCC unroll 2
    for (int i = 0; i < 4 / N; i++) v[i] = load_repeated(p + i * N);
  }
  template <int R>
  SK_INLINE Vec<T> get() const {
    return splat_within<R % N>(v[R / N], std::make_integer_sequence<int, kLanes<T>>{});
  }
};

// Two vectors of groups of 2 H lanes -> the low (high) halves of their groups, side by side: one instruction for H
// >= 2.
template <int H, bool High, class V, int... J>
SK_INLINE V halves_of(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  return shuffle<((J & H ? n : 0) + (J & ~(2 * H - 1)) + (J & (H - 1)) + (High ? H : 0))...>(a, b);
}
template <int H, bool High, class T>
SK_INLINE Vec<T> halves(Vec<T> a, Vec<T> b) {
  return halves_of<H, High>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Groups of 4 lanes: a0 b0 a1 b1, or a2 b2 a3 b3 (what x86 calls unpack).
template <bool High, class V, int... J>
SK_INLINE V zip_of(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  return shuffle<((J & 1 ? n : 0) + (J & ~3) + (J >> 1 & 1) + (High ? 2 : 0))...>(a, b);
}
template <bool High, class T>
SK_INLINE Vec<T> zip(Vec<T> a, Vec<T> b) {
  return zip_of<High>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// The squares of H lanes within r are transposed; exchange them, then those of 2 H, ...
template <class T, int H>
SK_INLINE void transpose_from(Vec<T>* r) {
  if constexpr (H < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i++) {
      if (i & H) continue;
      const Vec<T> low = halves<H, false, T>(r[i], r[i + H]), high = halves<H, true, T>(r[i], r[i + H]);
      r[i] = low, r[i + H] = high;
    }
    transpose_from<T, 2 * H>(r);
  }
}

// Transposes the square r of lanes in place.
template <class T>
SK_INLINE void transpose(Vec<T>* r) {
  if constexpr (sizeof(T) == 8) {
    transpose_from<T, 1>(r);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 4) {
      const Vec<T> a = zip<false, T>(r[i], r[i + 1]), b = zip<true, T>(r[i], r[i + 1]);
      const Vec<T> c = zip<false, T>(r[i + 2], r[i + 3]), d = zip<true, T>(r[i + 2], r[i + 3]);
      r[i] = halves<2, false, T>(a, c), r[i + 1] = halves<2, true, T>(a, c);
      r[i + 2] = halves<2, false, T>(b, d), r[i + 3] = halves<2, true, T>(b, d);
    }
    transpose_from<T, 4>(r);
  }
}

template <class T, int H>
SK_INLINE Vec<T> sum_from(Vec<T>* a) {
  if constexpr (H == kLanes<T>) {
    return a[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T> / (2 * H); i++)
      a[i] = halves<H, false, T>(a[2 * i], a[2 * i + 1]) + halves<H, true, T>(a[2 * i], a[2 * i + 1]);
    return sum_from<T, 2 * H>(a);
  }
}

// Vector whose lane j is the sum of the lanes of a[j]; destroys a.
template <class T>
SK_INLINE Vec<T> sum_lanes(Vec<T>* a) {
  if constexpr (sizeof(T) == 8) {
    return sum_from<T, 1>(a);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T> / 2; i++)
      a[i] = zip<false, T>(a[2 * i], a[2 * i + 1]) + zip<true, T>(a[2 * i], a[2 * i + 1]);
    return sum_from<T, 2>(a);
  }
}
