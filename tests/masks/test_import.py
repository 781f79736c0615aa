"""What importing the masks must not bring along."""

from __future__ import annotations

import subprocess
import sys


def test_masks_import_no_compiler_and_no_plots() -> None:
    heavy = ["torch._dynamo", "torch._inductor", "torch.nn.attention.flex_attention", "matplotlib"]
    code = (
        "import sys, torch; before = set(sys.modules); import softcap_runtime.masks as masks; "
        "masks.block_tables(masks.band(300, 300, causal=True, window=7), 'cpu'); "
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
