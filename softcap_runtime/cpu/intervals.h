// Masks as callers give them, as row intervals: what masks/intervals.py says, in one pass over the tokens.
#pragma once

#include <cstdint>

namespace softcap {

// Integers of 1, 4 or 8 bytes (bool is of 1), [1 or B, kv_len] with `step` elements from row to row; null: not given.
struct Tokens {
  const void* data;
  int64_t bytes, step;
  int64_t at(int64_t batch, int64_t key) const {
    int64_t i = batch * step + key;
    if (bytes == 8) return static_cast<const int64_t*>(data)[i];
    if (bytes == 4) return static_cast<const int32_t*>(data)[i];
    return static_cast<const int8_t*>(data)[i];
  }
};

struct MaskProblem {
  int64_t batch, q_len, kv_len, causal, window;  // window 0: none
  Tokens mask, documents;
};

enum Found : int64_t { INTERVALS, NO_INTERVALS, EVERYTHING };

// Where the keys that a padding mask shows begin and end. NO_INTERVALS: it has holes, or other numbers than 0 and 1.
inline Found padding_edges(const Tokens& mask, int64_t batch, int64_t kv_len, int64_t& first, int64_t& past) {
  int64_t runs = 0, before = 0;
  first = kv_len, past = 0;
  for (int64_t j = 0; j < kv_len; j++) {
    int64_t shown = mask.at(batch, j);
    if (shown != 0 && shown != 1) return NO_INTERVALS;
    if (shown && !before) first = runs++ ? first : j;
    if (shown) past = j + 1;
    before = shown;
  }
  return runs > 1 ? NO_INTERVALS : first == 0 && past == kv_len ? EVERYTHING : INTERVALS;
}

// lo and hi [batch][q_len], and whether they are that: NO_INTERVALS where the masks are none that intervals tell, for
// another to say why; EVERYTHING where the band alone is the mask, and lo and hi were not written to.
inline Found row_intervals(const MaskProblem& p, int32_t* lo, int32_t* hi) {
  const int64_t offset = p.kv_len - p.q_len;
  bool everything = !p.documents.data;
  for (int64_t b = 0; b < p.batch; b++) {
    int64_t first = 0, past = p.kv_len;
    if (p.mask.data) {
      Found found = padding_edges(p.mask, b, p.kv_len, first, past);
      if (found == NO_INTERVALS) return found;
      everything = everything && found == EVERYTHING;
    }
    // Documents are one run each, from key `start` on; where one ends is known at the next.
    int64_t start = 0, written = 0;
    auto write = [&](int64_t end) {  // the rows of the document [start, end)
      for (; written < p.q_len && (written + offset < end || end == p.kv_len); written++) {
        int64_t at = written + offset, from = first, to = past;
        if (p.causal && at + 1 < to) to = at + 1;
        if (p.window && at + 1 - p.window > from) from = at + 1 - p.window;
        if (p.window && at + p.window < to) to = at + p.window;
        if (start > from) from = start;
        if (end < to) to = end;
        bool empty = from >= to;
        lo[b * p.q_len + written] = int32_t(empty ? p.kv_len : from);
        hi[b * p.q_len + written] = int32_t(empty ? 0 : to);
      }
    };
    if (p.documents.data)
      for (int64_t j = 1; j < p.kv_len; j++) {
        int64_t id = p.documents.at(b, j), before = p.documents.at(b, j - 1);
        if (id < before) return NO_INTERVALS;
        if (id == before) continue;
        write(j);
        start = j;
      }
    write(p.kv_len);
  }
  return everything ? EVERYTHING : INTERVALS;
}

}  // namespace softcap
