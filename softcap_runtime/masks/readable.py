"""Whether the data of a tensor can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.compat.torch_transforms import in_transform


def data_is_readable(tensor: Tensor) -> bool:
    """Whether looking at the data costs no wait: a CPU tensor that has data, nobody tracing."""
    return tensor.device.type == "cpu" and data_is_there(tensor)


def data_is_there(tensor: Tensor) -> bool:
    """Whether there are data to look at (a fake tensor has none), and nobody traces what is done with them.

    A tensor of a torch.func transform may stand for many, whose data have no one answer.
    """
    own = type(tensor) in (Tensor, torch.nn.Parameter)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return own and not traced and not in_transform(tensor)
