"""The library as an artifact, and in processes: what is wrong with it is named, nothing wrong is loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import Sizes, expected, gradients, make_qkv, relative_error
from support.workers import results_of

from softcap_runtime import AttentionConfig, BuildFailed, Runtime, RuntimeSettings, SoftcapRuntimeError
from softcap_runtime.artifacts import sources
from softcap_runtime.cpu import library as cpu_library
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines import blocked_cpu as blocked

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)
ROOT = Path(cpu_library.__file__).resolve().parents[2]


def script(folder: Path, name: str, text: str) -> str:
    """A program in ``folder``; its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_header_that_the_compiler_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "c++", 'exec g++ -include nowhere.h "$@"'))
    with pytest.raises(
        BuildFailed,
        match=r"^cannot build attention \(exit \d+\): .*fatal error: nowhere\.h: No such file or directory$",
    ):
        library().build()


@pytest.mark.parametrize("code", [0, 3])
def test_a_compiler_that_makes_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "c++", f"exit {code}"))
    with pytest.raises(BuildFailed, match=rf"^cannot build attention \(exit {code}\): no message; [^\n]*set CXX to"):
        library().build()


def test_a_library_that_does_not_run_here_fails_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the process that serves: its probe dies in a child."""
    source = tmp_path / "other.c"
    source.write_text("long softcap_arithmetic(void) { __builtin_trap(); }")
    words = f'case "$1" in -shared) exec gcc -shared -fPIC {source} -o kernel.so ;; *) touch kernel.o ;; esac'
    monkeypatch.setenv("CXX", script(tmp_path, "c++", words))
    with pytest.raises(BuildFailed, match=r"^cannot build attention: its builder died of SIG(ILL|TRAP); "):
        library().build()


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package's C++ files, to be changed."""
    shutil.copytree(ROOT / "softcap_runtime" / "cpu", tmp_path / "cpu")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    sources.digest.cache_clear()
    yield tmp_path / "cpu"
    sources.digest.cache_clear()


def test_every_source_that_is_compiled_is_in_the_key(copied_sources: Path) -> None:
    files = {path.name for path in copied_sources.iterdir() if path.suffix in (".cpp", ".h")}
    assert files == {cpu_library.MAIN, *cpu_library.HEADERS}
    seen = {library().key().digest}
    for name in sorted(files):
        with open(copied_sources / name, "a") as file:
            file.write("// edited\n")
        sources.digest.cache_clear()
        seen.add(library().key().digest)
    assert len(seen) == 1 + len(files)
    (copied_sources / "decode.h").unlink()
    sources.digest.cache_clear()
    with pytest.raises(SoftcapRuntimeError, match=r"^source cpu/decode\.h of a kernel is missing from "):
        library().key()


def test_another_cpu_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {CpuLibrary(name).key().digest for name in ("AVX512", "AVX2", "DEFAULT")}
    own = cpu_library.fingerprint("cpu")
    monkeypatch.setattr(cpu_library, "fingerprint", lambda device: {**own, "cpu": "AVX512 of another machine"})
    seen.add(library().key().digest)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not what this version writes; run: softcap-runtime clear"),
        (b"no library", "is not what this version writes; run: softcap-runtime clear"),
        (b"\xff\xfe\n", "is not what this version writes; run: softcap-runtime clear"),
        (b"[1]\n", "is not what this version writes; run: softcap-runtime clear"),
        (b'{"arithmetic": null}\n', "is not what this version writes; run: softcap-runtime clear"),
        (b'{"arithmetic": 1, "fetch": 0}\n', "cannot be loaded: .*; raise this process's limits .* clear"),
        (b'{"arithmetic": 1, "fetch": 0}\n\x7fELF and no more', "cannot be loaded: .* clear"),
    ],
)
def test_bytes_that_are_no_library(data: bytes, words: str) -> None:
    with pytest.raises(SoftcapRuntimeError, match=f"kernel attention {words}$") as raised:
        library().load(data)
    assert "\n" not in str(raised.value)


def test_another_program_s_library(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int other(void) { return 1; }")
    command = ["gcc", "-shared", "-fPIC", "other.c", "-o", "other.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = json.dumps({"arithmetic": 1, "fetch": 0}).encode() + b"\n" + (tmp_path / "other.so").read_bytes()
    with pytest.raises(SoftcapRuntimeError, match=r"^kernel attention cannot be loaded: .*softcap_forward.* clear$"):
        library().load(data)


NARROW = """
import sys, torch
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, reference
assert torch.backends.cpu.get_cpu_capability() == sys.argv[2]
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1]))
torch.manual_seed(int(sys.argv[3]))
config, seen = AttentionConfig(softcap=50.0, scale=0.125), torch.ones(1, 90, 90).tril() > 0
for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
    q, k, v = (torch.randn(2, heads, 90, 64).to(dtype).requires_grad_() for heads in (4, 2, 2))
    out = runtime.attention(q, k, v, config)
    want = reference.attention(q.double(), k.double(), v.double(), seen, scale=0.125, softcap=50.0)[0]
    assert ((out - want).norm() / want.norm()) < most
    for mine, exact in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, want))):
        assert ((mine - exact).norm() / exact.norm()) < 2 * most
(one,) = runtime.supply.supplied
assert one.capability == sys.argv[2]
"""


@pytest.mark.parametrize(("setting", "capability"), [("avx2", "AVX2"), ("default", "DEFAULT")])
def test_a_process_that_may_use_less_has_a_library_of_its_own(
    warm_cache: Path, setting: str, capability: str, seed: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NARROW, str(warm_cache), capability, str(seed)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": setting},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


FORK = """
import os, signal, sys, torch
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
torch.set_num_threads(int(sys.argv[2]))
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1], jit="forbid"))
config = AttentionConfig(softcap=50.0, scale=0.125)
q, k, v = (torch.randn(1, heads, 300, 64, requires_grad=True) for heads in (4, 2, 2))
grad = torch.randn(q.shape)
def step():
    out = runtime.attention(q, k, v, config)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
want = step()
for generation in range(2):  # a child, and its own
    pid = os.fork()
    if pid:
        break
    signal.alarm(60)
    got = step()
    torch.set_num_threads(1)  # what follows is torch's own work, which would wait for the parent's threads
    for mine, theirs in zip(got, want):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
if pid:
    ended = os.waitpid(pid, 0)[1]
    assert ended == 0, ended
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(step(), want))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_of_a_process_that_has_computed(warm_cache: Path, threads: int) -> None:
    """OpenMP's threads are not in it: waiting for them would never end."""
    command = [sys.executable, "-c", FORK, str(warm_cache), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_of_a_process_that_has_not_computed_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_alone", False)
    for threaded in (False, True):
        monkeypatch.setattr(blocked, "_threaded", threaded)
        blocked._in_forked_child()
        assert blocked._alone is threaded


def spawned(folder: str, results: Any) -> None:
    inputs = make_qkv(Sizes(1, 4, 2, 150, 150))
    runtime = Runtime(RuntimeSettings(cache_dir=folder, jit="forbid"))
    results.put(relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)))


def test_spawned_processes(warm_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=spawned, args=(str(warm_cache), results)) for _ in range(2)]
    assert max(results_of(workers, results)) <= 2e-6


MEMORY = """
import resource, sys, torch
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
torch.set_num_threads(1)
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1], jit="forbid"))
config = AttentionConfig(softcap=50.0, scale=0.125)
rows, heads, keys = (int(word) for word in sys.argv[2:])
small = torch.randn(1, 1, 300, 64)
runtime.attention(small, small, small, config)
q, k = (torch.randn(1, 1, length, 64).expand(1, heads, length, 64) for length in (rows, keys))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + heads * rows * 64 * 4 + (16 << 20), before[1]))
try:
    runtime.attention(q, k, k, config)
    raise AssertionError("it had memory")
except MemoryError as error:
    assert str(error).startswith("attention: out of memory for its buffers; "), error
    assert "\\n" not in str(error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert runtime.attention(q, k, k, config).isfinite().all()
"""


@pytest.mark.parametrize(("rows", "heads", "keys"), [(1, 100_000, 4), (20, 4000, 64)])
def test_a_process_that_is_out_of_memory(warm_cache: Path, rows: int, heads: int, keys: int) -> None:
    """There is room for the output and for none of the buffers; and the next call is none the worse for it."""
    command = [sys.executable, "-c", MEMORY, str(warm_cache), str(rows), str(heads), str(keys)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr


def test_inference_mode(runtime: Runtime, seed: int) -> None:
    inputs = make_qkv(Sizes(1, 4, 2, 60, 60))
    want = runtime.attention(*inputs, CONFIG)
    with torch.inference_mode():
        inside = [x.clone() for x in inputs]
        out = runtime.attention(*inside, CONFIG)
        assert torch.equal(out, want)
        assert out.is_inference()
    with torch.no_grad():
        assert torch.equal(runtime.attention(*inside, CONFIG), want)
    _, got = gradients(lambda *x: runtime.attention(*x, CONFIG), inputs, want)
    _, exact = gradients(lambda *x: expected(*x, CONFIG), inputs, want)
    assert all(relative_error(a, b) <= 2e-6 for a, b in zip(got, exact, strict=True))


def test_threads_of_one_process_call_at_once(runtime: Runtime, seed: int) -> None:
    """Through one plan, with more layouts than are kept: a description lives as long as its call."""
    q, k, v = make_qkv(Sizes(1, 4, 2, 40, 40))
    want = runtime.attention(q, k, v, CONFIG)
    wrong: list[int] = []

    def work(first: int) -> None:
        for number in range(first, first + 2 * blocked.MAX_LAYOUTS):
            room = torch.empty(1, 2, 40, 64 + 16 * number)[..., :64].copy_(k)
            if not torch.equal(runtime.attention(q, room, v, CONFIG), want):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
