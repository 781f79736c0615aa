"""What a process that starts anew does: no compiler where the cache is warm, clear words where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, NEEDS_FLEX

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime

COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "sympy")


def run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter that finds no program at all on its path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOFTCAP_", "CXX"))}
    settings = {**clean, "SOFTCAP_CACHE_DIR": str(cache), "PATH": "/nowhere", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False, timeout=200
    )


def succeeds(code: str, cache: Path, **environment: str) -> str:
    done = run(code, cache, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = "[name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]"

SERVE = f"""
import sys, torch
from types import SimpleNamespace
import gc
import softcap_runtime as s
assert gc.isenabled()  # an import pauses it
assert gc.get_freeze_count() == 0  # and freezes nothing for good
assert not {LOADED}, "import"
runtime = s.Runtime.get()
layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=50.0, query_pre_attn_scalar=64))
torch.manual_seed(SEED)
digest = []
for length in (1, 77, 300):
    q, k, v = torch.randn(2, 4, length, {HEAD_DIM}), *torch.randn(2, 2, 2, length, {HEAD_DIM})
    ids = (torch.rand(2, length) < 0.1).cumsum(1)
    for window in (None, 20):
        config = s.AttentionConfig(softcap=50.0, scale=0.125, window=window)
        for masks in ({{}}, {{"document_ids": ids}}):
            out = runtime.attention(q, k, v, config, **masks)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            runtime.attention(*leaves, config, **masks).sum().backward()
            digest += [out, *(x.grad for x in leaves)]
    plain = torch.ones(length, length).tril() > 0
    for mask in (None, plain):
        digest.append(s.slow_attention_softcapping(q, k, v, mask, layer, 2, length))
        digest.append(s.slow_inference_attention_softcapping(q, k, v, mask, layer, 2, length))
torch.save(digest, OUT)
"""


@pytest.fixture
def prewarmed(runtime: Runtime) -> Path:
    config = AttentionConfig(softcap=50.0, scale=0.125)
    request = PrewarmRequest(config=config, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype="float32", train=True)
    assert all(row.error is None for row in runtime.prewarm([request], progress=False))
    return Path(runtime.settings.cache_dir)


def test_a_warm_process_compiles_nothing(prewarmed: Path, tmp_path: Path, seed: int) -> None:
    end = f"""
assert not {LOADED}, {LOADED}
assert {{one.source for one in runtime.supply.supplied.values()}} == {{"disk"}}
assert runtime.stats().builds == 0 and runtime.stats().loads == 1
"""
    code = SERVE.replace("SEED", str(seed)).replace("OUT", repr(str(tmp_path / "private.pt")))
    succeeds(code + end, prewarmed, SOFTCAP_JIT="forbid")
    # The same through public paths alone.
    code = code.replace("private.pt", "public.pt")
    succeeds(code, prewarmed, SOFTCAP_JIT="forbid", SOFTCAP_PUBLIC_TORCH_ONLY="1", PATH=os.environ["PATH"])
    private, public = (torch.load(tmp_path / f"{name}.pt") for name in ("private", "public"))
    assert len(private) > 40
    assert all(torch.equal(one, two) for one, two in zip(private, public, strict=True))


def test_importing_imports_no_compiler(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import softcap_runtime
print(*sorted(set(sys.modules) - before))
"""
    new = set(succeeds(code, tmp_path).split())
    assert "softcap_runtime" in new
    for name in (*COMPILERS, "transformers", "matplotlib", "rich", "typer", "numpy"):
        assert name not in new
    assert not list(tmp_path.iterdir())  # nor touches the cache


def test_nothing_prewarmed_and_no_compiler(tmp_path: Path) -> None:
    code = """
import torch, softcap_runtime as s
runtime = s.Runtime.get()
q = torch.randn(1, 2, 8, 64)
config = s.AttentionConfig(softcap=50.0, scale=0.125)
try:
    runtime.attention(q, q, q, config)
except ERROR as error:
    text = str(error)
    assert "\\n" not in text
    print(text)
    assert s.Runtime(s.RuntimeSettings(engine="eager")).attention(q, q, q, config).shape == q.shape
"""
    said = succeeds(code.replace("ERROR", "s.BuildFailed"), tmp_path)
    assert "no C++ compiler found" in said
    assert "g++" in said
    said = succeeds(code.replace("ERROR", "s.KernelNotPrewarmed"), tmp_path, SOFTCAP_JIT="forbid")
    assert "softcap-runtime prewarm" in said
    assert "--head-dim 64" in said


def test_one_bad_setting_is_one_line(tmp_path: Path) -> None:
    done = run("import softcap_runtime as s; s.Runtime.get()", tmp_path, SOFTCAP_ENGINE="fast")
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("ValueError: RuntimeSettings: environment variable SOFTCAP_ENGINE: ")
    )


@NEEDS_FLEX
def test_two_cold_processes_build_once(runtime: Runtime, tmp_path: Path, seed: int) -> None:
    """They start together and need the same kernel; the compiler is a stand-in that takes its time."""
    from softcap_runtime.engines.package import Package

    spec = Package("flex_forward", "cpu", "float32", HEAD_DIM, True)
    runtime.supply.get(spec)
    data: Any = runtime.supply.store.load(spec.key())
    (tmp_path / "kernel.pt2").write_bytes(data)
    code = f"""
import os, time, torch, softcap_runtime as s
from softcap_runtime.engines.package import Package
def build(spec):
    with open({str(tmp_path / "builds")!r}, "a") as log: log.write(f"{{os.getpid()}}\\n")
    time.sleep(1)
    return open({str(tmp_path / "kernel.pt2")!r}, "rb").read()
Package.build, Package.provenance = build, lambda spec: dict()
q = torch.randn(1, 2, 8, 64)
out = s.Runtime.get().attention(q, q, q, s.AttentionConfig(softcap=50.0, scale=0.125))
assert out.shape == q.shape
"""
    clean = {**os.environ, "SOFTCAP_CACHE_DIR": str(tmp_path / "cache"), "SOFTCAP_ENGINE": "flex"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=clean) for _ in range(3)]
    assert [process.wait(200) for process in processes] == [0, 0, 0]
    assert len((tmp_path / "builds").read_text().split()) == 1
