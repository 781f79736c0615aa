// A paged cache as callers give it: its table and lengths checked, and written down as decoding reads them.
#pragma once

#include "intervals.h"
#include "problem.h"

namespace softcap {

// CpuPages, in Python, has the same fields in the same order. Bytes of one integer, elements from row to row.
struct Pages {
  int64_t table_bytes, table_step, length_bytes, offset_bytes;
  int64_t causal, window;  // window 0: none
};

// Problem's batch rows are sequences, and each has q_len new rows, the last of which stands at its last key.
struct PagedInputs {
  Tokens table, lengths, offsets;  // [B, table_stride], [B], [B + 1] or null: where the rows of each sequence begin
  int64_t causal, window;
};

// Of every row the keys that it sees, lo and hi [B][q_len]; the pages that are used, table [B][table_stride]; and the
// keys of the longest sequence. Returns 0 where offsets, lengths or pages are none that fit, for another to say why.
inline int64_t read_pages(const Problem& p, const PagedInputs& in, int32_t* table, int32_t* lo, int32_t* hi) {
  int64_t longest = 0;
  for (int64_t b = 0; in.offsets.data && b <= p.batch; b++)
    if (in.offsets.at(0, b) != b * p.q_len) return 0;
  for (int64_t b = 0; b < p.batch; b++) {
    int64_t length = in.lengths.at(0, b);
    if (length < p.q_len || length > p.table_stride * p.page_size) return 0;
    longest = length > longest ? length : longest;
    for (int64_t i = 0; i * p.page_size < length; i++) {
      int64_t page = in.table.at(b, i);
      if (page < 0 || page >= p.pages) return 0;
      table[b * p.table_stride + i] = int32_t(page);
    }
    for (int64_t i = 0; i < p.q_len; i++) {
      int64_t own = length - p.q_len + i, from = 0, to = in.causal ? own + 1 : length;
      if (in.window && own + 1 - in.window > 0) from = own + 1 - in.window;
      if (in.window && own + in.window < to) to = own + in.window;
      lo[b * p.q_len + i] = int32_t(from);
      hi[b * p.q_len + i] = int32_t(to);
    }
  }
  return longest;
}

}  // namespace softcap
