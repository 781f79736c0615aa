// Backward: gradients of q, k and v from the forward's output and logsumexp, the weights computed again.
//
// With logit = cap * tanh(scale * s / cap): p = e^(logit - lse), delta = sum_d grad_out * out,
// ds = scale * p * (grad_p - delta) * (1 - tanh^2). A task holds one key head and every `stride`-th chunk of its keys;
// it walks over the query rows that see a chunk, so dk and dv are sums of its own, in a fixed order: results are the
// same from run to run for one number of threads. dq is summed in a buffer of the task; where a key head has several
// tasks their buffers are added at the end.
//
// Of each block: S^T = K Q^T, G^T = V dO^T, then dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T.
#pragma once

#include "forward.h"

namespace softcap {

// Keys of a chunk, whose dk and dv stay in the second cache.
constexpr int64_t BACKWARD_CHUNK = 512;

// P^T and dS^T as factors of dV and dK: [keys][lanes / PAIR], words along the lanes.
inline void store_along(float* to, Vec x) { store(to, x); }
inline void store_along(uint32_t* to, Vec x) { narrow(reinterpret_cast<BFloat16*>(to), x); }

// From S^T and G^T [keys][lanes]: `p` and `ds_along` as above, `ds_across` [keys / PAIR][lanes] as a factor of dQ^T.
// In float32 all of them are one layout, and lie where S^T and G^T lay.
template <class A, bool MASKED>
SOFTCAP_ONCE inline void make_gradients(const Softcap& c, const float* s, const float* g, typename A::Word* p,
                           typename A::Word* ds_along, typename A::Word* ds_across, int64_t lanes, int64_t first,
                           int64_t keys, const Edges& e, const float* lse, const float* delta) {
  for (int64_t v = 0; v < lanes; v += LANES) {
    IVec lo = load<IVec>(e.lo + v), hi = load<IVec>(e.hi + v);
    Vec sum = load<Vec>(lse + v), mean = load<Vec>(delta + v);
    for (int64_t j = 0; j < keys; j += A::PAIR) {
      Vec slopes[A::PAIR];
      for (int i = 0; i < A::PAIR; i++) {
        int64_t place = (j + i) * lanes + v;
        Vec raw = load<Vec>(s + place), logit = raw * c.inner, slope = splat(c.scale);
        if (c.capped) {
          Tanh bounded = hyperbolic_tangent<true>(logit);
          logit = c.cap * bounded.value;
          slope = slope * bounded.slope;
        }
        logit = logit - sum;
        // Hidden before the exponential: a hidden logit may lie far above the row's logsumexp, and inf * 0 is NaN.
        if (MASKED) logit = hide(logit, e.number(first + j + i), lo, hi, splat(-INFINITY));
        Vec weight = exponential(logit);
        Vec ds = weight * (load<Vec>(g + place) - mean) * slope;
        if (MASKED) ds = hide(ds, e.number(first + j + i), lo, hi, Vec{});
        store_along(p + ((j + i) * lanes + v) / A::PAIR, weight);
        store_along(ds_along + ((j + i) * lanes + v) / A::PAIR, ds);
        if (A::PAIR == 2) slopes[i] = of_bits(rounded_to_bfloat16(ds));
      }
      if (A::PAIR == 2) store_weights(ds_across + j / A::PAIR * lanes + v, slopes);
    }
  }
}

template <class A>
class BackwardTask {
  using Word = typename A::Word;
  static constexpr int64_t WHOLE = A::PAD * A::PAIR, STEP = A::STEP;

 public:
  BackwardTask(const Problem& p, const Tensors& t, const Gradients& g, const SeenKeys& seen, const float* delta,
               int64_t most)
      : p_(p),
        t_(t),
        seen_(seen),
        g_(g),
        delta_of_(delta),
        cap_(p),
        chunk(chunk_of(p)),
        dim_(round_up(p.dim, A::PAD)),
        words_(round_up(p.dim, WHOLE) / A::PAIR),
        wide_(dim_ + 16),
        most_(most),
        k_(chunk * words_),
        v_(chunk * words_),
        k_turned_(chunk / A::PAIR * dim_),
        room_((most > LANES ? most : LANES) * (words_ > dim_ ? words_ : dim_)),
        q_(most * words_),
        grad_(most * words_),
        q_across_(most / A::PAIR * wide_),
        grad_across_(most / A::PAIR * wide_),
        s_(STEP * most),
        dp_(STEP * most),
        p_along_(A::PAIR == 1 ? 1 : STEP * most / 2),
        ds_along_(A::PAIR == 1 ? 1 : STEP * most / 2),
        ds_across_(A::PAIR == 1 ? 1 : STEP * most / 2),
        dq_(most * dim_),
        dq_turned_(most * dim_),
        dk_(chunk * dim_),
        dv_(chunk * dim_),
        numbers_(4 * most) {}

  bool missing() const {
    return k_.missing() || v_.missing() || k_turned_.missing() || room_.missing() || q_.missing() ||
           grad_.missing() || q_across_.missing() || grad_across_.missing() || s_.missing() || dp_.missing() ||
           p_along_.missing() || ds_along_.missing() || ds_across_.missing() || dq_.missing() ||
           dq_turned_.missing() || dk_.missing() || dv_.missing() || numbers_.missing();
  }

  static int64_t chunk_of(const Problem& p) {
    int64_t size = BACKWARD_CHUNK;
    while (size > STEP && size / 2 >= p.kv_len) size /= 2;
    return size;
  }

  // The keys [number * chunk, ...) of key head `place`; dq [group][q_len][dim_] gains their part.
  void run(int64_t place, int64_t number, const RowBlocks& blocks, float* dq) {
    int64_t batch = place / p_.kv_heads, head = place % p_.kv_heads, first = number * chunk;
    int64_t count = p_.kv_len - first < chunk ? p_.kv_len - first : chunk;
    pack_keys(batch, head, first);
    std::memset(dk_, 0, chunk * dim_ * sizeof(float));
    std::memset(dv_, 0, chunk * dim_ * sizeof(float));
    for (int64_t b = 0; b < blocks.per_place; b++) {
      RowBlock block = blocks.block(p_, place, b);
      const Range any = seen_.of_block(block);
      int64_t lo = any.lo > first ? any.lo - first : 0, hi = any.hi < first + count ? any.hi - first : count;
      if (lo >= hi) continue;
      int64_t lanes = round_up(block.lanes(), WHOLE);
      float *lse = numbers_, *delta = lse + most_;
      Edges edges{reinterpret_cast<int32_t*>(delta + most_), reinterpret_cast<int32_t*>(delta + 2 * most_), {}, {}, {}, {}};
      edges.read(p_, t_, block, lanes);
      pack_rows(block, lanes, lse, delta);
      differentiate(lanes, first, lo / STEP * STEP, round_up(hi, WHOLE), edges, lse, delta);
      gain(block, lanes, dq);
    }
    for (int64_t j = 0; j < count; j++) {
      write_row(at(g_.grad_k, p_, p_.grad_k, batch, head, first + j), p_.dtype, dk_ + j * dim_, 1.0f, p_.dim);
      write_row(at(g_.grad_v, p_, p_.grad_v, batch, head, first + j), p_.dtype, dv_ + j * dim_, 1.0f, p_.dim);
    }
  }

 private:
  void pack_keys(int64_t batch, int64_t head, int64_t first) {
    const Range seen = seen_.of_batch(batch);
    auto row = [&](const void* base, const Strides& strides, int64_t j) -> const void* {
      bool there = first + j >= seen.lo && first + j < seen.hi && is_kept(p_, t_, batch, first + j);
      return there ? at(base, p_, strides, batch, head, first + j) : nullptr;
    };
    for (int64_t j = 0; j < chunk; j++) {
      along(k_ + j * words_, row(t_.k, p_.k, j), p_.dtype, p_.dim, words_);
      along(v_ + j * words_, row(t_.v, p_.v, j), p_.dtype, p_.dim, words_);
    }
    auto key = [&](int64_t j) { return row(t_.k, p_.k, j); };
    across_turned<A>(k_turned_, chunk, key, p_.dtype, p_.dim, dim_, room_);
  }

  // Rows of q or grad_out: as a factor of S^T or G^T, and as one of dK or dV.
  void pack(const void* from, const Strides& strides, const RowBlock& block, int64_t lanes, Word* turned,
            Word* across_rows) {
    for (int64_t r = 0; r < lanes; r += A::PAIR) {
      const void* rows[2] = {};
      for (int64_t e = 0; e < A::PAIR; e++) {
        rows[e] = block.row(from, p_, strides, r + e);
        along(room_ + (r + e) * words_, rows[e], p_.dtype, p_.dim, words_);
      }
      across(across_rows + r / A::PAIR * wide_, rows, p_.dtype, p_.dim, dim_);
    }
    transpose<Word>(turned, lanes, room_, words_, lanes, words_);
  }

  void pack_rows(const RowBlock& block, int64_t lanes, float* lse, float* delta) {
    pack(t_.q, p_.q, block, lanes, q_, q_across_);
    pack(g_.grad_out, p_.grad_out, block, lanes, grad_, grad_across_);
    for (int64_t r = 0; r < lanes; r++) {
      bool there = r < block.lanes();
      int64_t row = there ? (block.batch * p_.heads + block.head_of(r)) * p_.q_len + block.row_of(r) : 0;
      // A row that sees nothing has the logsumexp -inf; all its weights are hidden.
      lse[r] = there && t_.lse[row] != -INFINITY ? t_.lse[row] : 0.0f;
      delta[r] = there ? delta_of_[row] : 0.0f;
    }
  }

  void differentiate(int64_t lanes, int64_t first, int64_t lo, int64_t hi, const Edges& e, const float* lse,
                     const float* delta) {
    constexpr bool IN_PLACE = A::PAIR == 1;
    Word* p = IN_PLACE ? reinterpret_cast<Word*>(static_cast<float*>(s_)) : static_cast<Word*>(p_along_);
    Word* ds = IN_PLACE ? reinterpret_cast<Word*>(static_cast<float*>(dp_)) : static_cast<Word*>(ds_along_);
    Word* ds_across = IN_PLACE ? ds : static_cast<Word*>(ds_across_);
    int64_t lane_words = lanes / A::PAIR;
    for (int64_t j = lo; j < hi; j += STEP) {
      int64_t count = hi - j < STEP ? hi - j : STEP;
      A::multiply(s_, lanes, k_ + j * words_, words_, q_, lanes, count, lanes, words_, false);
      A::multiply(dp_, lanes, v_ + j * words_, words_, grad_, lanes, count, lanes, words_, false);
      auto make = e.whole(first + j, first + j + count) ? make_gradients<A, false> : make_gradients<A, true>;
      make(cap_, s_, dp_, p, ds, ds_across, lanes, first + j, count, e, lse, delta);
      A::multiply(dv_ + j * dim_, dim_, p, lane_words, grad_across_, wide_, count, dim_, lane_words, true);
      A::multiply(dk_ + j * dim_, dim_, ds, lane_words, q_across_, wide_, count, dim_, lane_words, true);
      A::multiply(dq_, lanes, k_turned_ + j / A::PAIR, chunk / A::PAIR, ds_across, lanes, dim_, lanes,
                  count / A::PAIR, j > lo);
    }
  }

  void gain(const RowBlock& block, int64_t lanes, float* dq) {
    transpose<float>(dq_turned_, dim_, dq_, lanes, dim_, lanes);
    int64_t group = p_.heads / p_.kv_heads;
    for (int64_t r = 0; r < block.lanes(); r++) {
      float* to = dq + ((block.head_of(r) % group) * p_.q_len + block.row_of(r)) * dim_;
      for (int64_t d = 0; d < dim_; d += LANES)
        store(to + d, load<Vec>(to + d) + load<Vec>(dq_turned_ + r * dim_ + d));
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const Gradients& g_;
  const SeenKeys& seen_;
  const float* delta_of_;
  const Softcap cap_;

 public:
  const int64_t chunk;

 private:
  // Rows that are `wide_` words apart do not fall on the same lines of the first cache.
  const int64_t dim_, words_, wide_, most_;
  Scratch<Word> k_, v_, k_turned_, room_, q_, grad_, q_across_, grad_across_;
  Scratch<float> s_, dp_;
  Scratch<Word> p_along_, ds_along_, ds_across_;
  Scratch<float> dq_, dq_turned_, dk_, dv_, numbers_;
};

// delta [B, Hq, Sq]: the sums over d of grad_out * out, of the rows [first, first + LANES) of one head, in lanes.
// The terms are added in the order in which G^T is summed: where one key has all the weight, the two then cancel.
inline void make_delta(const Problem& p, const Tensors& t, const Gradients& g, int64_t batch, int64_t head,
                       int64_t first, float* room, float* delta) {
  int64_t dim = round_up(p.dim, Single::PAD), count = p.q_len - first < LANES ? p.q_len - first : LANES;
  float *rows = room, *grads = rows + LANES * dim, *outs = grads + LANES * dim;
  auto turn = [&](const void* from, const Strides& strides, float* to) {
    for (int64_t i = 0; i < LANES; i++)
      along(rows + i * dim, i < count ? at(from, p, strides, batch, head, first + i) : nullptr, p.dtype, p.dim, dim);
    transpose<float>(to, LANES, rows, dim, LANES, dim);
  };
  turn(g.grad_out, p.grad_out, grads);
  turn(t.out, p.out, outs);
  Vec total{};
  const int64_t step = part_of_logit(dim);
  for (int64_t d = 0; d < dim; d += step) {
    Vec part{};
    for (int64_t e = d; e < dim && e < d + step; e++) part += load<Vec>(grads + e * LANES) * load<Vec>(outs + e * LANES);
    total += part;
  }
  for (int64_t i = 0; i < count; i++) delta[(batch * p.heads + head) * p.q_len + first + i] = total[i];
}

// Row `r` (head of the group * q_len + row) of key head `place`: the sum of `parts` buffers `step` apart.
inline void write_grad_q(const Problem& p, const Gradients& g, int64_t place, int64_t r, float* from,
                         int64_t parts, int64_t step) {
  int64_t group = p.heads / p.kv_heads, head = place % p.kv_heads * group + r / p.q_len;
  for (int64_t i = 1; i < parts; i++)
    for (int64_t d = 0; d < p.dim; d += LANES) store(from + d, load<Vec>(from + d) + load<Vec>(from + i * step + d));
  write_row(at(g.grad_q, p, p.grad_q, place / p.kv_heads, head, r % p.q_len), p.dtype, from, 1.0f, p.dim);
}

// Returns false when there is no memory.
template <class A>
bool backward(const Problem& p, const Tensors& t, const Gradients& g) {
  const RowBlocks blocks(p, A::ROWS);
  const SeenKeys seen(p, t, blocks);
  int64_t group = p.heads / p.kv_heads, places = p.batch * p.kv_heads, dim = round_up(p.dim, A::PAD);
  int64_t chunk = BackwardTask<A>::chunk_of(p), chunks = (p.kv_len + chunk - 1) / chunk;
  // Several tasks a key head where there are fewer heads than would keep the threads busy.
  int64_t parts = (2 * p.threads + places - 1) / places;
  parts = parts < 1 ? 1 : parts > chunks ? chunks : parts;
  if (places % p.threads == 0) parts = 1;
  int64_t rows = p.batch * p.heads * p.q_len, one = group * p.q_len * dim;
  int64_t strips = (p.q_len + LANES - 1) / LANES;
  Scratch<float> delta(rows);
  Scratch<float> partial(parts > 1 ? places * parts * one : 1);
  if (seen.missing() || delta.missing() || partial.missing()) return false;
  std::atomic<bool> enough{true};
  const Team team(p.threads);
  team.run([&] {
    BackwardTask<A> task(p, t, g, seen, delta, round_up(blocks.lanes(), A::PAD * A::PAIR));
    Scratch<float> own(parts > 1 ? 1 : one), room(3 * LANES * dim);
    if (task.missing() || own.missing() || room.missing()) enough = false;
    team.wait();
    if (!enough) return;
    team.deal(p.batch * p.heads * strips, [&](int64_t i) {
      make_delta(p, t, g, i / strips / p.heads, i / strips % p.heads, i % strips * LANES, room, delta);
    });
    A::begin();
    team.each(places * parts, [&](int64_t i) {
      float* dq = parts > 1 ? partial + i * one : static_cast<float*>(own);
      std::memset(dq, 0, one * sizeof(float));
      for (int64_t c = i % parts; c < chunks; c += parts) task.run(i / parts, c, blocks, dq);
      if (parts == 1)
        for (int64_t r = 0; r < group * p.q_len; r++) write_grad_q(p, g, i, r, dq + r * dim, 1, 0);
    });
    A::end();
    if (parts > 1)
      team.deal(places * group * p.q_len, [&](int64_t r) {
        int64_t place = r / (group * p.q_len), row = r % (group * p.q_len);
        write_grad_q(p, g, place, row, partial + place * parts * one + row * dim, parts, one);
      });
  });
  return enough;
}

}  // namespace softcap
