"""One sequence over 2 and 4 processes: every case of ``ranks.py`` in one launch each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from support.workers import launch

NEEDS_GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
RANKS = Path(__file__).with_name("ranks.py")
# What four ranks may get wrong where two do not, on a machine of two cores.
OF_FOUR = (
    "masks_layouts_methods_and_groups",
    "heads_without_repetition_are_bit_equal",
    "stages_and_half_precision",
    "inner_rows_between_outer_ones",
    "bytes_on_the_wire",
    "whole_again",
    "heads_as_dtensors_beside_the_context",
    "ranks_that_disagree_are_told",
    "a_missing_kernel_raises_before_anything_is_sent",
    "fully_sharded_parameters_beside_the_context",
    "dtensors",
)
OF_TWO = ("compiled_kernels", "under_compile_checkpoint_and_autocast", "a_hugging_face_model")


@pytest.mark.slow
@NEEDS_GLOO
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ()),
        (4, OF_FOUR),
        pytest.param(2, ("every_combination",), marks=pytest.mark.every_combination),
        pytest.param(4, ("every_combination", *OF_TWO), marks=pytest.mark.every_combination),
    ],
)
def test_cases(ranks: int, cases: tuple[str, ...], warm_cache: Path) -> None:
    assert "passed" in launch(ranks, RANKS, *cases, cache=warm_cache)


@pytest.mark.slow
@NEEDS_GLOO
def test_training_over_ranks_is_that_of_one_process(warm_cache: Path, tmp_path: Path) -> None:
    """The demo itself raises where the two loss curves part."""
    pytest.importorskip("transformers")
    script = Path(__file__).parents[2] / "scripts" / "train_demo.py"
    out = tmp_path / "curves.png"
    how = ("--context-parallel", "2", "--steps", "4", "--seed", "3", "--out", str(out))
    assert "largest difference" in launch(2, script, *how, cache=warm_cache)
    assert out.exists()


def test_nothing_is_imported_before_it_is_asked_for(warm_cache: Path) -> None:
    code = """
import sys, torch
from softcap_runtime import AttentionConfig, Runtime
q = torch.randn(1, 2, 5, 64)
Runtime.get().attention(q, q, q, AttentionConfig(scale=1.0))
torch.ops.softcap_runtime.attention(q.requires_grad_(), q, q, None, None, -9, 1, 1.0, None, "eager", True, 0)
print([name for name in ("torch.distributed.tensor", "softcap_runtime.distributed") if name in sys.modules])
"""
    environment = {**os.environ, "SOFTCAP_CACHE_DIR": str(warm_cache), "SOFTCAP_ENGINE": "eager"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
