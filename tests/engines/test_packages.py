"""Packages: only the right one is ever loaded, and what is wrong with one is found before."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, NEEDS_FLEX, UNCAPPED_HEAD_DIM, Sizes, expected, make_qkv, relative_error

from softcap_runtime import AttentionConfig, BuildFailed, Runtime, RuntimeSettings, SoftcapRuntimeError
from softcap_runtime.artifacts import build
from softcap_runtime.compat import torch_private
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines import flex_cpu as flex
from softcap_runtime.engines import package
from softcap_runtime.engines.engine import Call
from softcap_runtime.engines.graphs import builder
from softcap_runtime.engines.graphs.flex import flex_forward
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import dtype_of
from softcap_runtime.masks.intervals import band
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.store import fingerprint, inspection

CAPPED = Package("flex_forward", "cpu", "float32", HEAD_DIM, True)
UNCAPPED = CAPPED._replace(capped=False, head_dim=UNCAPPED_HEAD_DIM)
CONFIGS = {CAPPED: AttentionConfig(softcap=50.0, scale=0.5), UNCAPPED: AttentionConfig(scale=0.5)}


@pytest.fixture
def packages(runtime: Runtime) -> dict[Package, bytes]:
    found = {}
    for spec in CONFIGS:
        runtime.supply.get(spec)
        data = runtime.supply.store.load(spec.key())
        assert data is not None
        found[spec] = bytes(data)
    return found


@pytest.fixture
def folder(tmp_path: Path, packages: dict[Package, bytes], monkeypatch: pytest.MonkeyPatch, loads: list[bytes]) -> Path:
    """A cache with both kernels; from here on a build hands out the right package, and counts."""
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
    for spec, data in packages.items():
        runtime.supply.store.load_or_build(spec.key(), lambda data=data: data)
    monkeypatch.setattr(Package, "build", lambda spec: packages[spec])
    monkeypatch.setattr(Package, "provenance", lambda spec: {"compiler": "none, a test"})
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every package that reached the loader."""
    seen: list[bytes] = []
    real = torch_private.load_package

    def load(data: bytes) -> Any:
        seen.append(data)
        return real(data)

    monkeypatch.setattr(package, "load_package", load)
    return seen


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(folder / "cache.db")
    with contextlib.closing(connection), connection:
        yield connection


def digest(spec: Package) -> str:
    return spec.key().digest


def serves(folder: Path, loads: list[bytes], packages: dict[Package, bytes]) -> Runtime:
    """Both calls succeed, and only right packages were loaded."""
    runtime = Runtime(RuntimeSettings(cache_dir=folder, engine="flex"))
    for spec, config in CONFIGS.items():
        inputs = make_qkv(Sizes(1, 4, 2, 30, 30, spec.head_dim))
        assert relative_error(runtime.attention(*inputs, config), expected(*inputs, config)) <= 2e-6
    assert [runtime.supply.supplied[spec].bytes for spec in CONFIGS] == [len(packages[spec]) for spec in CONFIGS]
    assert loads == list(packages.values())
    return runtime


def sources(runtime: Runtime) -> list[str]:
    return [runtime.supply.supplied[spec].source for spec in CONFIGS]


def test_untouched(folder: Path, loads: list[bytes], packages: dict[Package, bytes], seed: int) -> None:
    assert sources(serves(folder, loads, packages)) == ["disk", "disk"]


@pytest.mark.parametrize(
    ("columns", "kind"),
    # Both hold verified bytes of ours: a checksum alone would not tell that they answer another question.
    [(("value",), "corrupt"), (("value", "tag", "size"), "rejected"), (("tag",), "corrupt")],
)
def test_the_packages_of_two_kernels_are_swapped(
    folder: Path, loads: list[bytes], packages: dict[Package, bytes], columns: tuple[str, ...], kind: str, seed: int
) -> None:
    with opened(folder) as connection:
        rows = {
            spec: connection.execute(
                f"SELECT {', '.join(columns)} FROM Cache WHERE key = ?", (digest(spec),)
            ).fetchone()
            for spec in CONFIGS
        }
        for spec, other in ((CAPPED, UNCAPPED), (UNCAPPED, CAPPED)):
            assignment = ", ".join(f"{column} = ?" for column in columns)
            connection.execute(f"UPDATE Cache SET {assignment} WHERE key = ?", (*rows[other], digest(spec)))
    runtime = serves(folder, loads, packages)
    assert sources(runtime) == ["built", "built"]
    assert inspection.status(runtime.supply.store).counters[kind] == 2
    loads.clear()
    assert sources(serves(folder, loads, packages)) == ["disk", "disk"]  # and is whole again


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_package(
    folder: Path, loads: list[bytes], packages: dict[Package, bytes], fault: str, seed: int
) -> None:
    data = bytearray(packages[CAPPED])
    if fault == "truncated":
        data = data[: len(data) // 2]
    elif fault == "flipped":
        data[len(data) // 3] ^= 16
    elif fault == "empty":
        data.clear()
    with opened(folder) as connection:
        if fault == "missing":
            connection.execute("DELETE FROM Cache WHERE key = ?", (digest(CAPPED),))
        else:
            connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (bytes(data), digest(CAPPED)))
    runtime = serves(folder, loads, packages)
    assert sources(runtime) == ["built", "disk"]
    counters = inspection.status(runtime.supply.store).counters
    assert counters["corrupt"] + counters["rejected"] == (0 if fault == "missing" else 1)
    loads.clear()
    assert sources(serves(folder, loads, packages)) == ["disk", "disk"]


def test_packages_of_another_environment(
    folder: Path, loads: list[bytes], packages: dict[Package, bytes], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for field, value in (("torch", "2.99.0"), ("cpu", "AVX2 of another machine"), ("package", "9.9 abc")):
        other = {**fingerprint("cpu"), field: value}
        monkeypatch.setattr(package, "fingerprint", lambda device, other=other: other)
        loads.clear()
        assert sources(serves(folder, loads, packages)) == ["built", "built"]
    monkeypatch.undo()


@NEEDS_FLEX
def test_bytes_that_are_verified_but_no_package(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Package, "build", lambda spec: b"no package")
    monkeypatch.setattr(Package, "provenance", lambda spec: {"compiler": "none, a test"})
    broken = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex"))
    for _ in range(2):
        with pytest.raises(SoftcapRuntimeError, match="flex_forward does not load") as raised:
            broken.attention(*make_qkv(Sizes(1, 2, 1, 4, 4)), CONFIGS[CAPPED])
        assert "\n" not in str(raised.value)


LOADED_WITH_LESS = """
import os, resource, sys
from softcap_runtime import SoftcapRuntimeError
from softcap_runtime.engines.package import Package
data = open(sys.argv[1], "rb").read()
limit, low = getattr(resource, sys.argv[2]), int(sys.argv[3])
spec, before = Package("flex_forward", "cpu", "float32", 64, True), resource.getrlimit(limit)
descriptors = os.listdir("/proc/self/fd")
resource.setrlimit(limit, (low, before[1]))
for _ in range(3):
    try:
        spec.load(data)
        raise AssertionError("it was loaded")
    except SoftcapRuntimeError as error:
        print(error)
resource.setrlimit(limit, before)
assert os.listdir("/proc/self/fd") == descriptors
spec.load(data)
"""


@NEEDS_FLEX
@pytest.mark.parametrize(
    ("limit", "low", "words"), [("RLIMIT_NOFILE", 3, "Too many open files"), ("RLIMIT_FSIZE", 4096, "File too large")]
)
def test_a_process_that_lacks_what_loading_needs_is_not_told_to_clear_the_cache(
    packages: dict[Package, bytes], tmp_path: Path, limit: str, low: int, words: str
) -> None:
    (tmp_path / "package").write_bytes(packages[CAPPED])
    command = [sys.executable, "-c", LOADED_WITH_LESS, tmp_path / "package", limit, str(low)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = rf"(kernel flex_forward cannot be loaded now: \[Errno \d+\] {words}; .* call again\n){{3}}"
    assert re.fullmatch(told, done.stdout), done.stderr


def test_kernels_loaded_at_once_are_not_mixed_up(packages: dict[Package, bytes], seed: int) -> None:
    """The loader takes a library whose path it has seen for the one it has: each load has a path of its own."""
    mask = band(30, 30, causal=True, window=None)
    for _ in range(3):
        kernels: Any = SimpleNamespace(get=lambda spec: spec.load(packages[spec]), masks=MaskMemo(2**20))
        for spec, config in CONFIGS.items():
            q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30, spec.head_dim))
            problem = Call(mask, config.scale, config.softcap, "flex", False).problem(q, k)
            assert flex.ENGINE.artifacts(problem, kernels) == [spec]
            out, _ = flex.ENGINE.forward(problem, kernels)(q, k, v)
            assert relative_error(out, expected(q, k, v, config)) <= 2e-6


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() is None
    assert build.compiler_version() == "none"
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path / "cache"))
    with pytest.raises(BuildFailed, match=r"no C\+\+ compiler found.*g\+\+.*engine='eager'") as raised:
        runtime.attention(*make_qkv(Sizes(1, 2, 1, 4, 4)), CONFIGS[CAPPED])
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert build.find_compiler() is None


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "fatal error: no space left" >&2\nexit 3\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildFailed, match="cannot build attention") as raised:
        library().build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("setting", "artifact"), [("nowhere g++", library()), ("bin/clang++", CAPPED)], ids=str)
def test_a_builder_runs_the_compiler_that_was_found_and_minds_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, artifact: CpuLibrary | Package
) -> None:
    """clang++ is all there is; the current folder has a module of Python's name, and Python settings end builds."""
    compiler = tmp_path / "bin/clang++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "fatal error: this one ran" >&2; exit 3; }\n')
    compiler.chmod(0o755)
    (tmp_path / "json.py").write_text("raise RuntimeError('of the current folder')")
    settings = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error"}
    for name, value in {"PATH": str(compiler.parent), "CXX": setting, **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildFailed, match=rf"cannot build {artifact.describe().op} .*this one ran"):
        artifact.build()


@pytest.mark.parametrize("name", ["with space", "it's", 'a"b', "back\\slash"])
def test_a_folder_that_compilers_cannot_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with pytest.raises(BuildFailed, match=r"cannot build attention: the folder .*; set TMPDIR to another$"):
        library().build()


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file system is read-only, or full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(BuildFailed, match=r"^cannot build attention: .*No such file or directory: '.*/none/"):
        library().build()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    told = r"^cannot build attention: No usable temporary directory found in .*; set TMPDIR to a folder of yours$"
    with pytest.raises(BuildFailed, match=told):
        library().build()


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("g++", 30), OSError("text file busy")])
def test_a_compiler_that_does_not_tell_its_version_has_built_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(build, "find_compiler", lambda: "g++")
    monkeypatch.setattr(subprocess, "run", run)
    assert build.compiler_version() == "unknown"


@pytest.mark.parametrize(("name", "advice"), [("SEGV", "set CXX to another"), ("KILL", "free memory")])
def test_a_builder_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    """As where torch cannot load what the compiler made: the process that serves lives and says so."""
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\nkill -{name} $$\nsleep 1\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildFailed, match=f"its builder died of SIG{name}; .*{advice}") as raised:
        library().build()
    assert "\n" not in str(raised.value)


def test_a_builder_loads_what_it_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else that it does is needed by every kernel of the other tests, and takes half a minute."""

    def compiled(program: str, package_path: str, inductor_configs: dict[str, Any]) -> None:
        Path(package_path).write_text(program)

    loaded: list[bytes] = []
    dynamo, inductor = (importlib.import_module(f"torch.{name}") for name in ("_dynamo.config", "_inductor"))
    monkeypatch.setattr(builder, "count_threads_at_run_time", lambda: None)
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **options: "a package")
    monkeypatch.setattr(inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(builder, "load_package", loaded.append)
    with dynamo.patch(fake_tensor_cache_enabled=True):  # the builder switches it off, here for the test alone
        builder.compile_package(CAPPED.describe(), str(tmp_path / "kernel.pt2"))
    assert loaded == [b"a package"]


def test_no_head_dim_ties_strides_of_the_example_together() -> None:
    """torch.export gives equal numbers one symbol: the kernel would read one tensor with another's stride."""
    for head_dim in range(1, 521):
        example = flex_forward(Package("flex_forward", "cpu", "float32", head_dim, True)).example
        strided = [x for x in example if x.dim() > 1]
        assert len(strided) == 7
        strides = [stride for x in strided for stride in sorted(x.stride())[1:]]
        sizes = {size for x in strided for size in x.shape}
        assert len({*strides} - sizes) == len(strides), head_dim
        for x in strided:
            products = {size * step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1}
            assert not products & {*x.stride()}, head_dim


def test_dtype_names() -> None:
    assert dtype_of("float32") is torch.float32
    for bad in ("float33", "Tensor", ""):
        with pytest.raises(ValueError, match=f"dtype: {bad!r}"):
            dtype_of(bad)


MORE_THREADS = """
import sys, torch
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, reference
torch.manual_seed(int(sys.argv[2]))
torch.set_num_threads(int(sys.argv[3]))
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1], engine="flex", jit="forbid"))
q, k, v = (torch.randn(2, heads, 100, 64) for heads in (8, 4, 4))
mask = torch.ones(1, 100, 100).tril() > 0
want = reference.attention(*(x.double() for x in (q, k, v)), mask, scale=0.5, softcap=50.0)[0]
for _ in range(50):
    out = runtime.attention(q, k, v, AttentionConfig(softcap=50.0, scale=0.5))
    assert ((out - want).norm() / want.norm()) < 2e-6
    runtime.attention(q[:, :, -1:], k, v, AttentionConfig(softcap=50.0, scale=0.5))
"""


@NEEDS_FLEX
def test_a_process_with_more_threads_than_the_builder(runtime: Runtime, seed: int) -> None:
    """Inductor writes the builder's threads into flex kernels, whose buffers the others then overrun."""
    runtime.supply.get(CAPPED)
    threads = str(4 * (os.cpu_count() or 1))
    done = subprocess.run(
        [sys.executable, "-c", MORE_THREADS, str(runtime.settings.cache_dir), str(seed), threads],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@NEEDS_FLEX
def test_a_torch_that_counts_threads_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._inductor.lowering")  # the next can't be imported before it
    from torch._inductor.codegen import cpp_flex_attention_template as template

    texts = {name: text for name, text in vars(template).items() if isinstance(text, str)}
    for name, text in texts.items():
        monkeypatch.setattr(template, name, text)  # put back when the test is over
    torch_private.count_threads_at_run_time()
    assert any(
        "num_thread = at::get_num_threads();" in text for text in vars(template).values() if isinstance(text, str)
    )
    with pytest.raises(RuntimeError, match=r"does not show how its flex kernels count threads; use engine='blocked'$"):
        torch_private.count_threads_at_run_time()


def test_a_build_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(build, "BUILD_TIMEOUT_S", 0.01)
    with pytest.raises(BuildFailed, match="timed out"):
        library().build()
    assert list(tmp_path.iterdir()) == []
