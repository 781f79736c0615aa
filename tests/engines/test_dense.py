"""The dense engine: compiled in this process, and loud where torch would go on uncompiled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import HEAD_DIM, LAYOUTS, Sizes, dense_tolerance, expected, make_qkv, relative_error

from softcap_runtime import AttentionConfig, KernelNotPrewarmed, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.engines.spec import KernelSpec

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


@pytest.fixture
def dense(cache_dir: Path) -> Iterator[Runtime]:
    torch._dynamo.reset()
    yield Runtime(RuntimeSettings(cache_dir=cache_dir, engine="dense"))
    torch._dynamo.reset()


NEW = torch.__version__ >= "2.7"  # older ones name both otherwise
LIMIT = "recompile_limit" if NEW else "cache_size_limit"


def test_a_recompile_limit_raises(dense: Runtime, seed: int) -> None:
    error = torch._dynamo.exc.FailOnRecompileLimitHit if NEW else torch._dynamo.exc.Unsupported
    with torch._dynamo.config.patch({LIMIT: 1}):
        inputs = make_qkv(Sizes(2, 4, 2, 20, 20))
        assert relative_error(dense.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6
        with pytest.raises(error, match=None if NEW else "limit"):
            dense.attention(*make_qkv(Sizes(2, 4, 2, 15, 20)), CONFIG)  # rows and keys were one number before


def test_lengths_windows_and_caps_share_one_compilation(dense: Runtime, seed: int) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    # No two sizes are equal: torch gives those one symbol, and compiles anew where they part.
    dense.attention(*make_qkv(Sizes(2, 9, 3, 17, 20)), CONFIG)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in random.sample(range(20, 200), 6):
            config = AttentionConfig(
                softcap=random.uniform(1, 100), scale=random.uniform(0.1, 0.2), window=random.randint(1, 50)
            )
            inputs = make_qkv(Sizes(random.choice([2, 5]), 8, 2, length - random.randint(0, 9), length))
            error = relative_error(dense.attention(*inputs, config), expected(*inputs, config))
            assert error <= dense_tolerance(config)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_every_size_of_one_together(dense: Runtime, seed: int) -> None:
    """torch compiles sizes of 1 anew, and stops after eight of one code object: here each has one of its own, which no
    layout compiles again."""
    with torch._dynamo.config.patch({LIMIT: 1}):
        for sizes in (Sizes(2, 4, 2, 20, 20), Sizes(1, 4, 1, 20, 20), Sizes(2, 4, 2, 1, 20), Sizes(1, 1, 1, 1, 1)):
            for layout in LAYOUTS:
                inputs = make_qkv(sizes, layout=layout)
                assert relative_error(dense.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6


def test_prewarming_tells_that_its_kernels_are_compiled_here(tmp_path: Path) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="dense"))
    request = PrewarmRequest(config=CONFIG, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype="float32")
    for _ in range(2):
        assert [(row.spec.op, row.outcome) for row in runtime.prewarm([request], progress=False)] == [
            ("dense_forward", "ready")
        ]
    (kernel,) = runtime.stats().kernels
    ((artifact, supplied),) = runtime.supply.supplied.items()
    assert artifact.describe() == KernelSpec("dense_forward", "cpu", "float32", 0, True, "")
    assert (kernel.source, kernel.bytes) == (supplied.source, supplied.bytes) == ("compiled", 0)
    assert runtime.stats().builds == runtime.stats().loads == 0


def test_forbid_says_where_a_kernel_of_this_process_comes_from(tmp_path: Path) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="dense", jit="forbid"))
    inputs = make_qkv(Sizes(2, 4, 2, 20, 20))
    with pytest.raises(KernelNotPrewarmed, match=r"call Runtime\.prewarm in this one first$"):
        runtime.attention(*inputs, CONFIG)
    request = PrewarmRequest(config=CONFIG, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype="float32")
    runtime.prewarm([request], progress=False)
    assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6
