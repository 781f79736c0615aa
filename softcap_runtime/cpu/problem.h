// What a call is given: sizes, strides, the mask and the softcap.
#pragma once

#include "vectors.h"

namespace softcap {

struct Strides {
  int64_t batch, head, row;  // in elements; the last stride is 1
};

// CpuProblem, in Python, has the same fields in the same order.
struct Problem {
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  Strides q, k, v, out;
  Strides grad_out, grad_q, grad_k, grad_v;
  // Row i sees the keys max(0, i + left) <= j < min(kv_len, i + right); with lo and hi, lo[i] <= j < hi[i].
  int64_t left, right;
  int64_t edge_stride;  // from one batch row's lo and hi to the next one's; 0 where all share one
  int64_t threads;
  int64_t arithmetic;  // of products of bfloat16: 1 Single, 2 Dot, 3 Tile; one that is not here counts as 1
  int64_t fetch;  // how decoding fetches keys and values: Fetch of ahead.h
  double scale, softcap;  // softcap 0: none
  int64_t page_size, table_stride, pages;  // of keys in pages, whose batch stride leads from page to page
};

struct Tensors {
  const void *q, *k, *v;
  void* out;
  float* lse;  // [B, Hq, Sq] or null
  const int32_t *lo, *hi;  // or null
  // [B or 1, kv_len], B that of lo and hi: how many keys up to this one are kept without a gap, 0: no row sees it; or
  // null: all are kept.
  const int32_t* kept;
  const int32_t* table;    // [B, table_stride]: where a batch row's pages lie, in order; null: no pages
};

struct Gradients {
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
};

struct Range {
  int64_t lo, hi;
  void include(Range other) {
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
  }
};

inline Range visible(const Problem& p, const Tensors& t, int64_t batch, int64_t row) {
  if (t.lo) {
    int64_t at = batch * p.edge_stride + row;
    int64_t lo = t.lo[at] < 0 ? 0 : t.lo[at];
    return {lo, t.hi[at] < p.kv_len ? t.hi[at] : p.kv_len};
  }
  int64_t lo = row + p.left, hi = row + p.right;
  return {lo < 0 ? 0 : lo, hi < p.kv_len ? hi : p.kv_len};
}

inline bool is_kept(const Problem& p, const Tensors& t, int64_t batch, int64_t key) {
  return !t.kept || t.kept[(p.edge_stride ? batch * p.kv_len : 0) + key];
}

// Row `row` of head `head` of a tensor in the call's dtype.
inline char* at(const void* base, const Problem& p, const Strides& s, int64_t batch, int64_t head, int64_t row) {
  int64_t bytes = p.dtype == 0 ? 4 : 2;
  return static_cast<char*>(const_cast<void*>(base)) + bytes * (batch * s.batch + head * s.head + row * s.row);
}

// Key `key` of a batch row, of k or v; no table leads outside of the pages.
inline char* key_at(const void* base, const Problem& p, const Tensors& t, const Strides& s, int64_t batch, int64_t head,
                    int64_t key) {
  if (!t.table) return at(base, p, s, batch, head, key);
  int64_t page = t.table[batch * p.table_stride + key / p.page_size];
  page = page < 0 ? 0 : page < p.pages ? page : p.pages - 1;
  return at(base, p, s, page, head, key % p.page_size);
}

// With a cap of at most this much, e^logit and sums of millions of them stay inside float32, so no running maximum
// is needed: e^64 is 6e27, and e^-64 far above float32's smallest number.
constexpr double BOUNDED_CAP = 64.0;

// How a raw product s becomes a logit: cap * tanh(s * inner), or s * inner without a cap.
struct Softcap {
  float inner, cap, scale;
  bool capped, bounded;
  explicit Softcap(const Problem& p)
      : inner(float(p.softcap > 0 ? p.scale / p.softcap : p.scale)),
        cap(float(p.softcap)),
        scale(float(p.scale)),
        capped(p.softcap > 0),
        bounded(p.softcap > 0 && p.softcap <= BOUNDED_CAP) {}
};

// The query rows of one task, as lanes: heads [head, head + group) of one key head, rows [first, first + rows).
// Lane g * rows + i is row i of head g.
struct RowBlock {
  int64_t batch, kv_head, head, group, first, rows;
  int64_t lanes() const { return group * rows; }
  int64_t head_of(int64_t lane) const { return head + lane / rows; }
  int64_t row_of(int64_t lane) const { return first + lane % rows; }
  // The row of a tensor like q that is in a lane; null for a lane past the last.
  char* row(const void* base, const Problem& p, const Strides& s, int64_t lane) const {
    return lane < lanes() ? at(base, p, s, batch, head_of(lane), row_of(lane)) : nullptr;
  }
};

// How the query rows are cut into blocks. Fewer rows a block where there would be too few tasks for the threads.
struct RowBlocks {
  int64_t heads_each, rows_each, head_blocks, row_blocks, per_place;
  RowBlocks(const Problem& p, int64_t most) {
    int64_t group = p.heads / p.kv_heads;
    for (;; most /= 2) {
      heads_each = group < most ? group : most;
      rows_each = most / heads_each;
      if (rows_each > p.q_len) rows_each = p.q_len;
      head_blocks = (group + heads_each - 1) / heads_each;
      row_blocks = (p.q_len + rows_each - 1) / rows_each;
      per_place = head_blocks * row_blocks;
      if (most <= 32 || p.batch * p.kv_heads * per_place >= 2 * p.threads) return;
    }
  }
  int64_t lanes() const { return heads_each * rows_each; }
  // Block `number` of key head `place`; the last rows come first, as they see the most keys of a causal mask.
  RowBlock block(const Problem& p, int64_t place, int64_t number) const {
    int64_t group = p.heads / p.kv_heads, kv_head = place % p.kv_heads;
    int64_t row = (row_blocks - 1 - number / head_blocks) * rows_each, head = number % head_blocks * heads_each;
    int64_t rows = p.q_len - row < rows_each ? p.q_len - row : rows_each;
    int64_t heads = group - head < heads_each ? group - head : heads_each;
    return {place / p.kv_heads, kv_head, kv_head * group + head, heads, row, rows};
  }
};

// Which keys the lanes of a block see: of each lane, of any lane, and those that all lanes see, of the keys that are kept.
struct Edges {
  int32_t *lo, *hi;  // [lanes]
  Range any, all;
  const int32_t* kept;  // of the block's batch row; null: all are kept
  // The number of a key to compare with lo and hi: of one that is not kept, or past the last, one that no lane sees.
  int32_t number(int64_t key) const { return int32_t(!kept || (key < keys && kept[key]) ? key : -1); }
  // Whether all lanes see the keys [from, to).
  bool whole(int64_t from, int64_t to) const {
    return from >= all.lo && to <= all.hi && (!kept || kept[to - 1] >= to - from);
  }
  int64_t keys;
  void read(const Problem& p, const Tensors& t, const RowBlock& block, int64_t padded) {
    any = {p.kv_len, 0};
    all = {0, p.kv_len};
    keys = p.kv_len;
    kept = t.kept ? t.kept + (p.edge_stride ? block.batch * p.kv_len : 0) : nullptr;
    for (int64_t i = 0; i < block.rows; i++) {
      Range r = visible(p, t, block.batch, block.first + i);
      if (r.lo < r.hi)
        any.include(r);
      else
        r = {0, 0};
      all.lo = r.lo > all.lo ? r.lo : all.lo;
      all.hi = r.hi < all.hi ? r.hi : all.hi;
      for (int64_t g = 0; g < block.group; g++) {
        lo[g * block.rows + i] = int32_t(r.lo);
        hi[g * block.rows + i] = int32_t(r.hi);
      }
    }
    for (int64_t lane = block.lanes(); lane < padded; lane++) lo[lane] = hi[lane] = 0;
    if (any.lo > any.hi) any = {0, 0};
  }
};

}  // namespace softcap
