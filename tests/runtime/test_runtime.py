"""One look-up from a call to its kernel: one runtime a process, one build a kernel, settings, forks, stats."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import random
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import (
    HEAD_DIM,
    NEEDS_FLEX,
    UNCAPPED_HEAD_DIM,
    Sizes,
    expected,
    gradients,
    make_qkv,
    package_of,
    relative_error,
)
from torch import Tensor

from softcap_runtime import AttentionConfig, BuildFailed, KernelNotPrewarmed, Runtime, RuntimeSettings, reference
from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines.engine import Call
from softcap_runtime.engines.package import Package
from softcap_runtime.masks.intervals import RowIntervals, band, dense, row_intervals

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)
KERNEL = library()
FLEX = [
    Package("flex_forward", "cpu", "float32", HEAD_DIM, True),
    Package("flex_forward", "cpu", "float32", UNCAPPED_HEAD_DIM, False),
]
UNCAPPED = AttentionConfig(scale=0.125)


class Builder:
    """Stands in for the compiler: hands out the session's kernels, and counts."""

    def __init__(self, runtime: Runtime) -> None:
        self.built: list[Artifact] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.error: Exception | None = None
        self._runtime = runtime

    def __call__(self, spec: Artifact) -> bytes:
        self.built.append(spec)
        assert self.may_go.wait(120)
        if self.error is not None:
            raise self.error
        return package_of(self._runtime, spec)


@pytest.fixture
def builder(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builder]:
    made = Builder(runtime)
    for kind in (Package, CpuLibrary):
        monkeypatch.setattr(kind, "build", lambda artifact: made(artifact))
        monkeypatch.setattr(kind, "provenance", lambda artifact: {"compiler": "none, a test"})
    yield made
    made.may_go.set()


def in_threads(count: int, run: Callable[[], Any]) -> list[Any]:
    barrier = threading.Barrier(count)

    def start() -> Any:
        barrier.wait()
        return run()

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(start) for _ in range(count)]]


def test_one_runtime_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []

    def slowly(self: Runtime, settings: RuntimeSettings | None = None) -> None:
        time.sleep(0.05)
        made.append(self)

    monkeypatch.setattr(Runtime, "_own", None)
    monkeypatch.setattr(Runtime, "__init__", slowly)
    found = in_threads(16, Runtime.get)
    assert len(made) == 1
    assert {id(one) for one in found} == {id(made[0])}


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Runtime, "_own", None)
    monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SOFTCAP_JIT", "forbid")
    monkeypatch.setenv("SOFTCAP_ENGINE", "blocked")
    runtime = Runtime.get()
    assert runtime is Runtime.get()
    assert (runtime.settings.jit, runtime.settings.engine) == ("forbid", "blocked")
    assert runtime.supply.store.folder == tmp_path
    with pytest.raises(KernelNotPrewarmed, match=r"^kernel attention is not in the cache; "):
        runtime.attention(*make_qkv(Sizes(1, 2, 1, 4, 4)), CONFIG)


def test_instances_of_your_own_are_apart(runtimes: dict[str, Runtime], tmp_path: Path, seed: int) -> None:
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    eager, forbids = runtimes["eager"], Runtime(RuntimeSettings(cache_dir=tmp_path, jit="forbid"))
    out = eager.attention(*inputs, CONFIG)
    assert relative_error(out, expected(*inputs, CONFIG)) <= 2e-6
    for _ in range(2):
        with pytest.raises(KernelNotPrewarmed):
            forbids.attention(*inputs, CONFIG)
    assert torch.equal(eager.attention(*inputs, CONFIG), out)


def test_a_model_that_holds_a_runtime_is_copied_and_pickled(
    runtimes: dict[str, Runtime], own_runtime: Runtime, seed: int
) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runtime = runtimes["eager"]

    assert torch.optim.swa_utils.AveragedModel(Model()).module.runtime is runtimes["eager"]
    copied = pickle.loads(pickle.dumps(runtimes["eager"]))
    assert copied.settings == runtimes["eager"].settings
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    assert torch.equal(copied.attention(*inputs, CONFIG), runtimes["eager"].attention(*inputs, CONFIG))
    assert pickle.loads(pickle.dumps(own_runtime)) is own_runtime


def test_threads_that_need_the_same_kernel_build_it_once(builder: Builder, tmp_path: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="blocked"))
    inputs = make_qkv(Sizes(2, 4, 2, 50, 50))
    builder.may_go.clear()
    threading.Timer(0.3, builder.may_go.set).start()
    outs = in_threads(16, lambda: runtime.attention(*inputs, CONFIG))
    assert builder.built == [KERNEL]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert relative_error(outs[0], expected(*inputs, CONFIG)) <= 2e-6
    # Another runtime, as another process: from disk.
    other = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="blocked"))
    assert torch.equal(other.attention(*inputs, CONFIG), outs[0])
    assert other.supply.supplied[KERNEL].source == "disk"
    assert builder.built == [KERNEL]


def test_many_threads_with_many_shapes(runtime: Runtime, seed: int) -> None:
    fresh = Runtime(runtime.settings)
    kinds = [make_qkv(Sizes(1, 4, 2, length, length)) for length in (3, 70, 129, 200)]
    wants = [expected(*inputs, CONFIG) for inputs in kinds]

    def run() -> float:
        errors = []
        for _ in range(10):
            for inputs, want in zip(kinds, wants, strict=True):
                errors.append(relative_error(fresh.attention(*inputs, CONFIG), want))
        return max(errors)

    assert max(in_threads(8, run)) <= 2e-6


def test_a_failed_build_is_not_remembered(builder: Builder, tmp_path: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    builder.error = BuildFailed("cannot build attention: no luck")
    with pytest.raises(BuildFailed, match="no luck"):
        runtime.attention(*inputs, CONFIG)
    builder.error = None
    assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6
    assert builder.built == [KERNEL, KERNEL]


def test_jit_forbid_names_the_command(builder: Builder, tmp_path: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, jit="forbid", engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    with pytest.raises(KernelNotPrewarmed) as raised:
        runtime.attention(*inputs, CONFIG)
    text = str(raised.value)
    assert "\n" not in text
    for words in (
        f"SOFTCAP_CACHE_DIR={tmp_path}",
        "softcap-runtime prewarm",
        "--num-heads 4",
        "--num-kv-heads 2",
        f"--head-dim {HEAD_DIM}",
        "--softcap 50.0",
        "--dtype float32",
        "--engine blocked",
    ):
        assert words in text
    assert not builder.built
    # As the command does it.
    Runtime(RuntimeSettings(cache_dir=tmp_path, engine="blocked")).supply.get(KERNEL)
    assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6


def test_jit_warn_logs_and_builds(
    builder: Builder, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, jit="warn", engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    with caplog.at_level(logging.WARNING, logger="softcap_runtime"):
        for _ in range(3):
            runtime.attention(*inputs, CONFIG)
    warnings = [record.getMessage() for record in caplog.records if "serving process" in record.getMessage()]
    assert len(warnings) == 1
    assert "softcap-runtime prewarm" in warnings[0]
    assert builder.built == [KERNEL]
    stats = runtime.stats()
    assert (stats.builds, stats.misses, stats.hits) == (1, 1, 2), "what was built is planned at once"


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in a minute")


def test_built_in_the_background(
    builder: Builder, runtimes: dict[str, Runtime], tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, jit="warn", build="background", engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 150, 150))
    builder.may_go.clear()
    want = runtimes["eager"].attention(*inputs, CONFIG)
    for _ in range(5):
        assert torch.equal(runtime.attention(*inputs, CONFIG), want)
    assert runtime.stats().background_pending == 1
    assert not runtime.supply.supplied
    builder.may_go.set()
    wait_until(lambda: runtime.stats().background_pending == 0)
    want = runtimes["blocked"].attention(*inputs, CONFIG)
    for _ in range(3):
        assert torch.equal(runtime.attention(*inputs, CONFIG), want)
    assert builder.built == [KERNEL]
    assert {row.engine for row in runtime.stats().engines} == {"blocked"}
    assert caplog.text.count("serving process") == 1


def test_a_background_build_that_fails_is_told_and_not_repeated(
    builder: Builder, runtimes: dict[str, Runtime], tmp_path: Path, seed: int
) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, build="background", engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    builder.error = BuildFailed("cannot build attention: no luck")
    want = runtimes["eager"].attention(*inputs, CONFIG)
    assert torch.equal(runtime.attention(*inputs, CONFIG), want)
    wait_until(lambda: bool(runtime.stats().background_failed) and runtime.stats().background_pending == 0)
    for _ in range(3):
        assert torch.equal(runtime.attention(*inputs, CONFIG), want)
    assert builder.built == [KERNEL]
    (failed,) = runtime.stats().background_failed.values()
    assert "no luck" in failed


def in_a_fork(run: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    wait_until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
    assert os.waitpid(pid, 0)[1] == 0


@NEEDS_FLEX
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle(
    runtimes: dict[str, Runtime], request: pytest.FixtureRequest, tmp_path: Path, seed: int
) -> None:
    """While a thread of the parent builds a kernel and holds its locks."""
    for kernel in FLEX:
        runtimes["flex"].supply.get(kernel)  # by the real compiler, if it is not there yet
    builder: Builder = request.getfixturevalue("builder")
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    want = runtime.attention(*inputs, CONFIG)
    ids = (torch.rand(1, 20) < 0.3).cumsum(1)
    packed = make_qkv(Sizes(1, 4, 2, 20, 20, UNCAPPED_HEAD_DIM))
    masked = expected(*packed, UNCAPPED, document_ids=ids)
    builder.may_go.clear()
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(lambda: runtime.attention(*packed, UNCAPPED, document_ids=ids))
        wait_until(lambda: len(builder.built) == 2)

        def child() -> None:
            assert torch.equal(runtime.attention(*inputs, CONFIG), want)
            other = make_qkv(Sizes(1, 4, 2, 33, 33))
            assert relative_error(runtime.attention(*other, CONFIG), expected(*other, CONFIG)) <= 2e-6

        in_a_fork(child)
        builder.may_go.set()
        assert relative_error(building.result(), masked) <= 2e-6

    def second_child() -> None:
        out = runtime.attention(*packed, UNCAPPED, document_ids=ids)
        assert relative_error(out, masked) <= 2e-6
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        with pytest.raises(Exception, match="no backward"):
            runtime.attention(q, k, v, CONFIG)

    in_a_fork(second_child)
    assert len(builder.built) == 2


def test_a_cache_folder_that_is_a_file(builder: Builder, tmp_path: Path, seed: int) -> None:
    """It works from memory and says so."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    runtime = Runtime(RuntimeSettings(cache_dir=file, engine="blocked"))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    for _ in range(2):
        assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6
    fault = runtime.stats().cache_fault
    assert fault is not None
    assert str(file) in fault
    assert "\n" not in fault
    assert builder.built == [KERNEL]
    assert file.read_text() == "not a folder"


def test_hits_and_misses(runtime: Runtime, seed: int) -> None:
    fresh = Runtime(runtime.settings)
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    for _ in range(10):
        fresh.attention(*inputs, CONFIG)
    stats = fresh.stats()
    assert (stats.misses, stats.hits) == (1, 9)
    assert (stats.builds, stats.loads) == (0, 1)
    assert stats.package_bytes > 0
    assert len(fresh.plans.shortcuts) == 1


def test_a_backward_looks_up_as_well(runtimes: dict[str, Runtime]) -> None:
    fresh = Runtime(runtimes["eager"].settings)
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(1, 4, 2, 20, 20))]
    for _ in range(3):
        fresh.attention(*inputs, CONFIG).sum().backward()
    assert (fresh.stats().misses, fresh.stats().hits) == (1, 5)


def test_shortcuts_see_every_difference(runtimes: dict[str, Runtime], seed: int) -> None:
    """Calls that look alike but for one thing: lengths, strides, dtypes, configs, gradients, masks."""
    runtime = Runtime(runtimes["auto"].settings)
    calls: list[tuple[Any, AttentionConfig, dict[str, torch.Tensor]]] = []
    for sizes in (Sizes(1, 4, 2, 20, 20), Sizes(1, 4, 4, 20, 20), Sizes(2, 4, 2, 20, 20), Sizes(1, 4, 2, 19, 20)):
        for layout in ("transposed", "contiguous", "strided"):
            for config in (
                CONFIG,
                CONFIG.model_copy(update={"window": 3}),
                CONFIG.model_copy(update={"causal": False}),
                CONFIG.model_copy(update={"scale": 0.2}),
                CONFIG.model_copy(update={"softcap": 5.0}),
                CONFIG.model_copy(update={"softcap": None}),
            ):
                inputs = make_qkv(sizes, layout=layout)
                calls.append((inputs, config, {}))
                padding = torch.ones(sizes.batch, 20, dtype=torch.int64)
                padding[0, : random.randint(0, 10)] = 0
                calls.append((inputs, config, {"attention_mask": padding}))
    for _ in range(3):
        random.shuffle(calls)
        for inputs, config, masks in calls:
            want = expected(*inputs, config, **masks)
            assert relative_error(runtime.attention(*inputs, config, **masks), want) <= 2e-6
            if random.random() < 0.1:
                leaf = inputs[0].detach().requires_grad_()
                out = runtime.attention(leaf, *inputs[1:], config, **masks)
                assert out.requires_grad
                assert relative_error(out, want) <= 2e-6


def test_plans_are_bounded(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("softcap_runtime.plans.MAX_PLANS", 5)
    runtime = Runtime(runtimes["eager"].settings)
    for _ in range(2):
        for length in range(1, 14):
            inputs = make_qkv(Sizes(1, 2, 1, length, length, 8))
            assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6
            assert len(list(runtime.plans.items())) <= 5
    assert runtime.stats().misses == 26


def test_plans_go_when_a_mask_is_evicted(runtimes: dict[str, Runtime]) -> None:
    """They hold the masks they are bound to: the memory's bound would be none."""
    runtime = Runtime(runtimes["flex"].settings)
    masks = runtime.supply.masks
    for length in (310, 300):
        for _ in range(3):
            runtime.attention(*make_qkv(Sizes(1, 4, 2, length, length)), CONFIG)
        masks.limit_bytes = masks.bytes
    assert masks.evictions == 1
    assert [key.q_shape[2] for key, _ in runtime.plans.items()] == [300]
    assert (runtime.stats().misses, runtime.stats().hits) == (2, 4)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("rows", [1, 3])
def test_masks_with_holes(runtimes: dict[str, Runtime], window: int | None, rows: int, seed: int) -> None:
    """Keys between visible ones are hidden: forward, gradients, decoding, beside documents and with one row for all."""
    config = AttentionConfig(softcap=30.0, scale=0.1, window=window)
    keep = torch.rand(rows, 60) < 0.6
    keep[0, :20] = False  # rows that see nothing
    for q_len, engine in ((60, "auto"), (60, "eager"), (1, "auto"), (7, "auto")):
        q, k, v = make_qkv(Sizes(3, 4, 2, q_len, 60))
        masks = {"attention_mask": keep, "document_ids": (torch.arange(60) // 25)[None]}
        grad = torch.randn_like(q)

        def run(q: Tensor, k: Tensor, v: Tensor, engine: str = engine, masks: Any = masks) -> Tensor:
            return runtimes[engine].attention(q, k, v, config, **masks)

        def want(q: Tensor, k: Tensor, v: Tensor, masks: Any = masks) -> Tensor:
            return expected(q, k, v, config, **masks)

        got_out, got = gradients(run, (q, k, v), grad)
        out, grads = gradients(want, tuple(x.double() for x in (q, k, v)), grad)
        assert relative_error(got_out, out) <= 2e-6
        for mine, theirs in zip(got, grads, strict=True):
            assert relative_error(mine, theirs) <= 5e-6
        assert relative_error(run(q, k, v), out) <= 2e-6  # inference has other kernels


def test_a_plan_serves_every_mask_of_its_form(
    runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Contents come with the call: none is kept, and each is the one that is seen."""
    # What dense compiles is compared over many masks in tests/engines; here it is what binds it that may keep one.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for engine in ("flex", "blocked", "dense", "eager"):
        runtime = Runtime(runtimes[engine].settings)
        inputs = [x.requires_grad_(engine != "flex") for x in make_qkv(Sizes(2, 4, 2, 70, 70))]
        kept = []
        for _ in range(4):
            ids = (torch.rand(2, 70) < 0.1).cumsum(1)
            mask = row_intervals(70, 70, causal=True, window=None, document_ids=ids)
            out = runtime.attend(*inputs, CONFIG, mask)
            want = expected(*inputs, CONFIG, document_ids=ids)
            assert relative_error(out, want) <= 2e-6
            if out.requires_grad:
                grad_out = torch.randn_like(out)
                mine = torch.autograd.grad(out, inputs, grad_out)
                exact = torch.autograd.grad(want, inputs, grad_out.to(want.dtype))
                assert all(relative_error(a, b) <= 3e-6 for a, b in zip(mine, exact, strict=True))
            kept += [weakref.ref(x) for x in mask.vectors]
            del mask, out
        gc.collect()
        assert not any(vector() is not None for vector in kept)
        assert runtime.stats().misses == 1


@pytest.mark.parametrize("engine", ["flex", "blocked", "dense", "eager"])
@pytest.mark.parametrize("train", [False, True])
def test_vectors_of_a_mask_that_lie_otherwise(
    runtimes: dict[str, Runtime], engine: str, train: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The last rows of a longer mask, one row for all, every second one: read as they stand."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    runtime, train = Runtime(runtimes[engine].settings), train and engine != "flex"
    q, k, v = (x.requires_grad_(train) for x in make_qkv(Sizes(2, 4, 2, 30, 70)))
    kept = (torch.rand(2, 70) < 0.7).repeat_interleave(2, 1)
    long = row_intervals(70, 70, causal=True, window=9, attention_mask=kept[:, ::2].contiguous())
    assert long.lo is not None
    assert long.hi is not None
    assert long.kept is not None
    wide = long.kept.repeat_interleave(2, 1)
    for lo, hi, each in (
        (long.lo[:, 40:], long.hi[:, 40:], wide[:, ::2]),
        (long.lo[:1, 40:].expand(2, -1), long.hi[:1, 40:].expand(2, -1), long.kept[:1].expand(2, -1)),
    ):
        mask = RowIntervals(30, 70, None, None, lo, hi, each)
        given = (x.double() for x in (q, k, v))
        want = reference.attention(*given, dense(mask, "cpu"), scale=CONFIG.scale, softcap=CONFIG.softcap)[0]
        for _ in range(2):  # the second by the plan of the first
            out = runtime.attend(q, k, v, CONFIG, mask)
            assert relative_error(out, want) <= 2e-6
        if train:
            grad_out = torch.randn_like(out)
            mine = torch.autograd.grad(out, (q, k, v), grad_out)
            exact = torch.autograd.grad(want, (q, k, v), grad_out.double())
            assert all(relative_error(a, b) <= 3e-6 for a, b in zip(mine, exact, strict=True))


def test_a_mask_of_other_lengths(runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 2, 1, 9, 20))
    for mask in (
        band(9, 19, causal=True, window=None),
        row_intervals(20, 20, causal=True, window=None, document_ids=torch.zeros(1, 20, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match=r"^mask: made for .* queries over .* keys, expected 9 over 20$"):
            runtime.attend(q, k, v, CONFIG, mask)


def test_arguments_of_other_types(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match=r"^mask: Tensor, expected RowIntervals; make them with row_intervals"):
        runtime.attend(*make_qkv(Sizes(1, 2, 1, 9, 9)), CONFIG, torch.ones(9, 9))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^settings: dict, expected RuntimeSettings; make them with"):
        Runtime({"jit": "forbid"})  # type: ignore[arg-type]


# Lengths, windows, caps and masks are arguments of few kernels


def test_200_lengths_cost_at_most_4_kernels(runtime: Runtime, seed: int) -> None:
    fresh = Runtime(runtime.settings)
    for length in random.sample(range(1, 700), 200):
        config = CONFIG.model_copy(update={"window": random.choice([None, 5, 300])})
        q_len = random.choice([1, length, random.randint(1, length)])
        inputs = make_qkv(Sizes(random.randint(1, 2), 2, 1, q_len, length))
        out = fresh.attention(*inputs, config)
        if random.random() < 0.1:
            assert relative_error(out, expected(*inputs, config)) <= 2e-6
    assert len(fresh.supply.supplied) <= 4


def test_200_packings_cost_no_kernel_after_the_first(runtime: Runtime, seed: int) -> None:
    fresh = Runtime(RuntimeSettings(cache_dir=runtime.settings.cache_dir, engine="blocked"))
    known = None
    for number in range(200):
        batch, length = random.randint(1, 2), random.randint(2, 260)
        ids = (torch.rand(batch, length) < random.choice([0.01, 0.1, 0.9])).cumsum(1)
        inputs = make_qkv(Sizes(batch, 2, 1, length, length))
        out = fresh.attention(*inputs, CONFIG, document_ids=ids)
        known = known or dict(fresh.supply.supplied)
        if number % 20 == 0:
            assert relative_error(out, expected(*inputs, CONFIG, document_ids=ids)) <= 2e-6
    assert fresh.supply.supplied == known
    assert len(fresh.supply.supplied) == 1


def test_1000_lengths_bind_no_new_kernel(runtime: Runtime, seed: int) -> None:
    """The heads of gemma2-2b, which cost nothing here: a plan reads shapes, dtypes and devices alone."""
    fresh = Runtime(RuntimeSettings(cache_dir=runtime.settings.cache_dir))
    one = torch.empty(1, 1, 1, 1)
    known = None
    for number in range(1000):
        # The first two need what the rest may: the kernels of a small and of a large call.
        length = (1, 4096)[number] if number < 2 else random.randint(1, 4096)
        batch, window = random.randint(1, 4), random.choice([None, 4096, 512])
        q, k = one.expand(batch, 8, length, HEAD_DIM), one.expand(batch, 4, length, HEAD_DIM)
        mask = band(length, length, causal=True, window=window)
        fresh.plan(q, k, Call(mask, CONFIG.scale, CONFIG.softcap, "auto", False))
        if number == 1:
            known = dict(fresh.supply.supplied)
    assert fresh.supply.supplied == known
    assert len(fresh.supply.supplied) <= 2


@pytest.mark.parametrize("engine", ["auto", "blocked"])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 8, 8), (2, 0, 8), (2, 0, 0), (2, 8, 0)])
@pytest.mark.parametrize("mask", [None, "attention_mask", "document_ids", "spans"])
def test_empty_tensors(
    runtimes: dict[str, Runtime], engine: str, batch: int, rows: int, keys: int, mask: str | None
) -> None:
    runtime = runtimes[engine]
    config = AttentionConfig(scale=0.1, softcap=30.0, window=4, causal=rows <= keys)
    contents = {"attention_mask": torch.ones(batch, keys, dtype=torch.bool), "spans": torch.zeros(batch, 1, 2).long()}
    contents["document_ids"] = torch.zeros(batch, max(rows, keys)).long()
    if mask == "document_ids" and rows > keys:
        return  # one id for each row is asked for
    masks = {} if mask is None else {mask: contents[mask]}
    for _ in range(2):  # the second call finds its plan
        q = torch.randn(batch, 4, rows, 16, requires_grad=True)
        k, v = (torch.randn(batch, 2, keys, 16, requires_grad=True) for _ in range(2))
        out = runtime.attention(q, k, v, config, **masks)
        assert out.shape == q.shape
        assert not out.any()
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()
        with torch.no_grad():
            assert runtime.attention(q, k, v, config, **masks).shape == q.shape


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("engine", ["blocked", "eager"])
def test_attend_checks_what_it_is_given(runtimes: dict[str, Runtime], engine: str, train: bool, seed: int) -> None:
    """A kernel would read past the end of a tensor that does not fit the others."""
    mask, config = row_intervals(64, 64, causal=True, window=None), AttentionConfig(softcap=50.0, scale=0.1)
    q, k, v = (torch.randn(1, heads, 64, 32, requires_grad=train) for heads in (4, 2, 2))
    for wrong, told in (
        ((q, k, v[..., :8]), "v: head_dim 8, expected q's 32"),
        ((q, k, v[:, :, :8]), "v: shape"),
        ((q, k[:, :1], v), "v: shape"),
        ((q, k.bfloat16(), v.bfloat16()), "k.dtype: torch.bfloat16, expected q's"),
        ((q.expand(3, -1, -1, -1), k, v), "k: batch 1, expected q's 3"),
        ((q[:, :3], k, v), "q: 3 heads, expected a multiple of the 2 key heads"),
    ):
        with pytest.raises(ValueError, match=told):
            runtimes[engine].attend(*wrong, config, mask)
    assert runtimes[engine].attend(q, k, v, config, mask).shape == q.shape
    mask = row_intervals(64, 64, causal=True, attention_mask=torch.ones(3, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask\.lo: .* expected int32 \(1, 64\) .*; make it for this batch and"):
        runtimes[engine].attend(q, k, v, config, mask)
