"""Row intervals on CUDA: what comes before the launch of ``triton.intervals``' kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.parameters import GpuKernels, Pointer
from softcap_runtime.cuda.triton.launch import launcher, on
from softcap_runtime.masks.intervals import band
from softcap_runtime.masks.tokens import FindIntervals, tokens_of

# The kernel's numbers of the dtypes: bytes, negative without a sign.
_ID_KINDS = {torch.int64: 8, torch.int32: 4, torch.int16: 2, torch.int8: 1, torch.uint8: -1}
_MASK_KINDS = {**_ID_KINDS, torch.bool: -1}
# Query rows and keys of a program. Each reads all keys of its batch row, so many at a time.
BLOCK, WARPS = 4096, 16
# Masks of so many forms are bound at a time.
MAX_FORMS = 64


def bind_intervals(device: torch.device, kernels: GpuKernels) -> FindIntervals:
    """See ``masks.tokens.FindIntervals``: on CUDA device ``device``, which also checks the values; nothing waits.

    An attention mask gives ``kept`` whether it has holes or not. Values that no mask can have end in a device-side
    assertion.
    """
    pointer = Pointer(torch.int32)  # whatever the dtype: its kind tells

    def bind(rows: int, blocks: int, *numbers: int) -> Callable[..., None]:
        return launcher(
            kernels,
            "row_intervals_kernel",
            (rows * blocks, 1, 1),
            [pointer] * 5,
            [blocks, *numbers],
            {"BLOCK": BLOCK},
            device=device, dtype=torch.int32, warps=WARPS, aligned=False,
        )  # fmt: skip

    ready: dict[tuple[object, ...], Callable[..., None]] = {}
    bind(1, 1, *[0] * 11)  # a kernel that is missing is missed here

    def run(
        batch: int,
        q_len: int,
        kv_len: int,
        causal: bool,
        window: int | None,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
    ) -> tuple[Tensor, ...] | None:
        given = (attention_mask, _MASK_KINDS), (document_ids, _ID_KINDS)
        found = tokens_of((batch, q_len, kv_len), causal, device, *given)
        if found is None:
            return None
        rows, *how = found
        key = (*how, rows, q_len, kv_len, causal, window)
        launch = ready.get(key)
        if launch is None:
            if len(ready) >= MAX_FORMS:
                ready.clear()
            form = band(q_len, kv_len, causal=causal, window=window)
            left, right = form.left or 0, form.right or 0
            sizes = (q_len, kv_len, kv_len - q_len, left, right)
            blocks = -(-max(q_len, kv_len) // BLOCK)
            numbers = [number for each in how for number in each]
            launch = ready[key] = bind(rows, blocks, *sizes, *numbers, kv_len.bit_length(), int(not causal))
        lo = torch.empty((rows, q_len), dtype=torch.int32, device=device)
        hi = torch.empty((rows, q_len), dtype=torch.int32, device=device)
        vectors: tuple[Tensor, ...] = (lo, hi)
        if attention_mask is not None:
            vectors = (lo, hi, torch.empty((rows, kv_len), dtype=torch.int32, device=device))
        with on(device):
            launch(lo if attention_mask is None else attention_mask, lo if document_ids is None else document_ids,
                   lo, hi, vectors[-1])  # fmt: skip
        return vectors

    return run
