"""Measured options of GPU kernels: kept once per machine, used by the calls that follow, and never anything odd."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.cli import main as cli
from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda import tune as gpu_tune
from softcap_runtime.cuda import tuned
from softcap_runtime.cuda.options import BlockOptions, DeviceLimits, choose, variants
from softcap_runtime.cuda.tune import Shape, Trial
from softcap_runtime.prewarm import prewarm as prewarming
from softcap_runtime.prewarm import tune as prewarm_tune
from softcap_runtime.store import inspection
from softcap_runtime.supply import Supply

LIMITS = DeviceLimits(227 * 1024, (9, 0), 132)
WHAT: Any = (0, torch.bfloat16, 128, "forward")
VARIANTS = variants(LIMITS, torch.bfloat16, 128, "forward")
SHAPE = Shape(torch.device("cuda", 0), torch.bfloat16, 8, 4, 128, 512, 0.1, 50.0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supply:
    monkeypatch.setattr(gpu_options, "device_limits", lambda index: LIMITS)
    return Supply(RuntimeSettings(cache_dir=tmp_path))


def measure(best: BlockOptions) -> list[Trial]:
    return [Trial(one, 1.0 if one == best else 2.5) for one in VARIANTS]


def test_the_best_is_kept_once_and_used(own: Supply) -> None:
    assert own.options(*WHAT) == choose(LIMITS, *WHAT[1:]) == VARIANTS[0]
    first = tuned.measured_once(own.store, *WHAT, lambda: measure(VARIANTS[2]))
    second = tuned.measured_once(own.store, *WHAT, lambda: pytest.fail("measured again"))
    assert (first.source, second.source) == ("built", "disk")
    assert own.options(*WHAT) == VARIANTS[0]  # what was bound before goes on
    own.forget_options()
    assert own.options(*WHAT) == VARIANTS[2]
    other: Any = (0, torch.bfloat16, 128, "dq")
    assert own.options(*other) == choose(LIMITS, *other[1:])
    (entry,) = inspection.entries(own.store)
    assert entry.fields["op"] == "tuned_options"
    words = "{} x {}, {} warps, {} stages"
    assert entry.provenance == {words.format(*one): "1 ms" if one == VARIANTS[2] else "2.5 ms" for one in VARIANTS}


def test_noise_changes_nothing(own: Supply) -> None:
    tuned.measured_once(own.store, *WHAT, lambda: [Trial(VARIANTS[0], 1.0), Trial(VARIANTS[1], 0.98)])
    assert own.options(*WHAT) == VARIANTS[0]


@pytest.mark.parametrize("data", [b"", b"null", b"[1, 2]", b'"a"', b"[64, 48, 4, 2]", b"[128, 128, 8, 99]", b"\xff"])
def test_anything_odd_is_not_used(own: Supply, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    own.store.load_or_build(tuned._key(*WHAT), lambda: data)
    with caplog.at_level(logging.WARNING, "softcap_runtime"):
        assert own.options(*WHAT) == VARIANTS[0]
    assert ["tuned options of forward" in record.message for record in caplog.records] == [True]


def test_a_variant_that_fails_or_differs_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_tune, "device_limits", lambda index: LIMITS)
    monkeypatch.setattr(gpu_tune, "_tensors", lambda *call: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    times = iter(range(100, 200))
    monkeypatch.setattr(gpu_tune, "_milliseconds", lambda run: next(times))
    failing: set[BlockOptions] = {VARIANTS[1]}

    def bind(shape: Shape, kernels: Any, direction: str, tensors: Any) -> Callable[[], Any]:
        options = kernels.options(torch.empty(1), direction)
        if options in failing:
            raise RuntimeError("out of resources")
        return lambda: (torch.full((4,), 2.0 if options == VARIANTS[2] else 1.0),)

    monkeypatch.setattr(gpu_tune, "_bind", bind)
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO, "softcap_runtime"):
        found = gpu_tune.trials(SHAPE, "forward", pool)
        assert [one.options for one in found] == [VARIANTS[0], *VARIANTS[3:]]
        assert [one.milliseconds for one in found] == list(range(100, 100 + len(found)))
        assert sum("out of resources" in record.message for record in caplog.records) == 1
        assert sum("differs" in record.message for record in caplog.records) == 1
        failing.update(VARIANTS)
        with pytest.raises(RuntimeError, match="no variant of the forward kernel runs on cuda:0"):
            gpu_tune.trials(SHAPE, "forward", pool)


def test_prewarm_measures_what_its_requests_need(tmp_path: Path, own: Supply, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Shape, str]] = []

    def trials(shape: Shape, direction: Any, pool: Any) -> list[Trial]:
        measured.append((shape, direction))
        return [Trial(one, index) for index, one in enumerate(variants(LIMITS, *shape[1:2], shape[4], direction))]

    monkeypatch.setattr(prewarm_tune, "trials", trials)
    monkeypatch.setattr(prewarming, "_has_options", lambda supply, request: True)
    monkeypatch.setattr(prewarming, "artifacts_of", lambda supply, request: [])
    monkeypatch.setattr(prewarming, "_bind_lengths", lambda bind, engine, request: None)
    monkeypatch.setattr(prewarm_tune, "device_of", torch.device)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
    common: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 200, "device": "cuda:0"}
    wanted = [
        PrewarmRequest(config=AttentionConfig(softcap=50.0, scale=0.1, window=window), **common, train=True)
        for window in (None, 4096)
    ]
    rows = runtime.prewarm(wanted, progress=False, tune=True)
    names = ["forward", "decode", "dq", "dk", "dv"]
    assert [(row.spec.op, row.outcome) for row in rows] == [(f"tuned {name}", "built") for name in names]
    assert [name for _, name in measured] == names
    assert {(shape.head_dim, shape.length) for shape, _ in measured} == {(200, 8192)}
    rows = Runtime(RuntimeSettings(cache_dir=tmp_path)).prewarm(wanted, progress=False, tune=True)
    assert {row.outcome for row in rows} == {"loaded"}
    assert len(measured) == len(names)


def test_there_is_nothing_to_tune_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cache-dir", str(tmp_path), "prewarm", "--preset", "gemma2-2b", "--tune"]
    assert cli.run(words) == 2
    assert "tune: no request is served by kernels that have options to measure" in capsys.readouterr().err
