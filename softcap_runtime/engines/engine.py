"""The type of all engines, and the problem that an engine solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cuda.options import BlockOptions, Direction
from softcap_runtime.masks.intervals import RowIntervals
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.masks.tokens import FindIntervals

# Takes q, k, v and the vectors of the mask (``RowIntervals.vectors``); returns out and, for training, the logsumexp.
# With ``Engine.parts`` it also takes ``out``, rows or heads of a larger ``[B, S, H, D]``, to write to.
Forward = Callable[..., tuple[Tensor, Tensor | None]]
# Takes grad_out, q, k, v, out, lse and the vectors; returns the gradients of q, k and v. With ``Engine.parts`` it also
# takes ``keys_done``, which it calls with dk and dv as soon as their kernels are launched.
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
KeysDone = Callable[[Tensor, Tensor], None]


class Problem(NamedTuple):
    """One attention call without the contents of its tensors.

    ``mask`` holds the lengths, but of row intervals only the form. ``train``: whether a backward will need the
    logsumexp. ``softcap_approx``: of the settings. ``beside``: whether kernels of an exchange between ranks run at the
    same time.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    mask: RowIntervals
    train: bool
    softcap_approx: bool = False
    beside: bool = False


class Call(NamedTuple):
    """One request to the operator; q and k give the rest of its ``Problem``."""

    mask: RowIntervals
    scale: float
    softcap: float | None
    engine: str
    train: bool
    beside: bool = False

    def problem(self, q: Tensor, k: Tensor, softcap_approx: bool = False) -> Problem:
        """The call as an engine sees it."""
        batch, heads, _, head_dim = q.shape
        sizes = (batch, heads, k.shape[1], head_dim)
        return Problem(
            q.device, q.dtype, *sizes, self.scale, self.softcap, self.mask, self.train, softcap_approx, self.beside
        )


class Kernels(NamedTuple):
    """What an engine binds a problem to: compiled kernels, block tables of masks, options of GPU kernels.

    ``masks``: cached block tables. ``get``: a loaded artifact, which is loaded or built if this process lacks it, or
    refused by the settings (see ``Artifacts.get`` for what it raises). ``options``: those of a GPU kernel, by device,
    dtype, head_dim and direction.
    """

    masks: MaskMemo
    get: Callable[[Artifact], Any]
    options: Callable[[int, torch.dtype, int, Direction], BlockOptions]


class Engine(NamedTuple):
    """One way to compute attention.

    ``refuses``: why it cannot serve a problem, or None if it can. ``artifacts``: the compiled kernels that it needs for
    a problem whose tensors have torch's usual layout (calls with other layouts may ask ``Kernels`` for others).
    ``forward`` and ``backward``: bind a problem to its kernels and return what computes it, under any intervals of the
    mask's form; ``q``, ``k``, ``v`` have last stride 1. ``alike``: problems that together need every artifact that
    problems like this one may need, whatever their lengths; just this one if lengths do not matter. ``reads_kept``:
    whether its kernels read ``RowIntervals.kept``; if not, it only gets masks without. ``parts``: whether its forward
    takes ``out``, and its backward ``keys_done``. ``intervals``: binds a kernel that makes the masks of warm calls, of
    the problem's form and on its device; None if there is none.
    """

    name: str
    refuses: Callable[[Problem], str | None]
    artifacts: Callable[[Problem, Kernels], Sequence[Artifact]]
    forward: Callable[[Problem, Kernels], Forward]
    backward: Callable[[Problem, Kernels], Backward]
    alike: Callable[[Problem], Sequence[Problem]] = lambda problem: [problem]
    reads_kept: bool = False
    parts: bool = False
    intervals: Callable[[Problem, Kernels], FindIntervals | None] = lambda problem, kernels: None


MaskedForward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # of q, k, v
MaskedBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]  # of grad_out, q, k, v, out, lse


def per_mask(bind: Callable[[Problem, Kernels], Any]) -> Callable[[Problem, Kernels], Any]:
    """Adapt a ``bind`` that reads its mask's contents: a band is bound once, intervals at each call.

    ``bind`` returns a MaskedForward or MaskedBackward, which takes no edges.
    """

    def bind_late(problem: Problem, kernels: Kernels) -> Any:
        mask = problem.mask
        if mask.lo is None:
            return bind(problem, kernels)

        def run(*tensors: Tensor) -> Any:
            *rest, lo, hi = tensors
            return bind(problem._replace(mask=mask._replace(lo=lo, hi=hi)), kernels)(*rest)

        return run

    return bind_late


def scalars(problem: Problem) -> list[Tensor]:
    """The run-time scalars of a compiled kernel, float32: scale, and with a softcap its value and inverse."""
    cap = problem.softcap
    values = [problem.scale] if cap is None else [problem.scale, cap, 1.0 / cap]
    return [torch.tensor(value, dtype=torch.float32, device=problem.device) for value in values]


def empty_output(q: Tensor) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` in q's shape, laid out ``[B, S, H, D]`` in memory.

    That order makes the model's next ``transpose(1, 2).reshape(B, S, H * D)`` free.
    """
    # Not a view of another tensor, so that it may be changed in place.
    return q.new_empty_strided(*output_layout(*q.shape))


def output_layout(
    batch: int, heads: int, length: int, head_dim: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The shape of an output, and its strides for the layout ``[B, S, H, D]`` in memory."""
    return (batch, heads, length, head_dim), (length * heads * head_dim, head_dim, heads * head_dim, 1)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout that the operator promises for its results, which code compiled around it relies on."""
    return empty_output(like).copy_(x)
