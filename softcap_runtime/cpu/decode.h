// Few query rows over many keys: decoding. Bound by memory, so k and v are read once for all rows of a group, as they
// lie, and long keys are split over threads.
//
// A part of the keys gives sum_j w_j v_j, sum_j w_j and the reference of its weights; parts are added in order. A task
// walks over its keys step by step; where the heads of a key lie side by side, as in a cache [B, S, H, D], it takes
// several of them in a step, else one head after the other. While it multiplies the keys of a step it fetches the
// values of the next one, and with the values the next keys, both in the order in which they lie: out of order, the
// same keys took 1.4 times as long on a core of Zen 3, as processors foresee what is read in order. How long a step is
// best, and whether it is fetched into the first or the second cache, a build measures: see ahead.h.
#pragma once

#include <type_traits>

#include "ahead.h"
#include "forward.h"

namespace softcap {

// Rows (query heads of a group times query rows) that are always taken here, and at most. Heads of a key that are taken
// together.
constexpr int64_t FEW_ROWS = 8, MOST_ROWS = 64, HEADS_TOGETHER = 4;
// Keys whose products are summed side by side, for sums enough to hide the adders' latency.
constexpr int TOGETHER = 4;
// Rows that are taken at once, so that their sums stay in registers.
constexpr int64_t ROWS_AT_ONCE = REGISTERS == 32 ? 4 : 2;

// Elements of a row that are loaded at once.
constexpr int64_t WIDE = 2 * LANES;

// Bfloat16 is multiplied in pairs where this CPU can: such products are exact in float32, and nothing is widened.
#if SOFTCAP_DOT
template <class T>
using QueryWord = std::conditional_t<std::is_same_v<T, BFloat16>, uint32_t, float>;
#else
template <class T>
using QueryWord = float;
#endif

// sums[r][i] += q_r * k_i for the elements [d, d + WIDE); `count` of them are there.
template <int ROWS, class T>
inline void add_products(Vec (&sums)[ROWS][TOGETHER], const float* q, int64_t ld, const T* const* keys, int64_t d,
                         int64_t count) {
#pragma GCC unroll 4
  for (int i = 0; i < TOGETHER; i++) {
    Halves k = halves(keys[i] + d, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      sums[r][i] += k.first * load<Vec>(q + r * ld + d);
      sums[r][i] += k.second * load<Vec>(q + r * ld + d + LANES);
    }
  }
}

#if SOFTCAP_DOT
// Elements [0, count) of a row as they lie, zeros after them.
inline IVec pairs(const BFloat16* from, int64_t count) {
  if (count >= WIDE) return load<IVec>(from);
  BFloat16 padded[WIDE] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = from[i];
  return load<IVec>(padded);
}

// The same with rows of pairs.
template <int ROWS>
inline void add_products(Vec (&sums)[ROWS][TOGETHER], const uint32_t* q, int64_t ld, const BFloat16* const* keys,
                         int64_t d, int64_t count) {
#pragma GCC unroll 4
  for (int i = 0; i < TOGETHER; i++) {
    IVec k = pairs(keys[i] + d, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
      sums[r][i] = Dot::multiply_add(of_bits(k), load<Vec>(q + r * ld + d / 2), sums[r][i]);
  }
}
#endif

// Products of `ROWS` rows of q ([ROWS][ld] floats, or pairs in half of that) with keys: to[r * DECODE_STEP + j].
template <int ROWS, class T>
inline void dot_keys(const float* q, int64_t ld, HeadRows k, int64_t dim, float* to, Ahead ahead) {
  auto query = reinterpret_cast<const QueryWord<T>*>(q);
  for (int64_t j = 0; j < k.count(); j += TOGETHER) {
    const T* rows[TOGETHER];
    Vec sums[ROWS][TOGETHER] = {};
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) {
      rows[i] = k.at<T>(j + i < k.count() ? j + i : k.count() - 1);
      ahead.fetch(dim * int64_t(sizeof(T)));
    }
    int64_t d = 0;
    for (; d + WIDE <= dim; d += WIDE) add_products<ROWS>(sums, query, ld, rows, d, WIDE);
    if (d < dim) add_products<ROWS>(sums, query, ld, rows, d, dim - d);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) store_sums(to + r * DECODE_STEP + j, sums[r]);
  }
}

// out[r] += sum_j w[r][j] v_j for the elements [d, d + WIDE * TIMES); `count` of the first WIDE are there.
template <int ROWS, int TIMES, class T>
inline void add_values(float* out, int64_t ld, const float* w, HeadRows v, int64_t count, Ahead& ahead,
                       int64_t d) {
  Vec sums[ROWS][2 * TIMES] = {};
  Ahead next = ahead;  // in registers
  for (int64_t j = 0; j < v.count(); j++) {
    const T* row = v.at<T>(j) + d;
    next.fetch(WIDE * TIMES * int64_t(sizeof(T)));
#pragma GCC unroll 4
    for (int i = 0; i < TIMES; i++) {
      Halves x = halves(row + i * WIDE, count);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        sums[r][2 * i] += x.first * w[r * DECODE_STEP + j];
        sums[r][2 * i + 1] += x.second * w[r * DECODE_STEP + j];
      }
    }
  }
  ahead = next;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * TIMES; i++) {
      float* to = out + r * ld + d + i * LANES;
      store(to, load<Vec>(to) + sums[r][i]);
    }
}

// Which of the next `count` keys are kept, as lanes of all bits or none.
inline IVec kept_lanes(const int32_t* kept, int64_t count) {
  if (count >= LANES) return load<IVec>(kept) != splat(0);
  int32_t lanes[LANES] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = kept[i];
  return load<IVec>(lanes) != splat(0);
}

// `ROWS` rows from `q` on, keys [first, first + keys): logits, weights, sums.
template <int ROWS, class T>
inline void decode_step(const Problem& p, const Softcap& c, const float* q, int64_t ld, HeadRows k, HeadRows v,
                        int64_t first, const Ahead& next_values, Ahead next_keys, const int32_t* lo, const int32_t* hi,
                        const int32_t* kept, float* out, float* total, float* peak) {
  alignas(64) float w[ROWS * DECODE_STEP];
  const int64_t keys = k.count();
  dot_keys<ROWS, T>(q, ld, k, p.dim, w, next_values);
  for (int r = 0; r < ROWS; r++) {
    float* x = w + r * DECODE_STEP;
    IVec from = splat(lo[r]), to = splat(hi[r]);
    Vec most = splat(peak[r]), sums{};
    for (int64_t j = 0; j < keys; j += LANES) {
      IVec number = lane_numbers() + int32_t(first + j);
      IVec shown = (number >= from) & (number < to) & (number < splat(int32_t(first + keys)));
      if (kept) shown &= kept_lanes(kept + first + j, keys - j);
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
  int64_t d = 0;
  for (; d + 2 * WIDE <= p.dim; d += 2 * WIDE)
    add_values<ROWS, 2, T>(out, ld, w, v, WIDE, next_keys, d);
  for (; d < p.dim; d += WIDE) add_values<ROWS, 1, T>(out, ld, w, v, p.dim - d, next_keys, d);
}

// The sums of one task: for each row [ld] of w_j v_j, then [rows] of w_j, then [rows] references of the weights.
struct PartialSums {
  float *out, *total, *peak;
  PartialSums(float* sums, int64_t rows, int64_t ld) : out(sums), total(sums + rows * ld), peak(total + rows) {}
  static int64_t size(int64_t rows, int64_t ld) { return rows * (ld + 2); }
};

// All rows and key heads of a batch row over the keys [from, to). `queries` [kv_heads][rows][ld]; a key head's sums lie
// `step` floats after those of the head before.
template <class T>
void decode_keys(const Problem& p, const Tensors& t, const Softcap& cap, int64_t batch, int64_t from, int64_t to,
                 const float* queries, float* sums, int64_t step) {
  int64_t rows = p.heads / p.kv_heads * p.q_len, ld = round_up(p.dim, WIDE);
  int32_t lo[MOST_ROWS], hi[MOST_ROWS];
  const int32_t* kept = t.kept ? t.kept + (p.edge_stride ? batch * p.kv_len : 0) : nullptr;
  // Outside of all rows' keys there is nothing to read.
  int64_t least = to, past = from;
  for (int64_t r = 0; r < rows; r++) {
    Range seen = visible(p, t, batch, r % p.q_len);
    lo[r] = int32_t(seen.lo);
    hi[r] = int32_t(seen.hi);
    if (lo[r] >= hi[r]) continue;
    least = seen.lo < least ? seen.lo : least;
    past = seen.hi > past ? seen.hi : past;
  }
  from = least > from ? least : from;
  to = past < to ? past : to;
  for (int64_t head = 0; head < p.kv_heads; head++) {
    PartialSums own(sums + head * step, rows, ld);
    std::memset(own.out, 0, rows * (ld + 1) * sizeof(float));
    for (int64_t r = 0; r < rows; r++) own.peak[r] = cap.bounded ? 0 : -INFINITY;
  }
  // Heads that lie side by side are taken together, through the second cache.
  const bool together = p.k.head < p.k.row && p.v.head < p.v.row;
  const int64_t bytes = p.dim * int64_t(sizeof(T)), most = together ? HEADS_TOGETHER : 1;
  int64_t step_keys = STEP_BYTES < LANES * bytes ? LANES : STEP_BYTES / bytes / LANES * LANES;
  if (step_keys > DECODE_STEP || (p.fetch == LONG_TO_SECOND && !together)) step_keys = DECODE_STEP;
  const bool to_first = p.fetch == SHORT_TO_FIRST && !together && step_keys * bytes <= STEP_BYTES;
  // The step from key j on.
  auto find_rows = [&](Rows& rows, const void* base, const Strides& strides, int64_t head, int64_t j) {
    rows.count = to - j < step_keys ? to - j : step_keys;
    int64_t left = 0;  // of a page
    for (int64_t row = 0; row < rows.count; row++, left--) {
      if (left > 0) {
        rows.starts[row] = rows.starts[row - 1] + strides.row * int64_t(sizeof(T));
      } else {
        rows.starts[row] = key_at(base, p, t, strides, batch, head, j + row);
        left = t.table ? p.page_size - (j + row) % p.page_size : rows.count;
      }
    }
  };
  // Pages lie anywhere, and a processor needs several reads of memory to find where: the first and the last byte of
  // those that begin in the step from key j on.
  auto find_pages = [&](const void* base, const Strides& strides, int64_t head, int64_t j) {
    const int64_t end = to - j < step_keys ? to : j + step_keys;
    const int64_t keys = p.page_size < step_keys ? p.page_size : step_keys;
    for (int64_t key = round_up(j, p.page_size); key < end; key += p.page_size) {
      const char* first = key_at(base, p, t, strides, batch, head, key);
      __builtin_prefetch(first, 0, 2);
      __builtin_prefetch(first + keys * strides.row * int64_t(sizeof(T)) - 1, 0, 2);
    }
  };
  const int64_t k_step = p.k.head * int64_t(sizeof(T)), v_step = p.v.head * int64_t(sizeof(T));
  const Ahead none;
  Rows steps[2][2];  // this step's and the next one's keys and values
  for (int64_t head = 0; head < p.kv_heads; head += most) {
    const int64_t heads = p.kv_heads - head < most ? p.kv_heads - head : most;
    find_rows(steps[0][0], t.k, p.k, head, from);
    find_rows(steps[0][1], t.v, p.v, head, from);
    for (int64_t j = from, now = 0; j < to; j += steps[now][0].count, now = 1 - now) {
      const Rows &k = steps[now][0], &v = steps[now][1];
      Rows &next_k = steps[1 - now][0], &next_v = steps[1 - now][1];
      find_rows(next_k, t.k, p.k, head, j + k.count);
      find_rows(next_v, t.v, p.v, head, j + k.count);
      if (t.table) {
        find_pages(t.k, p.k, head, j + 2 * step_keys);
        find_pages(t.v, p.v, head, j + 2 * step_keys);
      }
      for (int64_t n = 0; n < heads; n++) {
        const int64_t place = head + n, share = n * next_k.count;
        const Ahead keys(next_k, heads, bytes, k_step, share, to_first);
        const Ahead values(next_v, heads, bytes, v_step, share, to_first);
        PartialSums own(sums + place * step, rows, ld);
        for (int64_t r = 0; r < rows;) {
          auto take = [&](auto step, int64_t many) {
            step(p, cap, queries + (place * rows + r) * ld, ld, HeadRows{k, n * k_step}, HeadRows{v, n * v_step}, j,
                 r == 0 ? values : none, r == 0 ? keys : none, lo + r, hi + r, kept, own.out + r * ld, own.total + r,
                 own.peak + r);
            r += many;
          };
          if (ROWS_AT_ONCE == 4 && rows - r >= 4)
            take(decode_step<ROWS_AT_ONCE, T>, 4);
          else if (rows - r >= 2)
            take(decode_step<2, T>, 2);
          else
            take(decode_step<1, T>, 1);
        }
      }
    }
  }
}

// Row r of `parts` partial sums, `step` floats apart, as a row of the output; `room` holds [ld]. Returns the logsumexp.
template <class T>
float add_parts(const Problem& p, const Softcap& cap, float* sums, int64_t parts, int64_t step, int64_t r, float* room,
                T* to) {
  int64_t rows = p.heads / p.kv_heads * p.q_len, ld = round_up(p.dim, WIDE);
  float most = -INFINITY, total = 0;
  for (int64_t n = 0; n < parts; n++) {
    float peak = PartialSums(sums + n * step, rows, ld).peak[r];
    most = peak > most ? peak : most;
  }
  std::memset(room, 0, ld * sizeof(float));
  for (int64_t n = 0; n < parts; n++) {
    PartialSums part(sums + n * step, rows, ld);
    float factor = part.peak[r] == most ? 1.0f : std::exp(part.peak[r] - most);
    total += factor * part.total[r];
    for (int64_t d = 0; d < ld; d += LANES)
      store(room + d, load<Vec>(room + d) + load<Vec>(part.out + r * ld + d) * factor);
  }
  float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < p.dim; d += WIDE)
    narrow(to + d, Halves{load<Vec>(room + d) * inverse, load<Vec>(room + d + LANES) * inverse}, p.dim - d);
  return total == 0 ? -INFINITY : (cap.bounded ? 0.0f : most) + std::log(total);
}

// A row of q as `add_products` reads it.
inline void lay_out(uint32_t* to, const BFloat16* row, int64_t dim, int64_t ld) {
  along(to, row, BFLOAT16, dim, ld / 2);
}

template <class T>
void lay_out(float* to, const T* row, int64_t dim, int64_t ld) {
  for (int64_t d = 0; d < ld; d += WIDE) {
    Halves x = halves(row + d, dim - d);
    store(to + d, x.first);
    store(to + d + LANES, x.second);
  }
}

// The keys that any row may see.
inline Range seen_by_any(const Problem& p, const Tensors& t) {
  Range span{p.kv_len, 0};
  for (int64_t batch = 0; batch < (t.lo ? p.batch : 1); batch++)
    for (int64_t row = 0; row < p.q_len; row++) {
      Range seen = visible(p, t, batch, row);
      if (seen.lo < seen.hi) span.include(seen);
    }
  return span.lo < span.hi ? span : Range{0, 0};
}

// For problems of at most MOST_ROWS rows.
template <class T>
bool decode(const Problem& p, const Tensors& t) {
  const Softcap cap(p);
  int64_t group = p.heads / p.kv_heads, rows = group * p.q_len, places = p.batch * p.kv_heads;
  int64_t ld = round_up(p.dim, WIDE), one = PartialSums::size(rows, ld);
  const Range span = seen_by_any(p, t);
  // Parts enough for the threads, none of them too short to be worth its sums.
  int64_t most = ((span.hi - span.lo) * p.kv_heads + 4 * DECODE_STEP - 1) / (4 * DECODE_STEP);
  int64_t parts = (4 * p.threads + p.batch - 1) / p.batch;
  parts = parts > most ? most : parts;
  if (parts < 1) parts = 1;
  int64_t size = round_up((span.hi - span.lo + parts - 1) / parts, LANES);
  Scratch<float> sums(places * parts * one);
  Scratch<float> queries(places * rows * ld);
  if (sums.missing() || queries.missing()) return false;
  // Row i of all: of key head `place`, its row r, which is row `row` of query head `head`.
  auto row_of = [&](int64_t i, auto use) {
    int64_t place = i / rows, r = i % rows;
    use(place, r, place / p.kv_heads, place % p.kv_heads * group + r / p.q_len, r % p.q_len);
  };
  const Team team(p.threads);
  team.run([&] {
    team.deal(places * rows, [&](int64_t i) {
      row_of(i, [&](int64_t, int64_t, int64_t batch, int64_t head, int64_t row) {
        auto from = reinterpret_cast<const T*>(at(t.q, p, p.q, batch, head, row));
        lay_out(reinterpret_cast<QueryWord<T>*>(queries + i * ld), from, p.dim, ld);
      });
    });
    team.each(p.batch * parts, [&](int64_t i) {
      int64_t batch = i / parts, part = i % parts, from = span.lo + part * size, first = batch * p.kv_heads;
      int64_t to = from + size < span.hi ? from + size : span.hi;
      decode_keys<T>(p, t, cap, batch, from, to, queries + first * rows * ld, sums + (first * parts + part) * one,
                     parts * one);
    });
    team.deal(places * rows, [&](int64_t i) {
      row_of(i, [&](int64_t place, int64_t r, int64_t batch, int64_t head, int64_t row) {
        auto to = reinterpret_cast<T*>(at(t.out, p, p.out, batch, head, row));
        float* room = queries + i * ld;  // no longer needed
        float lse = add_parts(p, cap, sums + place * parts * one, parts, one, r, room, to);
        if (t.lse) t.lse[(batch * p.heads + head) * p.q_len + row] = lse;
      });
    });
  });
  return true;
}

}  // namespace softcap
