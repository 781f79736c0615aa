"""Prewarming: from requests to kernels, each made once, failures kept apart."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, NEEDS_FLEX

from softcap_runtime import AttentionConfig, BuildFailed, EngineUnavailable, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.presets import requests_for
from softcap_runtime.prewarm.rows import Outcome, kernel_name, row_of, shown_work

CONFIG = AttentionConfig(softcap=50.0, scale=HEAD_DIM**-0.5, window=100)
WIDE = CONFIG.model_copy(update={"window": None})


def request(**changes: object) -> PrewarmRequest:
    fields = {"config": CONFIG, "num_heads": 4, "num_kv_heads": 2, "head_dim": HEAD_DIM, "dtype": "float32"}
    return PrewarmRequest(**{**fields, **changes})


def compiler(monkeypatch: pytest.MonkeyPatch, failing: str | None = None) -> list[KernelSpec]:
    """Stands in for the compiler: what was asked of it, and nothing that could be run."""
    asked: list[KernelSpec] = []

    def build(artifact: Package | CpuLibrary) -> bytes:
        spec = artifact.describe()
        asked.append(spec)
        if spec.dtype == failing:
            raise BuildFailed(f"cannot build {spec.op}: no luck\nsecond line")
        return b"kernel of " + repr(spec).encode()

    for kind in (Package, CpuLibrary):
        monkeypatch.setattr(kind, "build", build)
        monkeypatch.setattr(kind, "load", lambda artifact, data: lambda inputs: inputs)
    return asked


@NEEDS_FLEX
def test_every_kernel_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiler(monkeypatch)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, jit="forbid", engine="flex"))
    wanted = [request(), request(config=WIDE), request(num_heads=2), request(dtype="bfloat16")]
    first = runtime.prewarm(wanted, progress=False)
    kernel = KernelSpec("flex_forward", "cpu", "float32", HEAD_DIM, True)
    assert {row.spec for row in first} == {kernel, kernel._replace(dtype="bfloat16")}
    assert sorted(asked) == sorted(row.spec for row in first)
    assert all(row.outcome == "built" and row.bytes > 0 and row.error is None for row in first)
    assert {row.outcome for row in runtime.prewarm(wanted, progress=False)} == {"ready"}

    other = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex")).prewarm(wanted, progress=False)
    assert {row.outcome for row in other} == {"loaded"}
    assert {row.spec: row.bytes for row in other} == {row.spec: row.bytes for row in first}
    assert len(asked) == 2


def test_one_library_serves_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiler(monkeypatch)
    wanted = [
        request(config=config, dtype=dtype, head_dim=head_dim, train=train)
        for config in (CONFIG, WIDE, CONFIG.model_copy(update={"softcap": None}))
        for dtype in ("float32", "bfloat16", "float16")
        for head_dim in (64, 256)
        for train in (False, True)
    ]
    for engine, outcome in (("auto", "built"), ("blocked", "loaded")):
        runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine=engine))
        (row,) = runtime.prewarm(wanted, progress=False)
        assert (row.spec, row.outcome) == (library().describe(), outcome)
    assert asked == [library().describe()]
    eager = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="eager"))
    assert eager.prewarm([request(train=True)], False) == []


@NEEDS_FLEX
def test_a_failure_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, failing="bfloat16")
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex"))
    wanted = [request(seq_lens=[64], dtype=dtype) for dtype in ("float32", "bfloat16")]
    rows = {row.spec.dtype: row for row in runtime.prewarm(wanted, progress=True)}
    assert rows["bfloat16"].outcome == "failed"
    assert rows["bfloat16"].error == "cannot build flex_forward: no luck"
    assert rows["float32"].outcome == "built"
    assert runtime.stats().misses == 1, "no length is bound whose kernel is missing"


def test_bad_requests_raise_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiler(monkeypatch)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
    for bad, words in [
        (request(device="abacus"), "device: 'abacus', expected a torch device"),
        (request(device="meta"), "device: 'meta', expected cpu or cuda"),
        (request(device=f"cuda:{torch.cuda.device_count()}"), "this process sees"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            runtime.prewarm([request(), bad], progress=False)
        assert "\n" not in str(caught.value)
    with pytest.raises(EngineUnavailable, match="flex"):
        Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex")).prewarm([request(train=True)], False)
    assert asked == []


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        (request(), "requests: PrewarmRequest, expected several PrewarmRequests"),
        (None, "requests: NoneType, expected"),
        ([request(), request().model_dump()], r"requests\[1\]: dict, expected a PrewarmRequest"),
        (iter([request().config]), r"requests\[0\]: AttentionConfig"),
    ],
)
def test_what_is_no_request(tmp_path: Path, requests: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words) as caught:
        Runtime(RuntimeSettings(cache_dir=tmp_path)).prewarm(requests, progress=False)
    assert "\n" not in str(caught.value)


def test_requests_take_dtypes_and_devices_of_torch() -> None:
    wanted = request(dtype="float16", device="cuda:1")
    assert request(dtype=torch.float16, device=torch.device("cuda", 1)) == wanted
    with pytest.raises(ValueError, match=r"dtype: .* \(got 'float64'\)"):
        request(dtype=torch.float64)


def test_prewarmed_lengths_have_their_plans(warm_cache: Path, seed: int) -> None:
    lengths = random.sample(range(1, 700), 3)
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache, jit="forbid"))
    rows = runtime.prewarm([request(seq_lens=lengths, train=True)], progress=False)
    assert {row.outcome for row in rows} == {"loaded"}
    bound = runtime.stats().misses
    for length in lengths:
        q, k, v = (torch.randn(1, heads, length, HEAD_DIM) for heads in (4, 2, 2))
        runtime.attention(q, k, v, CONFIG)
        runtime.attention(q.requires_grad_(), k, v, CONFIG).sum().backward()
    stats = runtime.stats()
    assert stats.misses == bound == 2 * len(lengths)
    assert stats.hits >= 2 * len(lengths)
    assert stats.builds == 0


def test_names_tell_kernels_apart() -> None:
    one = KernelSpec("forward_kernel", "cuda", "float32", 64, True, "band")
    others = [one._replace(dtype="float16"), one._replace(head_dim=32), one._replace(capped=False)]
    assert len({kernel_name(spec) for spec in [one, one._replace(mask="intervals"), *others]}) == 5


def test_the_bar_counts_kernels_that_were_made_or_failed(capsys: pytest.CaptureFixture[str]) -> None:
    spec = KernelSpec("flex_forward", "cpu", "float32", 64, True)

    def work(ending: BaseException | None) -> tuple[Outcome, int]:
        if ending is not None:
            raise ending
        return "built", 1

    with shown_work(3, progress=True) as shown:
        for ending in (None, RuntimeError("no luck")):
            row_of(spec, shown, lambda ending=ending: work(ending))
        with pytest.raises(KeyboardInterrupt):
            row_of(spec, shown, lambda: work(KeyboardInterrupt()))
    assert "2/3" in capsys.readouterr().err.splitlines()[-1]


def test_importing_the_package_imports_no_tool() -> None:
    heavy = {
        "typer",
        "rich",
        "softcap_runtime.cli.main",
        "softcap_runtime.prewarm.prewarm",
        "softcap_runtime.report.stats",
    }
    code = f"import softcap_runtime, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_folder_is_read_as_transformers_reads_it(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    heads = random.choice([2, 4])
    config = transformers.Gemma2Config(
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=5,
        query_pre_attn_scalar=random.randint(10, 300),
        sliding_window=random.randint(2, 5000),
        attn_logit_softcapping=random.uniform(1, 60),
    )
    config.save_pretrained(tmp_path)
    expected = {AttentionConfig.from_hf(config, layer_idx=layer) for layer in range(5)}
    for source in (tmp_path, tmp_path / "config.json"):
        found = requests_for(source)
        assert {one.config for one in found} == expected
        assert {(one.num_heads, one.num_kv_heads, one.head_dim) for one in found} == {(heads, 2, 64)}

    # Before transformers 4.56 a Gemma-2 config did not list its layers' kinds; multimodal ones nest theirs.
    document = json.loads((tmp_path / "config.json").read_text())
    document.pop("layer_types")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "text_config": document}))
    assert {one.config for one in requests_for(tmp_path)} == expected


def test_a_pattern_of_sliding_layers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = SimpleNamespace(
        num_attention_heads=4, num_hidden_layers=6, head_dim=8, sliding_window=32, sliding_window_pattern=6
    )
    path.write_text(json.dumps(vars(fields)))
    assert [one.config.window for one in requests_for(path)] == [32, None]
    fields.num_hidden_layers = 5
    path.write_text(json.dumps(vars(fields)))
    (only,) = requests_for(path)
    assert (only.config.window, only.num_kv_heads, only.config.softcap) == (32, 4, None)


def test_layers_of_linear_attention_need_no_kernel(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8}
    path.write_text(json.dumps({**fields, "layer_types": ["linear_attention", "full_attention"]}))
    assert [one.config for one in requests_for(path)] == [AttentionConfig(scale=8**-0.5)]
    path.write_text(json.dumps({**fields, "layer_types": ["linear_attention"] * 2}))
    with pytest.raises(ValueError, match="'linear_attention'"):
        requests_for(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ("{}", "num_attention_heads: None, expected an integer"),
        ('{"num_attention_heads": true, "num_hidden_layers": 1}', "num_attention_heads: True"),
        ('{"num_attention_heads": 4, "num_hidden_layers": 1}', "none of query_pre_attn_scalar"),
        (
            '{"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8, "layer_types":3, "sliding_window":4}',
            "cannot be used",
        ),
        ('{"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": "x"}', "head_dim: 'x'"),
        (
            '{"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8, "sliding_window_pattern": 0}',
            "sliding_window_pattern: 0",
        ),
        (
            '{"num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": "x"}',
            "num_key_value_heads: 'x'",
        ),
    ],
)
def test_bad_model_files_are_told_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        requests_for(tmp_path / "config.json")
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)
