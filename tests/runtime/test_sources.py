"""The sources of an artifact are part of its key: all of them, and none that is not there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from softcap_runtime import SoftcapRuntimeError
from softcap_runtime.artifacts import sources
from softcap_runtime.cuda import kernel as gpu_kernel

# Where code that is compiled begins, and what a kernel's own code may read without its machine code changing: errors,
from softcap_runtime.cuda.triton import build as triton_build

# Where code that is compiled begins, and what a kernel's own code may read without its machine code changing: errors,
from softcap_runtime.engines import package

# Where code that is compiled begins, and what a kernel's own code may read without its machine code changing: errors,
# types, and what is settled again when a kernel is bound.
BUILDERS = {
    "packages": (
        package.SOURCES,
        ("engines/graphs/builder.py",),
        {
            "engines/engine.py",
            "engines/package.py",
            "cuda/options.py",
            "masks/intervals.py",
            "masks/memo.py",
            "artifacts/artifact.py",
            "compat/torch_features.py",
            "errors.py",
        },
    ),
    "GPU kernels": (
        gpu_kernel.SOURCES,
        ("cuda/triton/build.py", *(f"{module.replace('.', '/')}.py" for module in triton_build.MODULES.values())),
        {"errors.py", "cuda/options.py", "engines/spec.py"},
    ),
}


def imported(name: str) -> set[str]:
    """The files of ours that a file of ours imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((sources.ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*Path(name).parts[: -node.level], *parts]
            elif parts[:1] == ["softcap_runtime"]:
                parts = parts[1:]
            else:
                continue
            for one in ("/".join(parts), *("/".join([*parts, alias.name]) for alias in node.names)):
                found |= {f for f in (f"{one}.py", f"{one}/__init__.py") if (sources.ROOT / f).is_file()}
    return found - {one for one in found if one.endswith("__init__.py") and "graphs" not in one}


@pytest.mark.parametrize("kind", BUILDERS)
def test_everything_that_generated_code_comes_from_is_in_its_key(kind: str) -> None:
    named, begin, exempt = BUILDERS[kind]
    reached, ahead = set(), set(begin)
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead |= imported(name) - reached - exempt
    assert reached <= set(named), "add it to SOURCES, or say above why machine code does not depend on it"
    assert set(named) <= reached, "not read by any builder"


def test_any_change_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    names = ("a.py", "deep/b.cpp")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.cpp").write_text("")
    seen = []
    for text in ("x = 1", "x = 2", ""):
        (tmp_path / "a.py").write_text(text)
        seen.append(sources.digest.__wrapped__(*names))
    (tmp_path / "deep/b.cpp").write_text("x = 2")
    seen.append(sources.digest.__wrapped__(*names))
    seen.append(sources.digest.__wrapped__(*reversed(names)))
    assert len(set(seen)) == 5


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    with pytest.raises(SoftcapRuntimeError, match=r"^source cpu/kernel\.cpp of a kernel is missing from [^\n]*$"):
        sources.digest("cpu/kernel.cpp")


def test_a_package_in_a_zip_file_is_told_by_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "app.zip"
    monkeypatch.setattr(sources, "ROOT", archive / "softcap_runtime")
    seen = []
    for content in (b"one", b"two"):
        archive.write_bytes(content)
        seen += [sources.digest.__wrapped__(*names) for names in (package.SOURCES, gpu_kernel.SOURCES)]
    assert len(set(seen)) == 4


def test_a_package_without_sources_is_told_by_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    seen = []
    for code in (b"", b"one", b"two"):
        (tmp_path / "a.pyc").write_bytes(code)
        seen.append(sources.digest.__wrapped__("a.py"))
    assert len(set(seen)) == 3
