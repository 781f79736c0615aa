// Vectors of float32 and int32 as wide as this CPU's registers, and the functions of the softmax on them.
//
// GCC's and Clang's vector extensions: the same source serves AVX-512, AVX2, NEON and plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Compiled once, however many places call it: most of a build's time otherwise.
#define SOFTCAP_ONCE __attribute__((noinline))

namespace softcap {

// Vector registers there are.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HVec __attribute__((vector_size(2 * LANES)));  // bfloat16 or float16, as bits

template <class V, class T>
inline V load(const T* from) {
  V made;
  std::memcpy(&made, from, sizeof(V));
  return made;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Has a vector stay in its register. GCC would else load it again for each use, and be bound by its loads.
inline void keep_loaded(Vec& x) {
#if defined(__AVX2__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

inline IVec splat(int32_t x) { return IVec{} + x; }
inline Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};  // not Vec{} + x, which adds: 0 + -0 is another number
#endif
}
inline IVec bits(Vec x) { return (IVec)x; }
inline Vec of_bits(IVec x) { return (Vec)x; }
inline Vec size_of(Vec x) { return of_bits(bits(x) & 0x7fffffff); }

// 0, 1, 2, ...
inline IVec lane_numbers() {
  IVec made;
  for (int i = 0; i < LANES; i++) made[i] = i;
  return made;
}

// `where` is 0 or -1 in each lane, as comparisons give it.
inline Vec select(IVec where, Vec then, Vec otherwise) {
  return of_bits((where & bits(then)) | (~where & bits(otherwise)));
}

inline bool any(IVec where) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)where, (__m512i)where) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)where, (__m256i)where);
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= where[i];
  return found != 0;
#endif
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

// The sums of four vectors, one after the other.
inline void store_sums(float* to, const Vec (&x)[4]) {
#if defined(__AVX512F__)
  __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  Vec ab = (Vec)_mm512_unpacklo_ps(a, b) + (Vec)_mm512_unpackhi_ps(a, b);
  Vec cd = (Vec)_mm512_unpacklo_ps(c, d) + (Vec)_mm512_unpackhi_ps(c, d);
  Vec all = (Vec)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (Vec)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  __m256 low = _mm512_castps512_ps256((__m512)all), high = (__m256)_mm512_extractf64x4_pd((__m512d)all, 1);
#elif defined(__AVX2__)
  __m256 ab = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), cd = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
  __m256 low = _mm256_hadd_ps(ab, cd), high = _mm256_setzero_ps();
#endif
#if defined(__AVX2__)
  __m256 eight = _mm256_add_ps(low, high);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
#else
  for (int i = 0; i < 4; i++) to[i] = sum(x[i]);
#endif
}

inline float largest(Vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// e^x for x <= 88, relative error below 1.2e-7: 2^n * e^r, |r| <= ln(2) / 2, with the Taylor polynomial of degree 7
// (its remainder is below 2^-27). Below -87.3, where float32 has no normal numbers left, 0. NaN stays NaN.
inline Vec exponential(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693145751953125f;  // ln(2) in two parts, the first exact in 17 bits
  r = r - n * 1.42860682030941723e-6f;
  Vec p = splat(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  Vec power = of_bits((bits(shifted) - 0x4b400000 + 127) << 23);
  Vec value = power + p * power;
  return select(x < splat(-87.3f), Vec{}, value);
}

// tanh(y), and 1 - tanh(y)^2 without the loss that this difference has where tanh is close to 1.
struct Tanh {
  Vec value, slope;
};

// Below 0.6: y + y z R(z), z = y^2, fitted by reweighted least squares to 2.8e-9 relative. Above: with w = e^(-2|y|),
// 1 - 2w / (1 + w) and 4w / (1 + w)^2. Relative error 1.7e-8 to 4.9e-8 (root mean square), +-1 where float32's tanh is.
// Logits far below the cap are the rule, so the exponential is skipped where no lane needs it.
template <bool SLOPE>
inline Tanh hyperbolic_tangent(Vec y) {
  Vec z = y * y;
  Vec r = splat(-0.00589516f);
  r = r * z + 0.02079597f;
  r = r * z - 0.05378383f;
  r = r * z + 0.13331924f;
  r = r * z - 0.33333298f;
  Vec near = y + y * z * r;
  Tanh found{near, SLOPE ? 1.0f - near * near : Vec{}};
  IVec far = ~(z < splat(0.36f));  // NaN too
  if (__builtin_expect(any(far), 0)) {
    Vec w = exponential(-2.0f * size_of(y));
    Vec scale = 1.0f / (1.0f + w);
    Vec beyond = 1.0f - 2.0f * w * scale;
    beyond = of_bits(bits(beyond) | (bits(y) & (int32_t)0x80000000));
    found.value = select(far, beyond, found.value);
    if (SLOPE) found.slope = select(far, 4.0f * w * scale * scale, found.slope);
  }
  return found;
}

// bfloat16 is the upper half of a float32. Rounds to the nearest, ties to even; a NaN stays one.
inline IVec rounded_to_bfloat16(Vec x) {
  IVec whole = bits(x);
  IVec rounded = whole + 0x7fff + ((whole >> 16) & 1);
  IVec nan = (x != x);
  return (nan & 0x7fc00000) | (~nan & (rounded & (int32_t)0xffff0000));
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec widened(const float* from) { return load<Vec>(from); }

inline Vec widened(const BFloat16* from) {
  return of_bits(__builtin_convertvector(load<HVec>(from), IVec) << 16);
}

inline Vec widened(const Float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)load<HVec>(from));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)load<HVec>(from));
#else
  _Float16 halves[LANES];
  std::memcpy(halves, from, sizeof(halves));
  Vec made;
  for (int i = 0; i < LANES; i++) made[i] = (float)halves[i];
  return made;
#endif
}

inline void narrow(float* to, Vec x) { store(to, x); }

inline void narrow(BFloat16* to, Vec x) {
  store(to, __builtin_convertvector((UVec)rounded_to_bfloat16(x) >> 16, HVec));
}

inline void narrow(Float16* to, Vec x) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  _Float16 halves[LANES];
  for (int i = 0; i < LANES; i++) halves[i] = (_Float16)x[i];
  std::memcpy(to, halves, sizeof(halves));
#endif
}

// Elements [0, count) of a row, count <= LANES, zeros after them.
template <class T>
inline Vec widened(const T* from, int64_t count) {
  if (count >= LANES) return widened(from);
  T padded[LANES] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = from[i];
  return widened(padded);
}

template <class T>
inline void narrow(T* to, Vec x, int64_t count) {
  if (count >= LANES) return narrow(to, x);
  T padded[LANES];
  narrow(padded, x);
  for (int64_t i = 0; i < count; i++) to[i] = padded[i];
}

// Twice as many elements, in the order in which they are unpacked fastest: of bfloat16 those at even places first.
struct Halves {
  Vec first, second;
};

inline Halves halves(const float* from) { return {load<Vec>(from), load<Vec>(from + LANES)}; }
inline Halves halves(const Float16* from) { return {widened(from), widened(from + LANES)}; }
inline Halves halves(const BFloat16* from) {
  IVec pairs = load<IVec>(from);
  return {of_bits(pairs << 16), of_bits(pairs & (int32_t)0xffff0000)};
}

template <class T>
inline void narrow(T* to, Halves x) {
  narrow(to, x.first);
  narrow(to + LANES, x.second);
}

inline void narrow(BFloat16* to, Halves x) {
  store(to, ((UVec)rounded_to_bfloat16(x.first) >> 16) | (UVec)rounded_to_bfloat16(x.second));
}

// Elements [0, count) of a row, zeros after them.
template <class T>
inline Halves halves(const T* from, int64_t count) {
  if (__builtin_expect(count >= 2 * LANES, 1)) return halves(from);
  T padded[2 * LANES] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = from[i];
  return halves(padded);
}

template <class T>
inline void narrow(T* to, Halves x, int64_t count) {
  if (count >= 2 * LANES) return narrow(to, x);
  T padded[2 * LANES];
  narrow(padded, x);
  for (int64_t i = 0; i < count; i++) to[i] = padded[i];
}

}  // namespace softcap
