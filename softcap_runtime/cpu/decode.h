// Few query rows over many keys: decoding. Bound by memory, so k and v are read once for all rows of a group, as they
// lie, and long keys are split over threads.
//
// A part of the keys gives sum_j w_j v_j, sum_j w_j and the reference of its weights; parts are added in order.
#pragma once

#include "forward.h"

namespace softcap {

// Rows (query heads of a group times query rows) that are taken here, and keys whose logits are made at once.
constexpr int64_t FEW_ROWS = 8, DECODE_STEP = 64;

// Rows of one head lie apart, often a page of memory each, where the processor does not fetch ahead by itself.
// `CACHE`: 3 into the first cache, 2 into the second.
template <int CACHE, class T>
inline void fetch_row(const T* row, int64_t dim) {
  const char* from = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < dim * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(from + byte, 0, CACHE);
}

// Products of `ROWS` rows of q (float32, [ROWS][ld]) with one key.
template <int ROWS, class T>
inline void dot_rows(const float* q, int64_t ld, const T* key, int64_t dim, float* to, int64_t step) {
  Vec sums[ROWS] = {};
  for (int64_t d = 0; d < dim; d += LANES) {
    Vec k = widened(key + d, dim - d);
    for (int r = 0; r < ROWS; r++) sums[r] += k * load<Vec>(q + r * ld + d);
  }
  for (int r = 0; r < ROWS; r++) to[r * step] = sum(sums[r]);
}

// out[r] += sum_j w[r][j] v_j for LANES * WIDTH elements from `d` on.
template <int ROWS, int WIDTH, class T>
inline void add_values(float* out, int64_t ld, const float* w, const T* v, int64_t row_stride, int64_t keys,
                       int64_t dim, int64_t d) {
  Vec sums[ROWS][WIDTH] = {};
  for (int64_t j = 0; j < keys; j++) {
    for (int i = 0; i < WIDTH; i++) {
      Vec x = widened(v + j * row_stride + d + i * LANES, dim - d - i * LANES);
      for (int r = 0; r < ROWS; r++) sums[r][i] += x * w[r * DECODE_STEP + j];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < WIDTH; i++) {
      float* to = out + r * ld + d + i * LANES;
      store(to, load<Vec>(to) + sums[r][i]);
    }
}

// Keys whose rows are fetched ahead of their use.
constexpr int64_t AHEAD = 16;

// `ROWS` rows from `q` on, keys [first, first + keys): logits, weights, sums. `fetch`: how many of the keys and those
// after them are there to fetch ahead; 0 where that is done already.
template <int ROWS, class T>
inline void decode_step(const Problem& p, const Softcap& c, const float* q, int64_t ld, const T* k, const T* v,
                        int64_t first, int64_t keys, int64_t fetch, const int32_t* lo, const int32_t* hi, float* out,
                        float* total, float* peak) {
  alignas(64) float w[ROWS * DECODE_STEP];
  for (int64_t j = 0; j < keys; j++) {
    if (j + AHEAD < fetch) fetch_row<3>(k + (j + AHEAD) * p.k.row, p.dim);
    if (fetch) fetch_row<2>(v + j * p.v.row, p.dim);
    dot_rows<ROWS>(q, ld, k + j * p.k.row, p.dim, w + j, DECODE_STEP);
  }
  for (int r = 0; r < ROWS; r++) {
    float* x = w + r * DECODE_STEP;
    IVec from = splat(lo[r]), to = splat(hi[r]);
    Vec most = splat(peak[r]), sums{};
    for (int64_t j = 0; j < keys; j += LANES) {
      IVec number = lane_numbers() + int32_t(first + j);
      IVec shown = (number >= from) & (number < to) & (number < splat(int32_t(first + keys)));
      Vec logit = select(shown, capped_logit(c, load<Vec>(x + j)), splat(-INFINITY));
      store(x + j, logit);
      most = select(logit > most, logit, most);
    }
    if (!c.bounded) {
      float now = largest(most);
      if (now != peak[r]) {
        float factor = std::exp(peak[r] - now);
        total[r] *= factor;
        for (int64_t d = 0; d < ld; d++) out[r * ld + d] *= factor;
        peak[r] = now;
      }
    }
    Vec reference = splat(c.bounded || peak[r] == -INFINITY ? 0.0f : peak[r]);
    for (int64_t j = 0; j < keys; j += LANES) {
      Vec weight = exponential(load<Vec>(x + j) - reference);
      store(x + j, weight);
      sums += weight;
    }
    total[r] += sum(sums);
  }
  constexpr int WIDTH = ROWS > 2 ? 2 : 4;
  int64_t d = 0;
  for (; d + WIDTH * LANES <= p.dim; d += WIDTH * LANES)
    add_values<ROWS, WIDTH>(out, ld, w, v, p.v.row, keys, p.dim, d);
  for (; d < p.dim; d += LANES) add_values<ROWS, 1>(out, ld, w, v, p.v.row, keys, p.dim, d);
}

template <class T>
bool decode(const Problem& p, const Tensors& t) {
  const Softcap cap(p);
  int64_t group = p.heads / p.kv_heads, rows = group * p.q_len, places = p.batch * p.kv_heads;
  int64_t ld = round_up(p.dim, LANES), one = rows * (ld + 2);
  // The keys that any row may see, as far as the band tells.
  Range span{0, p.kv_len};
  if (!t.lo) {
    span.lo = p.left > 0 ? (p.left < p.kv_len ? p.left : p.kv_len) : 0;
    span.hi = p.q_len - 1 + p.right < p.kv_len ? p.q_len - 1 + p.right : p.kv_len;
    if (span.hi < span.lo) span.hi = span.lo;
  }
  int64_t most = (span.hi - span.lo + 4 * DECODE_STEP - 1) / (4 * DECODE_STEP);
  int64_t parts = (4 * p.threads + places - 1) / places;
  parts = parts > most ? most : parts;
  if (parts < 1) parts = 1;
  int64_t size = round_up((span.hi - span.lo + parts - 1) / parts, DECODE_STEP);
  Scratch<float> sums(places * parts * one);
  Scratch<float> queries(places * rows * ld);
  if (sums.missing() || queries.missing()) return false;
#pragma omp parallel num_threads(int(p.threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < places * rows; i++) {
      int64_t place = i / rows, r = i % rows, head = place % p.kv_heads * group + r / p.q_len;
      along(queries + i * ld, at(t.q, p, p.q, place / p.kv_heads, head, r % p.q_len), p.dtype, p.dim, ld);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < places * parts; i++) {
      int64_t place = i / parts, batch = place / p.kv_heads, head = place % p.kv_heads;
      int64_t from = span.lo + i % parts * size, to = from + size < span.hi ? from + size : span.hi;
      float *out = sums + i * one, *total = out + rows * ld, *peak = total + rows;
      std::memset(out, 0, rows * (ld + 1) * sizeof(float));
      int32_t lo[FEW_ROWS], hi[FEW_ROWS];
      for (int64_t r = 0; r < rows; r++) {
        Range seen = visible(p, t, batch, r % p.q_len);
        lo[r] = int32_t(seen.lo);
        hi[r] = int32_t(seen.hi);
        peak[r] = cap.bounded ? 0 : -INFINITY;
      }
      // Outside of all rows' keys there is nothing to read.
      int64_t least = to, past = from;
      for (int64_t r = 0; r < rows; r++)
        if (lo[r] < hi[r]) {
          least = lo[r] < least ? lo[r] : least;
          past = hi[r] > past ? hi[r] : past;
        }
      from = least > from ? least : from;
      to = past < to ? past : to;
      for (int64_t j = from, keys; j < to; j += keys) {
        keys = to - j < DECODE_STEP ? to - j : DECODE_STEP;
        if (t.table && keys > p.page_size - j % p.page_size) keys = p.page_size - j % p.page_size;
        const T* k = reinterpret_cast<const T*>(key_at(t.k, p, t, p.k, batch, head, j));
        const T* v = reinterpret_cast<const T*>(key_at(t.v, p, t, p.v, batch, head, j));
        for (int64_t r = 0; r < rows;) {
          const float* q = queries + (place * rows + r) * ld;
          auto take = [&](auto step, int64_t count) {
            int64_t fetch = r > 0 ? 0 : t.table ? keys : to - j;
            step(p, cap, q, ld, k, v, j, keys, fetch, lo + r, hi + r, out + r * ld, total + r, peak + r);
            r += count;
          };
          if (rows - r >= 4)
            take(decode_step<4, T>, 4);
          else if (rows - r >= 2)
            take(decode_step<2, T>, 2);
          else
            take(decode_step<1, T>, 1);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < places * rows; i++) {
      int64_t place = i / rows, r = i % rows, head = place % p.kv_heads * group + r / p.q_len, row = r % p.q_len;
      const float* first = sums + place * parts * one;
      float most_peak = first[rows * (ld + 1) + r];
      for (int64_t n = 1; n < parts; n++) {
        float peak = first[n * one + rows * (ld + 1) + r];
        most_peak = peak > most_peak ? peak : most_peak;
      }
      float total = 0;
      float* q = queries + i * ld;  // no longer needed: the sum of the parts
      std::memset(q, 0, ld * sizeof(float));
      for (int64_t n = 0; n < parts; n++) {
        const float* part = first + n * one;
        float peak = part[rows * (ld + 1) + r];
        float factor = peak == most_peak ? 1.0f : std::exp(peak - most_peak);
        total += factor * part[rows * ld + r];
        for (int64_t d = 0; d < ld; d += LANES) store(q + d, load<Vec>(q + d) + load<Vec>(part + r * ld + d) * factor);
      }
      float inverse = total == 0 ? 0.0f : 1.0f / total;
      write_row(at(t.out, p, p.out, place / p.kv_heads, head, row), p.dtype, q, inverse, p.dim);
      if (t.lse)
        t.lse[((place / p.kv_heads) * p.heads + head) * p.q_len + row] =
            total == 0 ? -INFINITY : (cap.bounded ? 0.0f : most_peak) + std::log(total);
    }
  }
  return true;
}

}  // namespace softcap
