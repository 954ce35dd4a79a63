// Portable vectors on the compiler's vector extensions. Included once per instruction set, inside
// the namespace SRN_ISA and after the target pragma; SRN_VECTOR_BYTES is the register width.
// Torch-free.

// Bit casts that work on a scalar and on a vector alike.
template <class To, class From>
static inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit cast between equal sizes");
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class A>
struct Simd {
  static constexpr int kLanes = SRN_VECTOR_BYTES / int(sizeof(A));
  typedef A V __attribute__((vector_size(SRN_VECTOR_BYTES)));
  static inline V splat(A x) { return V{} + x; }
  static inline V load(const A* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
  }
  static inline void store(A* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }
  // The first n < kLanes elements; the other lanes are zeros.
  static inline V load_part(const A* p, int n) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
    if constexpr (sizeof(A) == 4)
      return bits<V>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p));
    else
      return bits<V>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1u), p));
#else
    V v = {};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
  }
  static inline void store_part(A* p, V v, int n) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
    if constexpr (sizeof(A) == 4)
      _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), bits<__m512>(v));
    else
      _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1u), bits<__m512d>(v));
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
  }
  // Past the cache, to an address aligned to the vector; plain where the processor has no such
  // store.
  static inline void stream(A* p, V v) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits<__m512i>(v));
#elif defined(__x86_64__) && SRN_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(v));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(v));
#else
    store(p, v);
#endif
  }
};

typedef uint16_t Half16 __attribute__((vector_size(SRN_VECTOR_BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(SRN_VECTOR_BYTES)));
typedef int32_t Int32 __attribute__((vector_size(SRN_VECTOR_BYTES)));
typedef Simd<float>::V Float32;

// Conversions that work on a scalar and on a vector alike.
static inline uint32_t select(bool c, uint32_t x, uint32_t y) { return c ? x : y; }
static inline Word32 select(Int32 c, Word32 x, Word32 y) {
  const Word32 m = bits<Word32>(c);
  return (x & m) | (y & ~m);
}

template <class F, class W>
static inline F bf16_to_float(W h) {
  return bits<F>(W(h << 16));
}

// Round to nearest even; NaN stays NaN.
template <class F, class W>
static inline W float_to_bf16(F x) {
  const W u = bits<W>(x);
  const W rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return select((u & 0x7fffffffu) > 0x7f800000u, W((u >> 16) | 0x40u), rounded);
}

// binary16 to binary32 by scaling the shifted exponent; infinities and NaN get their exponent back.
template <class F, class W>
static inline F half_to_float(W h) {
  const W sign = (h & 0x8000u) << 16;
  const W magnitude = (h & 0x7fffu) << 13;
  const F scaled = bits<F>(magnitude) * 0x1p112f;
  const W finite = bits<W>(scaled);
  const W body = select((h & 0x7c00u) == 0x7c00u, W(magnitude | 0x7f800000u), finite);
  return bits<F>(W(body | sign));
}

// binary32 to binary16, round to nearest even, overflow to infinity, subnormals kept.
template <class F, class W>
static inline W float_to_half(F x) {
  const W u = bits<W>(x);
  const W sign = (u >> 16) & 0x8000u;
  const W magnitude = u & 0x7fffffffu;
  // Adding 0.5 places a value below 2^-14 so that the addition itself rounds it to the grid.
  const F shifted = bits<F>(magnitude) + 0.5f;
  const W subnormal = bits<W>(shifted) - 0x3f000000u;
  const W normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  W body = select(magnitude < 0x38800000u, subnormal, normal);
  body = select(magnitude >= 0x477ff000u, W(magnitude - magnitude + 0x7c00u), body);
  body = select(magnitude > 0x7f800000u, W(magnitude - magnitude + 0x7e00u), body);
  return body | sign;
}

// Storage types: how a weight element is read and written as the accumulation type A.
template <class T>
struct Storage;

template <>
struct Storage<float> {
  using A = float;
  static inline float get(const float* p) { return *p; }
  static inline void put(float* p, float x) { *p = x; }
  static inline Float32 load(const float* p) { return Simd<float>::load(p); }
  static inline void store(float* p, Float32 v) { Simd<float>::store(p, v); }
  static inline Float32 load_part(const float* p, int n) { return Simd<float>::load_part(p, n); }
  static inline void store_part(float* p, Float32 v, int n) { Simd<float>::store_part(p, v, n); }
};

template <>
struct Storage<double> {
  using A = double;
  static inline double get(const double* p) { return *p; }
  static inline void put(double* p, double x) { *p = x; }
  static inline Simd<double>::V load(const double* p) { return Simd<double>::load(p); }
  static inline void store(double* p, Simd<double>::V v) { Simd<double>::store(p, v); }
  static inline Simd<double>::V load_part(const double* p, int n) {
    return Simd<double>::load_part(p, n);
  }
  static inline void store_part(double* p, Simd<double>::V v, int n) {
    Simd<double>::store_part(p, v, n);
  }
};

static inline Half16 load_u16(const void* p) {
  Half16 h;
  __builtin_memcpy(&h, p, sizeof(h));
  return h;
}
static inline void store_u16(void* p, Half16 h) { __builtin_memcpy(p, &h, sizeof(h)); }
static inline Half16 load_u16_part(const void* p, int n) {
  Half16 h = {};
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  h = bits<Half16>(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p));
#else
  for (int i = 0; i < n; ++i) h[i] = static_cast<const uint16_t*>(p)[i];
#endif
  return h;
}
static inline void store_u16_part(void* p, Half16 h, int n) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), bits<__m256i>(h));
#else
  for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = h[i];
#endif
}

// Between 16 and 32 bits in one instruction, which compilers do not find by themselves.
static inline Word32 widen(Half16 h) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  return bits<Word32>(_mm512_cvtepu16_epi32(bits<__m256i>(h)));
#elif defined(__x86_64__) && SRN_VECTOR_BYTES == 32
  return bits<Word32>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#else
  return __builtin_convertvector(h, Word32);
#endif
}
static inline Half16 narrow(Word32 w) {  // of words below 2^16
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  return bits<Half16>(_mm512_cvtepi32_epi16(bits<__m512i>(w)));
#elif defined(__x86_64__) && SRN_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(w), bits<__m256i>(w));
  return bits<Half16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(w, Half16);
#endif
}

static inline Float32 widen_bf16(Half16 h) { return bf16_to_float<Float32>(widen(h)); }
static inline Half16 narrow_bf16(Float32 x) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  const __m512i u = bits<__m512i>(x), high = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 nan = _mm512_cmp_ps_mask(bits<__m512>(x), bits<__m512>(x), _CMP_UNORD_Q);
  const __m512i quiet = _mm512_set1_epi32(0x40);
  return narrow(bits<Word32>(_mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, high, quiet)));
#else
  return narrow(float_to_bf16<Float32, Word32>(x));
#endif
}
// In hardware where there is any: all x86-64 processors with AVX2.
static inline Float32 widen_half(Half16 h) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  return bits<Float32>(_mm512_cvtph_ps(bits<__m256i>(h)));
#elif defined(__x86_64__) && SRN_VECTOR_BYTES == 32
  return bits<Float32>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  return half_to_float<Float32>(widen(h));
#endif
}
static inline Half16 narrow_half(Float32 x) {
#if defined(__x86_64__) && SRN_VECTOR_BYTES == 64
  return bits<Half16>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__x86_64__) && SRN_VECTOR_BYTES == 32
  return bits<Half16>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  return narrow(float_to_half<Float32, Word32>(x));
#endif
}

template <>
struct Storage<bf16> {
  using A = float;
  static inline float get(const bf16* p) { return bf16_to_float<float, uint32_t>(p->x); }
  static inline void put(bf16* p, float x) { p->x = uint16_t(float_to_bf16<float, uint32_t>(x)); }
  static inline Float32 load(const bf16* p) { return widen_bf16(load_u16(p)); }
  static inline void store(bf16* p, Float32 v) { store_u16(p, narrow_bf16(v)); }
  static inline Float32 load_part(const bf16* p, int n) { return widen_bf16(load_u16_part(p, n)); }
  static inline void store_part(bf16* p, Float32 v, int n) { store_u16_part(p, narrow_bf16(v), n); }
};

template <>
struct Storage<half> {
  using A = float;
  static inline float get(const half* p) { return half_to_float<float, uint32_t>(p->x); }
  static inline void put(half* p, float x) { p->x = uint16_t(float_to_half<float, uint32_t>(x)); }
  static inline Float32 load(const half* p) { return widen_half(load_u16(p)); }
  static inline void store(half* p, Float32 v) { store_u16(p, narrow_half(v)); }
  static inline Float32 load_part(const half* p, int n) { return widen_half(load_u16_part(p, n)); }
  static inline void store_part(half* p, Float32 v, int n) { store_u16_part(p, narrow_half(v), n); }
};

// A double vector written to, or read from, a narrower element goes lane by lane.
template <class T, class A>
struct Access {
  using V = typename Simd<A>::V;
  static inline A get(const T* p) { return A(Storage<T>::get(p)); }
  static inline void put(T* p, A x) { Storage<T>::put(p, typename Storage<T>::A(x)); }
  static inline V load(const T* p) {
    V v;
    for (int i = 0; i < Simd<A>::kLanes; ++i) v[i] = get(p + i);
    return v;
  }
  static inline void store(T* p, V v) {
    for (int i = 0; i < Simd<A>::kLanes; ++i) put(p + i, v[i]);
  }
  static inline V load_part(const T* p, int n) {
    V v = {};
    for (int i = 0; i < n; ++i) v[i] = get(p + i);
    return v;
  }
  static inline void store_part(T* p, V v, int n) {
    for (int i = 0; i < n; ++i) put(p + i, v[i]);
  }
};
template <class T>
struct Access<T, typename Storage<T>::A> : Storage<T> {};

// Sums in double, by halves: one lane after the other would wait for each addition.
template <int kBytes>
static inline double sum_of_doubles(const double (&x)[kBytes / 8]) {
  if constexpr (kBytes == 8) {
    return x[0];
  } else {
    typedef double Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    __builtin_memcpy(&low, x, sizeof(Half));
    __builtin_memcpy(&high, x + kBytes / 16, sizeof(Half));
    low += high;
    double sums[kBytes / 16];
    __builtin_memcpy(sums, &low, sizeof(Half));
    return sum_of_doubles<kBytes / 2>(sums);
  }
}
static inline double lane_sum(Simd<double>::V v) {
  double x[SRN_VECTOR_BYTES / 8];
  __builtin_memcpy(x, &v, sizeof(v));
  return sum_of_doubles<SRN_VECTOR_BYTES>(x);
}
static inline double lane_sum(Float32 v) {
  typedef float Half __attribute__((vector_size(SRN_VECTOR_BYTES / 2)));
  typedef Simd<double>::V Doubles;
  Half low, high;
  __builtin_memcpy(&low, &v, sizeof(Half));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
  return lane_sum(__builtin_convertvector(low, Doubles) + __builtin_convertvector(high, Doubles));
}
