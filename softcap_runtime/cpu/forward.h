// Forward: out = softmax(cap * tanh(scale * q k^T / cap)) v over the visible keys, and the logsumexp.
//
// A task is a block of query rows of one key head, all query heads of its group together, as the lanes of vectors.
// A chunk of keys at a time: S^T = K Q^T, the weights P^T = e^logit in float32, O^T += V^T P^T. A row's keys then lie
// along one lane, so sums over keys, maxima and masks need no work across lanes. Where the cap bounds the logits the
// weights are e^logit as it stands; otherwise they follow a running maximum, by which O^T is scaled.
#pragma once

#include <atomic>
#include <cmath>

#include "packing.h"
#include "problem.h"
#include "team.h"

namespace softcap {

// Keys a chunk, and keys whose weights are made while their products are in the first cache.
constexpr int64_t CHUNK = 512, STEP = 64;

// The keys that rows of a call see, from the first to the last one: those of each block of rows, and of each batch entry.
// The others may hold anything, NaN too: they are taken for zeros, as a weight of 0 would not silence a NaN.
class SeenKeys {
 public:
  SeenKeys(const Problem& p, const Tensors& t, const RowBlocks& blocks)
      : rows_(blocks.rows_each),
        count_(blocks.row_blocks),
        step_(p.edge_stride ? count_ + 1 : 0),
        ranges_((p.edge_stride ? p.batch : 1) * (count_ + 1)) {
    if (missing()) return;
    for (int64_t batch = 0; batch < (p.edge_stride ? p.batch : 1); batch++) {
      Range* of = ranges_ + batch * step_;
      for (int64_t n = 0; n <= count_; n++) of[n] = {p.kv_len, 0};
      for (int64_t i = 0; i < p.q_len; i++) {
        Range seen = visible(p, t, batch, i);
        if (seen.lo >= seen.hi) continue;
        of[i / rows_].include(seen);
        of[count_].include(seen);
      }
    }
  }
  bool missing() const { return ranges_.missing(); }
  Range of_block(const RowBlock& block) const { return ranges_[block.batch * step_ + block.first / rows_]; }
  Range of_batch(int64_t batch) const { return ranges_[batch * step_ + count_]; }

 private:
  const int64_t rows_, count_, step_;
  Scratch<Range> ranges_;
};

// k and v of one call as operands, chunk by chunk: K [CHUNK][words], V^T [padded dim][CHUNK / PAIR].
template <class A>
class PackedKeys {
  using Word = typename A::Word;

 public:
  PackedKeys(const Problem& p, const SeenKeys& seen)
      : p_(p),
        seen_(seen),
        size(p.kv_len < CHUNK ? round_up(p.kv_len, A::PAD * A::PAIR) : CHUNK),
        words(round_up(p.dim, A::PAD * A::PAIR) / A::PAIR),
        dim(round_up(p.dim, A::PAD)),
        chunks((p.kv_len + size - 1) / size),
        keys_(p.batch * p.kv_heads * chunks * size * words),
        values_(p.batch * p.kv_heads * chunks * dim * (size / A::PAIR)) {}

  bool missing() const { return keys_.missing() || values_.missing(); }
  const Word* keys(int64_t place, int64_t chunk) const { return keys_ + (place * chunks + chunk) * size * words; }
  const Word* values(int64_t place, int64_t chunk) const {
    return values_ + (place * chunks + chunk) * dim * (size / A::PAIR);
  }

  // Pack one chunk of key head `place` (batch * kv_heads + head); `room` has LANES rows of `dim` words.
  void pack(const Tensors& t, int64_t place, int64_t chunk, Word* room) const {
    int64_t batch = place / p_.kv_heads, head = place % p_.kv_heads, first = chunk * size;
    Word* to = keys_ + (place * chunks + chunk) * size * words;
    const Range seen = seen_.of_batch(batch);
    if (first >= seen.hi || first + size <= seen.lo) return;  // no task reads it
    auto row = [&](const void* base, const Strides& strides, int64_t j) -> const void* {
      bool there = first + j >= seen.lo && first + j < seen.hi && is_kept(p_, t, batch, first + j);
      return there ? at(base, p_, strides, batch, head, first + j) : nullptr;
    };
    for (int64_t j = 0; j < size; j++) along(to + j * words, row(t.k, p_.k, j), p_.dtype, p_.dim, words);
    to = values_ + (place * chunks + chunk) * dim * (size / A::PAIR);
    across_turned<A>(to, size, [&](int64_t j) { return row(t.v, p_.v, j); }, p_.dtype, p_.dim, dim, room);
  }

 private:
  const Problem& p_;
  const SeenKeys& seen_;

 public:
  const int64_t size, words, dim, chunks;

 private:
  Scratch<Word> keys_, values_;
};

inline Vec capped_logit(const Softcap& c, Vec s) {
  return c.capped ? c.cap * hyperbolic_tangent<false>(s * c.inner).value : s * c.inner;
}

inline Vec hide(Vec x, int32_t key, IVec lo, IVec hi, Vec otherwise) {
  IVec j = splat(key);
  return select((j >= lo) & (j < hi), x, otherwise);
}

// S^T [keys][lanes] into logits, hidden ones -inf; `peak` gains each lane's largest.
SOFTCAP_ONCE inline void make_logits(const Softcap& c, float* s, int64_t lanes, int64_t first, int64_t keys, const Edges& e,
                        float* peak) {
  for (int64_t v = 0; v < lanes; v += LANES) {
    IVec lo = load<IVec>(e.lo + v), hi = load<IVec>(e.hi + v);
    Vec most = load<Vec>(peak + v);
    for (int64_t j = 0; j < keys; j++) {
      Vec x = hide(capped_logit(c, load<Vec>(s + j * lanes + v)), e.number(first + j), lo, hi, splat(-INFINITY));
      store(s + j * lanes + v, x);
      most = select(x > most, x, most);
    }
    store(peak + v, most);
  }
}

inline void store_weights(float* to, Vec* weights) { store(to, weights[0]); }
inline void store_weights(uint32_t* to, Vec* weights) {
  store(to, ((UVec)weights[0] >> 16) | (UVec)weights[1]);
}

// P^T from S^T: [keys / PAIR][lanes] words, e^(logit - peak); `total` gains each lane's sum, of what the next product
// reads. Sums are taken STEP keys at a time: shorter sums leave less rounding.
template <class A, bool READY, bool MASKED>
SOFTCAP_ONCE inline void make_weights(const Softcap& c, typename A::Word* to, const float* s, int64_t lanes, int64_t first,
                         int64_t keys, const Edges& e, const float* peak, float* total) {
  for (int64_t v = 0; v < lanes; v += LANES) {
    IVec lo = load<IVec>(e.lo + v), hi = load<IVec>(e.hi + v);
    Vec reference = READY ? load<Vec>(peak + v) : Vec{};
    Vec sum{};
    for (int64_t j = 0; j < keys; j += A::PAIR) {
      Vec weights[A::PAIR];
      for (int i = 0; i < A::PAIR; i++) {
        Vec x = load<Vec>(s + (j + i) * lanes + v);
        Vec w = READY ? exponential(x - reference) : exponential(capped_logit(c, x));
        if (MASKED) w = hide(w, e.number(first + j + i), lo, hi, Vec{});
        if (A::PAIR == 2) w = of_bits(rounded_to_bfloat16(w));
        weights[i] = w;
        sum += w;
      }
      store_weights(to + j / A::PAIR * lanes + v, weights);
    }
    store(total + v, load<Vec>(total + v) + sum);
  }
}

// One thread's memory, and the work on one block.
template <class A>
class ForwardTask {
  using Word = typename A::Word;

 public:
  ForwardTask(const Problem& p, const Tensors& t, const PackedKeys<A>& keys, int64_t most)
      : p_(p),
        t_(t),
        keys_(keys),
        cap_(p),
        rows_(most * keys.words),
        q_(most * keys.words),
        s_(keys.size * most),
        weights_(A::PAIR == 1 ? 1 : keys.size / A::PAIR * most),
        out_(most * keys.dim),
        turned_(most * keys.dim),
        numbers_(5 * most) {}

  bool missing() const {
    return rows_.missing() || q_.missing() || s_.missing() || weights_.missing() || out_.missing() ||
           turned_.missing() || numbers_.missing();
  }

  void run(const RowBlock& block) {
    int64_t lanes = round_up(block.lanes(), A::PAD);
    float *total = numbers_, *peak = total + lanes, *shift = peak + lanes;
    Edges edges{reinterpret_cast<int32_t*>(shift + lanes), reinterpret_cast<int32_t*>(shift + 2 * lanes), {}, {}, {}, {}};
    edges.read(p_, t_, block, lanes);
    for (int64_t r = 0; r < lanes; r++) {
      total[r] = 0;
      peak[r] = cap_.bounded ? 0 : -INFINITY;
    }
    pack_queries(block, lanes);
    bool first = true;
    int64_t place = block.batch * p_.kv_heads + block.kv_head;
    for (int64_t c = edges.any.lo / keys_.size; c * keys_.size < edges.any.hi; c++) {
      attend(place, c, lanes, edges, total, peak, shift, first);
      first = false;
    }
    if (first) std::memset(out_, 0, keys_.dim * lanes * sizeof(float));
    finish(block, lanes, total, peak);
  }

 private:
  void pack_queries(const RowBlock& block, int64_t lanes) {
    for (int64_t r = 0; r < lanes; r++)
      along(rows_ + r * keys_.words, block.row(t_.q, p_, p_.q, r), p_.dtype, p_.dim, keys_.words);
    transpose<Word>(q_, lanes, rows_, keys_.words, lanes, keys_.words);
  }

  // One chunk: the keys of it that any lane sees, out to whole words and tiles.
  void attend(int64_t place, int64_t chunk, int64_t lanes, const Edges& e, float* total, float* peak, float* shift,
              bool first) {
    constexpr int64_t WHOLE = A::PAD * A::PAIR;
    int64_t start = chunk * keys_.size;
    int64_t lo = (e.any.lo > start ? e.any.lo - start : 0) / WHOLE * WHOLE;
    int64_t hi = round_up(e.any.hi < start + keys_.size ? e.any.hi - start : keys_.size, WHOLE);
    const Word* k = keys_.keys(place, chunk);
    Word* weights = A::PAIR == 1 ? reinterpret_cast<Word*>(static_cast<float*>(s_)) : static_cast<Word*>(weights_);
    if (!cap_.bounded) {
      for (int64_t r = 0; r < lanes; r++) shift[r] = peak[r];
      A::multiply(s_, lanes, k + lo * keys_.words, keys_.words, q_, lanes, hi - lo, lanes, keys_.words, false);
      make_logits(cap_, s_, lanes, start + lo, hi - lo, e, peak);
      follow_peak(lanes, total, peak, shift, first);
    }
    for (int64_t j = lo; j < hi; j += STEP) {
      int64_t count = hi - j < STEP ? hi - j : STEP;
      float* s = A::PAIR == 1 || !cap_.bounded ? s_ + (j - lo) * lanes : static_cast<float*>(s_);
      Word* to = weights + (j - lo) / A::PAIR * lanes;
      if (cap_.bounded) {
        A::multiply(s, lanes, k + j * keys_.words, keys_.words, q_, lanes, count, lanes, keys_.words, false);
        auto make = e.whole(start + j, start + j + count) ? make_weights<A, false, false> : make_weights<A, false, true>;
        make(cap_, to, s, lanes, start + j, count, e, peak, total);
      } else {
        make_weights<A, true, false>(cap_, to, s, lanes, start + j, count, e, shift, total);
      }
    }
    A::multiply(out_, lanes, keys_.values(place, chunk) + lo / A::PAIR, keys_.size / A::PAIR, weights, lanes,
                keys_.dim, lanes, (hi - lo) / A::PAIR, !first);
  }

  // The running maximum has grown from `shift` to `peak`: scale what was summed so far. `shift` becomes the maximum
  // that weights are taken against, 0 where a row has seen no key.
  void follow_peak(int64_t lanes, float* total, const float* peak, float* shift, bool first) {
    bool same = true;
    for (int64_t v = 0; v < lanes; v += LANES) {
      Vec before = load<Vec>(shift + v), now = load<Vec>(peak + v);
      Vec factor = select(now == before, splat(1.0f), exponential(before - now));
      same = same && !any(now != before);
      store(total + v, load<Vec>(total + v) * factor);
      if (!first && any(now != before))
        for (int64_t d = 0; d < keys_.dim; d++) {
          float* at_d = out_ + d * lanes + v;
          store(at_d, load<Vec>(at_d) * factor);
        }
      store(shift + v, select(now == splat(-INFINITY), Vec{}, now));
    }
  }

  void finish(const RowBlock& block, int64_t lanes, const float* total, const float* peak) {
    transpose<float>(turned_, keys_.dim, out_, lanes, keys_.dim, lanes);
    for (int64_t r = 0; r < block.lanes(); r++) {
      int64_t head = block.head_of(r), row = block.row_of(r);
      float inverse = total[r] == 0 ? 0.0f : 1.0f / total[r];
      write_row(block.row(t_.out, p_, p_.out, r), p_.dtype, turned_ + r * keys_.dim, inverse, p_.dim);
      if (t_.lse)
        t_.lse[(block.batch * p_.heads + head) * p_.q_len + row] =
            total[r] == 0 ? -INFINITY : (cap_.bounded ? 0.0f : peak[r]) + std::log(total[r]);
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const PackedKeys<A>& keys_;
  const Softcap cap_;
  Scratch<Word> rows_, q_;
  Scratch<float> s_;
  Scratch<Word> weights_;
  Scratch<float> out_, turned_, numbers_;
};

// Returns false when there is no memory.
template <class A>
bool forward(const Problem& p, const Tensors& t) {
  const RowBlocks blocks(p, A::ROWS);
  const SeenKeys seen(p, t, blocks);
  const PackedKeys<A> keys(p, seen);
  if (seen.missing() || keys.missing()) return false;
  int64_t places = p.batch * p.kv_heads;
  std::atomic<bool> enough{true};
  const Team team(p.threads);
  team.run([&] {
    Scratch<typename A::Word> room(LANES * keys.dim);
    ForwardTask<A> task(p, t, keys, round_up(blocks.lanes(), A::PAD));
    if (room.missing() || task.missing()) enough = false;
    team.wait();
    if (!enough) return;
    A::begin();
    team.each(places * keys.chunks, [&](int64_t i) { keys.pack(t, i / keys.chunks, i % keys.chunks, room); });
    team.each(places * blocks.per_place,
              [&](int64_t i) { task.run(blocks.block(p, i / blocks.per_place, i % blocks.per_place)); });
    A::end();
  });
  return enough;
}

}  // namespace softcap
