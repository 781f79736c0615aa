// Softcapped attention on a CPU: forward, backward and decoding for float32, bfloat16 and float16.
//
// For query row i and the keys j that it sees, with softmax in float32:
//     s_ij = softcap * tanh(scale * <q_i, k_j> / softcap),  out_i = sum_j softmax_j(s_ij) v_j
// Formula: Gemma 2 (Gemma Team, 2024), section 2. Every size, stride, cap and scale is a run-time argument; the mask is
// a range of keys for each row. Relative error against float64 (Frobenius norm): float32 below 5e-7, gradients 7e-7;
// bfloat16 below 2.5e-3 (its own rounding of the output), gradients 3.5e-3.
//
// vectors.h: exponential, tanh, dtypes; products.h: matrix products; packing.h: their operands; problem.h: a call;
// forward.h, backward.h, decode.h: the work on it. Nothing here knows of Python or torch.
#include "backward.h"
#include "decode.h"

namespace softcap {
namespace {

enum Arithmetic { FASTEST, SINGLE, DOT, TILE };

// The arithmetic that serves a call: pairs are for bfloat16 alone.
int64_t chosen(const Problem& p) {
  if (p.dtype != BFLOAT16) return SINGLE;
#if SOFTCAP_TILE
  if ((p.arithmetic == FASTEST || p.arithmetic == TILE) && Tile::permitted()) return TILE;
#endif
#if SOFTCAP_DOT
  if (p.arithmetic != SINGLE) return DOT;
#endif
  return SINGLE;
}

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

}  // namespace
}  // namespace softcap

using namespace softcap;

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Both return 0, or 1 when there is no memory for their scratch buffers.
EXPORTED int64_t softcap_forward(const Problem* p, const void* q, const void* k, const void* v, void* out, float* lse,
                                 const int32_t* lo, const int32_t* hi) {
  Tensors t{q, k, v, out, lse, lo, hi};
  bool done;
  if (p->heads / p->kv_heads * p->q_len <= FEW_ROWS)
    done = p->dtype == FLOAT32 ? decode<float>(*p, t) : p->dtype == BFLOAT16 ? decode<BFloat16>(*p, t) : decode<Float16>(*p, t);
  else
    done = with_arithmetic(*p, [&](auto a) { return forward<decltype(a)>(*p, t); });
  return done ? 0 : 1;
}

EXPORTED int64_t softcap_backward(const Problem* p, const void* q, const void* k, const void* v, const void* out,
                                  const float* lse, const int32_t* lo, const int32_t* hi, const void* grad_out,
                                  void* grad_q, void* grad_k, void* grad_v) {
  Tensors t{q, k, v, const_cast<void*>(out), const_cast<float*>(lse), lo, hi};
  Gradients g{grad_out, grad_q, grad_k, grad_v};
  return with_arithmetic(*p, [&](auto a) { return backward<decltype(a)>(*p, t, g); }) ? 0 : 1;
}

// The arithmetic that bfloat16 calls run in: 1 float32, 2 bfloat16 dot products, 3 tiles.
EXPORTED int64_t softcap_arithmetic() {
  Problem p{};
  p.dtype = BFLOAT16;
  return chosen(p);
}
