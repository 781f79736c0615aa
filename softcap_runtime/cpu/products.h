// Matrix products of one thread: C[m][n] (+)= A[m][k] B[k][n], C in float32.
//
// A and B are made of 32-bit words: one float32, or a pair of bfloat16 that lie next to each other along k. A has
// contiguous rows of words, B a row of words for each k (or pair of ks). Three arithmetics share this form:
//   Single  float32 multiply-adds; half-precision inputs are widened as they are packed.
//   Dot     bfloat16 pairs into float32 (AVX512-BF16).
//   Tile    the same in tiles of 16 x 16 words (AMX).
#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace softcap {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// MR rows by NV vectors of C in registers. `broadcast` and `multiply_add` are those of an arithmetic.
template <class Arithmetic, int MR, int NV>
SOFTCAP_ONCE void register_block(float* c, int64_t ldc, const typename Arithmetic::Word* a, int64_t lda,
                           const typename Arithmetic::Word* b, int64_t ldb, int64_t k, bool add) {
  Vec sums[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sums[i][j] = Vec{};
  for (int64_t p = 0; p < k; p++) {
    Vec columns[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      columns[j] = load<Vec>(b + p * ldb + j * LANES);
      keep_loaded(columns[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      Vec row = Arithmetic::broadcast(a[i * lda + p]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sums[i][j] = Arithmetic::multiply_add(row, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      float* to = c + i * ldc + j * LANES;
      store(to, add ? load<Vec>(to) + sums[i][j] : sums[i][j]);
    }
}

// All rows of C, a multiple of MR, in a strip of NV vectors.
template <class Arithmetic, int MR, int NV>
inline void strip(float* c, int64_t ldc, const typename Arithmetic::Word* a, int64_t lda,
                  const typename Arithmetic::Word* b, int64_t ldb, int64_t m, int64_t k, bool add) {
  for (int64_t i = 0; i < m; i += MR)
    register_block<Arithmetic, MR, NV>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, k, add);
}

// Terms of a sum in registers, which is then added to the others.
constexpr int64_t PART = 128;

// The same for logits, sums of `k` terms: shorter ones, as the exponential of a logit passes all its error on.
inline int64_t part_of_logit(int64_t k) { return k > PART ? PART / 2 : (k + 1) / 2; }

// m and n are multiples of 16. Sums over k are cut: part of B then stays in the first cache, and the sums of float32 are
// short, which leaves less rounding: at 128 terms of a logit dq would be further off than eager code's.
template <class Arithmetic>
inline void vector_product(float* c, int64_t ldc, const typename Arithmetic::Word* a, int64_t lda,
                           const typename Arithmetic::Word* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
                           bool add) {
  constexpr int WIDE = REGISTERS == 32 ? 4 : 3, ROWS = 4;  // 24 of 32 registers, 16 of 16
  const int64_t part = Arithmetic::PAIR == 1 && !add ? part_of_logit(k) : PART;
  for (int64_t p = 0; p < k; p += part) {
    int64_t terms = k - p < part ? k - p : part;
    bool more = add || p > 0;
    for (int64_t j = 0; j < n;) {
      float* to = c + j;
      const typename Arithmetic::Word *rows = a + p, *columns = b + p * ldb + j;
      // Four vectors are two strips of two where three are the widest: a strip of one is bound by its loads.
      const int64_t left = (n - j) / LANES;
      const int wide = left >= WIDE && !(WIDE == 3 && left == 4) ? WIDE : left >= 2 ? 2 : 1;
      if (wide == WIDE)
        strip<Arithmetic, ROWS, WIDE>(to, ldc, rows, lda, columns, ldb, m, terms, more);
      else if (wide == 2)
        strip<Arithmetic, ROWS, 2>(to, ldc, rows, lda, columns, ldb, m, terms, more);
      else
        strip<Arithmetic, 8, 1>(to, ldc, rows, lda, columns, ldb, m, terms, more);
      j += wide * LANES;
    }
  }
}

struct Single {
  using Word = float;
  static constexpr int PAIR = 1;        // elements a word
  static constexpr int64_t PAD = 16;    // sizes are padded to multiples of this many words or lanes
  static constexpr int64_t ROWS = 64;   // query rows of a block: B of q k^T then fits the first cache
  static constexpr int64_t STEP = 64;   // keys of a step of the backward: longer sums, or products in the first cache
  static Vec broadcast(float x) { return splat(x); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  SOFTCAP_ONCE static void multiply(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m,
                       int64_t n, int64_t k, bool add) {
    vector_product<Single>(c, ldc, a, lda, b, ldb, m, n, k, add);
  }
  static void begin() {}
  static void end() {}
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
struct Dot {
  using Word = uint32_t;
  static constexpr int PAIR = 2;
  static constexpr int64_t PAD = 16;
  static constexpr int64_t ROWS = 64, STEP = 64;
  static Vec broadcast(uint32_t x) { return of_bits(splat((int32_t)x)); }
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  SOFTCAP_ONCE static void multiply(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       int64_t m, int64_t n, int64_t k, bool add) {
    vector_product<Dot>(c, ldc, a, lda, b, ldb, m, n, k, add);
  }
  static void begin() {}
  static void end() {}
};
#define SOFTCAP_DOT 1
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
struct Tile {
  using Word = uint32_t;
  static constexpr int PAIR = 2;
  static constexpr int64_t PAD = 16;
  static constexpr int64_t ROWS = 128, STEP = 128;

  // The kernel lets a process use the tiles when it asks (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18).
  static bool permitted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
  }
  // A thread's tiles: eight of 16 rows of 64 bytes.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }

  // MT x NT tiles of C, each at most two.
  template <int MT, int NT>
  SOFTCAP_ONCE static void block(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t k,
                    bool add) {
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      if (NT > 1) _tile_loadd(1, c + 16, ldc * 4);
      if (MT > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
      if (MT > 1 && NT > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t p = 0; p < k; p += 16) {
      _tile_loadd(4, a + p, lda * 4);
      _tile_loadd(6, b + p * ldb, ldb * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (NT > 1) {
        _tile_loadd(7, b + p * ldb + 16, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (MT > 1) {
        _tile_loadd(5, a + 16 * lda + p, lda * 4);
        _tile_dpbf16ps(2, 5, 6);
        if (NT > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, ldc * 4);
    if (NT > 1) _tile_stored(1, c + 16, ldc * 4);
    if (MT > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
    if (MT > 1 && NT > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }

  template <int MT>
  static void strip(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t n,
                    int64_t k, bool add) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) block<MT, 2>(c + j, ldc, a, lda, b + j, ldb, k, add);
    if (j < n) block<MT, 1>(c + j, ldc, a, lda, b + j, ldb, k, add);
  }

  // m, n and k are multiples of 16.
  SOFTCAP_ONCE static void multiply(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       int64_t m, int64_t n, int64_t k, bool add) {
    int64_t i = 0;
    for (; i + 32 <= m; i += 32) strip<2>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, n, k, add);
    if (i < m) strip<1>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, n, k, add);
  }
};
#define SOFTCAP_TILE 1
#endif

}  // namespace softcap
