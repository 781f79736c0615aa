"""What the GPU report compares with, each written from its documented formula; some only where they are installed.

FlashAttention-4 (``flash-attn-4``) has a softcap of its own, and flex attention can generate code for it (``FLASH``).
FlashInfer (``flashinfer-python``) has one for decoding from pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import SOFTCAP, sdpa, tanh_softcap

Attend = Callable[..., Tensor]
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def sigmoid_cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The same function by an exponential, which GPUs compute faster than tanh."""
    return SOFTCAP * (2 * torch.sigmoid(2 / SOFTCAP * score) - 1)


def flex(
    length: int, window: int | None, scale: float, device: str, cap: Score = tanh_softcap, backend: str = "AUTO"
) -> Attend:
    """Compiled flex attention with a causal mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) if window is None else (i >= j) & (i - j < window)

    options = {} if backend == "AUTO" else {"BACKEND": backend}
    mask = create_block_mask(visible, None, None, length, length, device=device)
    # Each shape starts afresh: past torch's recompile limit flex goes on unfused, and needs S x S memory.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(
            q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
        )
        return out

    return run


def packed_flex(ids: Tensor, scale: float) -> Attend:
    """Compiled flex attention within documents, whose mask is made at each call; ``ids`` ``[S]``."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    make, compiled = torch.compile(create_block_mask), torch.compile(flex_attention, fullgraph=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[i] == ids[j])

    def run(*qkv: Tensor) -> Tensor:
        mask = make(visible, None, None, len(ids), len(ids), device=ids.device.type)
        out: Tensor = compiled(*qkv, score_mod=tanh_softcap, block_mask=mask, scale=scale, enable_gqa=True)
        return out

    return run


def flash4(window: int | None, scale: float) -> Attend | None:
    """FlashAttention-4 with its softcap; None where it is not installed."""
    functions = _flash4()
    if functions is None:
        return None
    edges = (None, None) if window is None else (window - 1, 0)

    def run(*qkv: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in qkv)
        out = functions.flash_attn_func(*rows, softmax_scale=scale, causal=True, window_size=edges, softcap=SOFTCAP)
        return _first(out).transpose(1, 2)

    return run


def packed_flash4(ids: Tensor, scale: float) -> Attend | None:
    """The same within documents, whose bounds are known beforehand; ``ids`` ``[S]``."""
    functions = _flash4()
    if functions is None:
        return None
    counts = torch.unique_consecutive(ids, return_counts=True)[1]
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest = int(counts.max())

    def run(*qkv: Tensor) -> Tensor:
        rows = (x[0].transpose(0, 1) for x in qkv)
        out = functions.flash_attn_varlen_func(
            *rows, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scale, causal=True, softcap=SOFTCAP,
        )  # fmt: skip
        return _first(out).transpose(0, 1)[None]

    return run


def flashinfer(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, cores: bool) -> Attend | None:
    """FlashInfer's decoding from full pages, by tensor ``cores`` or not, planned here; None where it is not installed.

    ``q`` ``[B, Hq, 1, D]``; ``k``, ``v`` ``[num_pages, page_size, Hkv, D]``; ``table`` int32 ``[B, pages]``.
    """
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError:
        return None
    size, kv_heads = k.shape[1:3]
    batch, pages = table.shape
    space = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=cores)
    first = torch.arange(batch + 1, dtype=torch.int32) * pages
    full = torch.full((batch,), size, dtype=torch.int32)
    wrapper.plan(
        first, table.flatten(), full, q.shape[1], kv_heads, q.shape[3], size,
        logits_soft_cap=SOFTCAP, sm_scale=q.shape[3] ** -0.5, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = wrapper.run(q[:, :, 0], (k, v))
        return out[:, :, None]

    return run


def _flash4() -> Any:
    try:
        from flash_attn import cute
    except ImportError:
        return None
    return cute


def _first(out: Any) -> Tensor:
    """The output, alone or before its logsumexp."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Uncapped ``scaled_dot_product_attention`` by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def usable(who: str, call: Callable[[], Any]) -> bool:
    """Whether a call that may need what is not there works; says why where it does not."""
    try:
        call()
    except Exception as error:  # whatever a peer's compiler raises
        print(f"{who}: left out, {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
        return False
    return True
