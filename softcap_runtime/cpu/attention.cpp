// Softcapped attention on a CPU: forward, backward and decoding for float32, bfloat16 and float16.
//
// For query row i and the keys j that it sees, with softmax in float32:
//     s_ij = softcap * tanh(scale * <q_i, k_j> / softcap),  out_i = sum_j softmax_j(s_ij) v_j
// Formula: Gemma 2 (Gemma Team, 2024), section 2. Every size, stride, cap and scale is a run-time argument; the mask is
// a range of keys for each row, less the keys that are not kept. Relative error against float64 (Frobenius norm):
// float32 below 5e-7, gradients 7e-7; bfloat16 below 2.5e-3 (its own rounding of the output), gradients 3.5e-3.
//
// vectors.h: exponential, tanh, dtypes; products.h: matrix products; packing.h: their operands; problem.h: a call;
// forward.h, backward.h, decode.h (with ahead.h): the work on it; team.h: its threads; intervals.h, pages.h: masks of
// tokens and tables of pages as ranges of keys.
// Nothing here knows of Python or torch.
#include "backward.h"
#include "decode.h"
#include "intervals.h"
#include "pages.h"

#include <ctime>

namespace softcap {
namespace {

enum Arithmetic : int64_t { SINGLE = 1, DOT = 2, TILE = 3 };

bool is_here(int64_t arithmetic) {
#if SOFTCAP_TILE
  if (arithmetic == TILE) return Tile::permitted();
#endif
#if SOFTCAP_DOT
  if (arithmetic == DOT) return true;
#endif
  return arithmetic == SINGLE;
}

// The arithmetic that serves a call: pairs are for bfloat16 alone.
int64_t chosen(const Problem& p) { return p.dtype == BFLOAT16 && is_here(p.arithmetic) ? p.arithmetic : SINGLE; }

template <class F>
bool with_arithmetic(const Problem& p, F call) {
  switch (chosen(p)) {
#if SOFTCAP_TILE
    case TILE: return call(Tile{});
#endif
#if SOFTCAP_DOT
    case DOT: return call(Dot{});
#endif
  }
  return call(Single{});
}

// The best time of several, in seconds.
template <class F>
double seconds_of(int times, F work) {
  double best = 1e9;
  for (int i = 0; i < times; i++) {
    timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    work();
    clock_gettime(CLOCK_MONOTONIC, &to);
    double seconds = double(to.tv_sec - from.tv_sec) + 1e-9 * double(to.tv_nsec - from.tv_nsec);
    best = seconds < best ? seconds : best;
  }
  return best;
}

// Of a product of 64 x 256 and 256 x 64 elements.
template <class A>
double seconds_of_product() {
  constexpr int64_t ROWS = 64, TERMS = 256 / A::PAIR;
  Scratch<typename A::Word> a(ROWS * TERMS), b(TERMS * ROWS);
  Scratch<float> c(ROWS * ROWS);
  if (a.missing() || b.missing() || c.missing()) return 1e9;
  std::memset(static_cast<void*>(a), 0, ROWS * TERMS * 4);
  std::memset(static_cast<void*>(b), 0, ROWS * TERMS * 4);
  A::begin();
  double best = seconds_of(50, [&] { A::multiply(c, ROWS, a, TERMS, b, ROWS, ROWS, ROWS, TERMS, false); });
  A::end();
  return best;
}

}  // namespace
}  // namespace softcap

using namespace softcap;

#define EXPORTED extern "C" __attribute__((visibility("default")))

static bool decode(const Problem& p, const Tensors& t) {
  return p.dtype == FLOAT32 ? decode<float>(p, t) : p.dtype == BFLOAT16 ? decode<BFloat16>(p, t) : decode<Float16>(p, t);
}

// Whether keys are read as they lie, not packed into blocks first. Packing costs as much as the products of some 16 rows;
// those of whole blocks are cheap in pairs and tiles. Where the rows are an eighth of the keys, a causal mask hides little.
static bool decodes(const Problem& p, const Tensors& t) {
  int64_t rows = p.heads / p.kv_heads * p.q_len;
  if (rows <= FEW_ROWS) return true;
  if (rows > (chosen(p) == SINGLE ? MOST_ROWS : MOST_ROWS / 2)) return false;
  Range seen = seen_by_any(p, t);
  return seen.hi - seen.lo >= 8 * p.q_len;
}

// Below this many multiply-adds a second thread costs more to wake than it saves (some microseconds).
constexpr int64_t WORTH_A_THREAD = 1 << 18;

static Problem with_threads(const Problem& p) {
  Problem made = p;
  if (p.batch * p.heads * p.q_len * p.kv_len * p.dim < WORTH_A_THREAD) made.threads = 1;
  return made;
}

// Both return 0, or 1 when there is no memory for their scratch buffers.
EXPORTED int64_t softcap_forward(const Problem* given, const void* q, const void* k, const void* v, void* out, float* lse,
                                 const int32_t* lo, const int32_t* hi, const int32_t* kept) {
  const Problem p = with_threads(*given);
  Tensors t{q, k, v, out, lse, lo, hi, kept, nullptr};
  bool done;
  if (decodes(p, t))
    done = decode(p, t);
  else
    done = with_arithmetic(p, [&](auto a) { return forward<decltype(a)>(p, t); });
  return done ? 0 : 1;
}

// The same over keys in pages, for at most MOST_ROWS rows of a group's heads. Returns 2, and computes nothing, where the
// contents of table, lengths or offsets (or null) do not fit: see pages.h.
EXPORTED int64_t softcap_paged(const Problem* given, const Pages* pages, const void* q, const void* k, const void* v,
                               void* out, const void* table, const void* lengths, const void* offsets) {
  Problem p = *given;
  Scratch<int32_t> used(p.batch * p.table_stride), lo(p.batch * p.q_len), hi(p.batch * p.q_len);
  if (used.missing() || lo.missing() || hi.missing()) return 1;
  PagedInputs in{{table, pages->table_bytes, pages->table_step}, {lengths, pages->length_bytes, 0},
                 {offsets, pages->offset_bytes, 0}, pages->causal, pages->window};
  p.kv_len = read_pages(p, in, used, lo, hi);
  if (p.kv_len == 0) return 2;
  p.edge_stride = p.q_len;
  p = with_threads(p);
  return decode(p, Tensors{q, k, v, out, nullptr, lo, hi, nullptr, used}) ? 0 : 1;
}

EXPORTED int64_t softcap_backward(const Problem* given, const void* q, const void* k, const void* v, const void* out,
                                  const float* lse, const int32_t* lo, const int32_t* hi, const int32_t* kept,
                                  const void* grad_out, void* grad_q, void* grad_k, void* grad_v) {
  const Problem p = with_threads(*given);
  Tensors t{q, k, v, const_cast<void*>(out), const_cast<float*>(lse), lo, hi, kept, nullptr};
  Gradients g{grad_out, grad_q, grad_k, grad_v};
  return with_arithmetic(p, [&](auto a) { return backward<decltype(a)>(p, t, g); }) ? 0 : 1;
}

// The row intervals of a padding mask and of document ids, either null: see intervals.h.
EXPORTED int64_t softcap_intervals(const void* mask, int64_t mask_bytes, int64_t mask_step, const void* documents,
                                   int64_t document_bytes, int64_t document_step, int64_t batch, int64_t q_len,
                                   int64_t kv_len, int64_t causal, int64_t window, int32_t* lo, int32_t* hi) {
  Tokens shown{mask, mask_bytes, mask_step}, ids{documents, document_bytes, document_step};
  return row_intervals({batch, q_len, kv_len, causal, window, shown, ids}, lo, hi);
}

// The arithmetic that multiplies bfloat16 fastest on this machine, by measurement: instructions for pairs are slower
// than float32's on some processors that have them.
EXPORTED int64_t softcap_arithmetic() {
  int64_t found = SINGLE;
  double best = seconds_of_product<Single>(), seconds = 0;
#if SOFTCAP_DOT
  seconds = seconds_of_product<Dot>();
  if (seconds < best) best = seconds, found = DOT;
#endif
#if SOFTCAP_TILE
  if (Tile::permitted()) {
    seconds = seconds_of_product<Tile>();
    if (seconds < best) best = seconds, found = TILE;
  }
#endif
  return found;
}

// How one row of two heads is decoded fastest: over 64 MB of keys and values, more than most caches hold, in parts so
// short that on a busy machine some run without a break.
EXPORTED int64_t softcap_fetch() {
  constexpr int64_t HEADS = 4, KEYS = 1024, DIM = 256, PARTS = 16, PART = HEADS * KEYS * DIM;
  Scratch<BFloat16> q(2 * HEADS * DIM), keys(PARTS * PART), values(PARTS * PART);
  if (q.missing() || keys.missing() || values.missing()) return LONG_TO_SECOND;
  std::memset(static_cast<void*>(q), 0, 2 * HEADS * DIM * 2);
  std::memset(static_cast<void*>(keys), 0, PARTS * PART * 2);
  std::memset(static_cast<void*>(values), 0, PARTS * PART * 2);
  Problem p{};
  p.dtype = BFLOAT16;
  p.batch = 1, p.heads = 2 * HEADS, p.kv_heads = HEADS, p.q_len = 1, p.kv_len = KEYS, p.dim = DIM;
  p.q = p.out = {2 * HEADS * DIM, DIM, DIM}, p.k = p.v = {PART, KEYS * DIM, DIM};
  p.left = 0, p.right = KEYS, p.threads = 1, p.scale = 1, p.softcap = 50;
  double best[FETCHES] = {1e9, 1e9, 1e9};
  for (int64_t i = 0; i < 3 * FETCHES * PARTS; i++) {
    int64_t part = i % PARTS * PART;
    Tensors t{q, keys + part, values + part, q, nullptr, nullptr, nullptr, nullptr, nullptr};
    p.fetch = (i + i / PARTS) % FETCHES;
    double seconds = seconds_of(1, [&] { decode<BFloat16>(p, t); });
    best[p.fetch] = seconds < best[p.fetch] ? seconds : best[p.fetch];
  }
  int64_t found = 0;
  for (int64_t way = 1; way < FETCHES; way++) found = best[way] < best[found] ? way : found;
  return found;
}
