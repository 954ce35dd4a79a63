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
};

template <>
struct Storage<double> {
  using A = double;
  static inline double get(const double* p) { return *p; }
  static inline void put(double* p, double x) { *p = x; }
  static inline Simd<double>::V load(const double* p) { return Simd<double>::load(p); }
  static inline void store(double* p, Simd<double>::V v) { Simd<double>::store(p, v); }
};

static inline Word32 load_u16(const void* p) {
  Half16 h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Word32);
}
static inline void store_u16(void* p, Word32 w) {
  const Half16 h = __builtin_convertvector(w, Half16);
  __builtin_memcpy(p, &h, sizeof(h));
}

template <>
struct Storage<bf16> {
  using A = float;
  static inline float get(const bf16* p) { return bf16_to_float<float, uint32_t>(p->x); }
  static inline void put(bf16* p, float x) { p->x = uint16_t(float_to_bf16<float, uint32_t>(x)); }
  static inline Float32 load(const bf16* p) { return bf16_to_float<Float32>(load_u16(p)); }
  static inline void store(bf16* p, Float32 v) { store_u16(p, float_to_bf16<Float32, Word32>(v)); }
};

template <>
struct Storage<half> {
  using A = float;
  static inline float get(const half* p) { return half_to_float<float, uint32_t>(p->x); }
  static inline void put(half* p, float x) { p->x = uint16_t(float_to_half<float, uint32_t>(x)); }
  static inline Float32 load(const half* p) { return half_to_float<Float32>(load_u16(p)); }
  static inline void store(half* p, Float32 v) { store_u16(p, float_to_half<Float32, Word32>(v)); }
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
};
template <class T>
struct Access<T, typename Storage<T>::A> : Storage<T> {};

template <class A>
static inline double lane_sum(typename Simd<A>::V v) {
  double total = 0.0;
  for (int i = 0; i < Simd<A>::kLanes; ++i) total += double(v[i]);
  return total;
}
