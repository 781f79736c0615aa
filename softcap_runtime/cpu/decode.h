// Few query rows over many keys: decoding. Bound by memory, so k and v are read once for all rows of a group, as they
// lie, and long keys are split over threads.
//
// A part of the keys gives sum_j w_j v_j, sum_j w_j and the reference of its weights; parts are added in order. A task
// walks over its keys step by step, all key heads of a step before the next: in a cache [B, S, H, D] those are
// neighbours. While it multiplies a step's keys it fetches their values, and with the values the next keys: into the
// second cache, by long steps; or into the first, with steps short enough for both to stay there. Which is faster, a
// build measures: into the second the same keys took 1.1 to 1.7 times as long on a core of Zen 5 (48 KiB), 0.5 times on
// one of Zen 4 (32 KiB). Long rows, and rows that lie apart in one long run, which fall on few sets of the first cache,
// always go to the second.
#pragma once

#include <type_traits>

#include "forward.h"

namespace softcap {

// Rows (query heads of a group times query rows) that are always taken here, and at most. Keys whose logits are made at
// once, at most, and the bytes of theirs that make fewer do.
constexpr int64_t FEW_ROWS = 8, MOST_ROWS = 64, DECODE_STEP = 64, STEP_BYTES = 8192;
// Keys that a page holds at the least; the shift of a run that is a whole step.
constexpr int64_t FEWEST = 16, LONGEST_RUN = 6;
static_assert(1 << LONGEST_RUN == DECODE_STEP, "a step is one run at most");
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

// Rows of keys or values of one head, for one step: `count` of them, in runs of `1 << shift` that lie in a page each.
struct Rows {
  const char* starts[DECODE_STEP / FEWEST];  // where row 0 would be if all lay as run i does
  int64_t offset;                            // of the head, in bytes
  int64_t stride, shift, count;              // in bytes; rows
  bool near;                                 // fetch into the first cache, not the second
  template <class T = char>
  const T* at(int64_t row) const {
    return reinterpret_cast<const T*>(starts[row >> shift] + offset + row * stride);
  }
  // Bytes [from, to) of a row. Inlined by force: GCC takes a function that only fetches for one without effects, and
  // drops its calls.
  __attribute__((always_inline)) void fetch(int64_t row, int64_t from, int64_t to) const {
    if (row >= count) return;
    const char* start = at(row);
    if (near)
      for (int64_t byte = from; byte < to; byte += 64) __builtin_prefetch(start + byte, 0, 3);
    else
      for (int64_t byte = from; byte < to; byte += 64) __builtin_prefetch(start + byte, 0, 2);
  }
};

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
inline void dot_keys(const float* q, int64_t ld, const Rows& k, int64_t dim, float* to, const Rows& ahead) {
  auto query = reinterpret_cast<const QueryWord<T>*>(q);
  for (int64_t j = 0; j < k.count; j += TOGETHER) {
    const T* rows[TOGETHER];
    Vec sums[ROWS][TOGETHER] = {};
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) {
      rows[i] = k.at<T>(j + i < k.count ? j + i : k.count - 1);
      ahead.fetch(j + i, 0, dim * int64_t(sizeof(T)));
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
inline void add_values(float* out, int64_t ld, const float* w, const Rows& v, int64_t count, const Rows& ahead,
                       int64_t d) {
  Vec sums[ROWS][2 * TIMES] = {};
  for (int64_t j = 0; j < v.count; j++) {
    const T* row = v.at<T>(j) + d;
    ahead.fetch(j, d * int64_t(sizeof(T)), (d + WIDE * TIMES) * int64_t(sizeof(T)));
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
inline void decode_step(const Problem& p, const Softcap& c, const float* q, int64_t ld, const Rows& k, const Rows& v,
                        int64_t first, const Rows& values, const Rows& next_keys, const int32_t* lo, const int32_t* hi,
                        const int32_t* kept, float* out, float* total, float* peak) {
  alignas(64) float w[ROWS * DECODE_STEP];
  const int64_t keys = k.count;
  dot_keys<ROWS, T>(q, ld, k, p.dim, w, values);
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
  int64_t step_keys = STEP_BYTES / (p.dim * int64_t(sizeof(T))) / LANES * LANES;
  const bool near = p.near && step_keys > 0 && (t.table || (p.k.row == p.dim && p.v.row == p.dim));
  if (!near || step_keys > DECODE_STEP) step_keys = DECODE_STEP;
  // A step from key j: whole pages, several where they are short, or the rest of one.
  auto rows_at = [&](const void* base, const Strides& strides, int64_t j) {
    Rows rows{{}, 0, strides.row * int64_t(sizeof(T)), LONGEST_RUN, to - j < step_keys ? to - j : step_keys, near};
    if (rows.count <= 0) return Rows{};
    if (t.table) {
      int64_t rest = p.page_size - j % p.page_size;
      if (rest < p.page_size || p.page_size >= DECODE_STEP)
        rows.count = rest < rows.count ? rest : rows.count;
      else
        rows.shift = __builtin_ctzll(p.page_size);
    }
    for (int64_t run = 0; run << rows.shift < rows.count; run++) {
      int64_t first = run << rows.shift;
      rows.starts[run] = key_at(base, p, t, strides, batch, 0, j + first) - first * rows.stride;
    }
    return rows;
  };
  const Rows none{};
  for (Rows k = rows_at(t.k, p.k, from), v = rows_at(t.v, p.v, from); k.count > 0;) {
    const int64_t j = from;
    from += k.count;
    const Rows next[] = {rows_at(t.k, p.k, from), rows_at(t.v, p.v, from)};
    // The next step's rows may lie in other pages of memory, whose addresses take as long to find as a line to come.
    if (near)
      for (const Rows& rows : next)
        for (int64_t row = 0; row < rows.count; row++) rows.fetch(row, 0, 1);
    for (int64_t head = 0; head < p.kv_heads; head++) {
      v.offset = head * p.v.head * int64_t(sizeof(T));
      k.offset = head * p.k.head * int64_t(sizeof(T));
      Rows ahead = head + 1 < p.kv_heads ? k : next[0];
      if (head + 1 < p.kv_heads) ahead.offset += p.k.head * int64_t(sizeof(T));
      PartialSums own(sums + head * step, rows, ld);
      for (int64_t r = 0; r < rows;) {
        auto take = [&](auto step, int64_t count) {
          step(p, cap, queries + (head * rows + r) * ld, ld, k, v, j, r == 0 ? v : none, r == 0 ? ahead : none, lo + r,
               hi + r, kept, own.out + r * ld, own.total + r, own.peak + r);
          r += count;
        };
        if (ROWS_AT_ONCE == 4 && rows - r >= 4)
          take(decode_step<ROWS_AT_ONCE, T>, 4);
        else if (rows - r >= 2)
          take(decode_step<2, T>, 2);
        else
          take(decode_step<1, T>, 1);
      }
    }
    k = next[0], v = next[1];
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
