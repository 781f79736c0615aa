"""What this version of torch supports; nothing here imports more of it.

Read these as attributes of the module, so that tests can replace them. ``scripts/test_torch.sh`` runs the tests behind
these version numbers.
"""

from __future__ import annotations

import torch

# ``torch.nn.attention.flex_attention``.
FLEX_ATTENTION: bool = torch.__version__ >= "2.5"
# A ``BlockMask`` of any lengths; 2.5 rounds them up to whole blocks, and compiles flex for no others.
MASK_LENGTHS: bool = torch.__version__ >= "2.6"
# flex compiled ahead of time with every size dynamic, on the CPU, and loaded without the compiler: 2.6 cannot trace it,
# 2.7 and 2.8 fail in the compiler (an assertion on its buffers).
FLEX_PACKAGES: bool = torch.__version__ >= "2.9"
# flex trained on CUDA through its own forward and backward (run with 2.11; older than 2.7 never tried).
FLEX_ON_CUDA: bool = torch.__version__ >= "2.7"
# flex's kernels for GPUs read the full blocks' list with its own strides, not with those of the partial ones.
MASK_STRIDES: bool = torch.__version__ >= "2.13"
