// Rows of q, k, v and gradients as operands of the products in products.h, and scratch memory.
//
// An operand comes from rows of D elements. `along` keeps a row's elements together (words along D); `across` puts
// the same element of neighbouring rows together (words across rows: PAIR rows a word). `transpose` swaps rows and
// words. With them K is along(k), Q^T is transpose(along(q)), V^T is transpose(across(v)), Q as a factor of dK is
// across(q).
#pragma once

#include <cstdlib>
#include <sys/mman.h>

#include "products.h"

namespace softcap {

// What a thread keeps from call to call: a fresh page of memory costs a fault, and short calls are too short for many.
struct Kept {
  static constexpr int64_t BYTES = int64_t(2) << 20;
  char* base = nullptr;
  int64_t used = 0;
  ~Kept() { std::free(base); }
};

inline Kept& kept() {
  static thread_local Kept mine;
  return mine;
}

// Memory of one call, freed in the reverse order: from what the thread keeps, while there is room. Large blocks ask
// for huge pages: thousands of page faults otherwise cost some percent.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(round_up(count * int64_t(sizeof(T)), 64) + 64) {
    constexpr int64_t HUGE = int64_t(2) << 20;
    Kept& mine = kept();
    if (!mine.base) mine.base = static_cast<char*>(allocated(64, Kept::BYTES));
    from_kept_ = mine.base && mine.used + bytes_ <= Kept::BYTES;
    if (from_kept_) {
      data_ = reinterpret_cast<T*>(mine.base + mine.used);
      mine.used += bytes_;
      return;
    }
    data_ = static_cast<T*>(allocated(bytes_ >= 2 * HUGE ? HUGE : 64, bytes_));
#if defined(MADV_HUGEPAGE)
    if (data_ && bytes_ >= 2 * HUGE) madvise(data_, bytes_ / HUGE * HUGE, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() {
    if (from_kept_)
      kept().used -= bytes_;
    else
      std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }
  bool missing() const { return data_ == nullptr; }

 private:
  static void* allocated(size_t align, size_t bytes) {
    void* found = nullptr;
    return posix_memalign(&found, align, bytes) == 0 ? found : nullptr;
  }
  int64_t bytes_;
  T* data_ = nullptr;
  bool from_kept_;
};

// Transposes a block of LANES x LANES words.
template <class W>
inline void transpose_block(W* to, int64_t ld_to, const W* from, int64_t ld_from) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
  IVec rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) rows[i] = load<IVec>(from + i * ld_from);
  // Swap the halves of ever larger squares; lanes at and above LANES name the second vector.
#pragma GCC unroll 4
  for (int s = 1; s < LANES; s *= 2) {
    IVec upper, lower;
    for (int l = 0; l < LANES; l++) {
      upper[l] = l & s ? LANES + l - s : l;
      lower[l] = l & s ? LANES + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & s)) {
        IVec first = rows[i], second = rows[i + s];
        rows[i] = __builtin_shuffle(first, second, upper);
        rows[i + s] = __builtin_shuffle(first, second, lower);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * ld_to, rows[i]);
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) to[j * ld_to + i] = from[i * ld_from + j];
#endif
}

// to[w][r] = from[r][w]; both counts are multiples of LANES.
template <class W>
SOFTCAP_ONCE void transpose(W* to, int64_t ld_to, const W* from, int64_t ld_from, int64_t rows, int64_t words) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t w = 0; w < words; w += LANES)
      transpose_block(to + w * ld_to + r, ld_to, from + r * ld_from + w, ld_from);
}

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

template <class T>
inline void widen_row(float* to, const T* row, int64_t dim, int64_t width) {
  for (int64_t d = 0; d < width; d += LANES) store(to + d, d < dim ? widened(row + d, dim - d) : Vec{});
}

// One row of `dim` elements as `words` words, zeros at the end; a row that is not there is null. Pairs are bfloat16.
SOFTCAP_ONCE inline void along(float* to, const void* row, int64_t dtype, int64_t dim, int64_t words) {
  if (!row) return void(std::memset(to, 0, words * 4));
  if (dtype == FLOAT32) return widen_row(to, static_cast<const float*>(row), dim, words);
  if (dtype == BFLOAT16) return widen_row(to, static_cast<const BFloat16*>(row), dim, words);
  widen_row(to, static_cast<const Float16*>(row), dim, words);
}

inline void along(uint32_t* to, const void* row, int64_t, int64_t dim, int64_t words) {
  int64_t bytes = row ? dim * 2 : 0;
  if (bytes) std::memcpy(to, row, bytes);
  std::memset(reinterpret_cast<char*>(to) + bytes, 0, words * 4 - bytes);
}

// PAIR rows as one row of `width` words, zeros at the end.
inline void across(float* to, const void* const* rows, int64_t dtype, int64_t dim, int64_t width) {
  along(to, rows[0], dtype, dim, width);
}

SOFTCAP_ONCE inline void across(uint32_t* to, const void* const* rows, int64_t, int64_t dim, int64_t width) {
  const BFloat16 *first = static_cast<const BFloat16*>(rows[0]), *second = static_cast<const BFloat16*>(rows[1]);
  for (int64_t d = 0; d < width; d += LANES) {
    Vec low = first && d < dim ? widened(first + d, dim - d) : Vec{};
    Vec high = second && d < dim ? widened(second + d, dim - d) : Vec{};
    store(to + d, ((UVec)low >> 16) | (UVec)high);
  }
}

// `keys` rows (null: zeros) as `across`, turned: [width][keys / PAIR] words. `row(j)` gives row j; `room` holds LANES rows
// of `width` words.
template <class A, class Row>
inline void across_turned(typename A::Word* to, int64_t keys, const Row& row, int64_t dtype, int64_t dim, int64_t width,
                          typename A::Word* room) {
  for (int64_t w = 0; w < keys / A::PAIR; w += LANES) {
    for (int64_t i = 0; i < LANES; i++) {
      const void* rows[2] = {};
      for (int64_t e = 0; e < A::PAIR; e++) rows[e] = row((w + i) * A::PAIR + e);
      across(room + i * width, rows, dtype, dim, width);
    }
    transpose<typename A::Word>(to + w, keys / A::PAIR, room, width, LANES, width);
  }
}

template <class T>
inline void narrow_row(T* to, const float* from, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; d += LANES) narrow(to + d, load<Vec>(from + d) * factor, dim - d);
}

// A row of results, times `factor`.
SOFTCAP_ONCE inline void write_row(void* to, int64_t dtype, const float* from, float factor, int64_t dim) {
  if (dtype == FLOAT32) return narrow_row(static_cast<float*>(to), from, factor, dim);
  if (dtype == BFLOAT16) return narrow_row(static_cast<BFloat16*>(to), from, factor, dim);
  narrow_row(static_cast<Float16*>(to), from, factor, dim);
}

}  // namespace softcap
