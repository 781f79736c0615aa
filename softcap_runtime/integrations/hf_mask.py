"""The mask that Hugging Face's models pass from their mask function to their attention function."""

from __future__ import annotations

from typing import Any

from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals

_NO_TENSOR = "this model computes with its mask as with a tensor; use attn_implementation='eager'"


class HfMask(RowIntervals):
    """Row intervals in the place of the mask tensor that a model expects.

    A model that computes with its mask as with a tensor gets an error that says so.
    """

    __slots__ = ()

    @property
    def ndim(self) -> int:
        """4, as of a finished mask: models check it on those that ``generate`` makes for a static cache."""
        return 4

    def contiguous(self) -> HfMask:
        """Itself: ``generate`` calls it on the masks that it makes for a static cache."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """``[:, :, first:, :]``: the last rows, as Gemma 4's layers with shared keys take them."""
        if not isinstance(index, tuple):
            return super().__getitem__(index)
        match index:
            case (batch, heads, slice(start=first, stop=None, step=None), keys) if (
                batch == heads == keys == slice(None)
            ):
                first = first or 0
                return _last_rows(self, self.q_len - first if first >= 0 else min(self.q_len, -first))
        raise ValueError(f"attention_mask: {_NO_TENSOR}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"attention_mask.{name}: {_NO_TENSOR}")

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise ValueError(f"attention_mask: {_NO_TENSOR}")


def _last_rows(mask: HfMask, count: int) -> HfMask:
    first = mask.q_len - count
    if mask.left is None or mask.right is None:
        lo, hi = (edge[:, first:].contiguous() for edge in mask.vectors[:2])
        return mask._replace(q_len=count, lo=lo, hi=hi)
    left = mask.left if mask.left <= -UNBOUNDED else mask.left + first
    return mask._replace(q_len=count, left=left, right=min(mask.right + first, UNBOUNDED))
