"""What must be equal for machine code to be usable here."""

from __future__ import annotations

import builtins
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softcap_runtime.store import fingerprint
from softcap_runtime.store import fingerprint as public
from softcap_runtime.store.key import Key


def module() -> Any:
    return sys.modules[public.__module__]


def test_fields() -> None:
    fields = fingerprint("cpu")
    assert set(fields) == {"package", "torch", "python", "arch", "libc", "cpu"}
    assert all(type(value) is str and value for value in fields.values())
    assert set(fingerprint("cuda")) == {"package", "torch", "gpu", "triton"}
    assert fingerprint("cuda")["package"] != fields["package"]
    fields["cpu"] = "changed"
    assert fingerprint("cpu")["cpu"] != "changed"


def test_it_is_the_same_in_another_process() -> None:
    code = "from softcap_runtime.store import fingerprint; print(fingerprint('cpu'))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == str(fingerprint("cpu"))


def test_any_change_of_our_kernels_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module(), "PACKAGE_ROOT", tmp_path)
    package = functools.partial(module()._package, module().CPU_CODE)
    seen = [package()]
    folder = tmp_path / "kernels/graphs"
    (folder / "deep").mkdir(parents=True)
    for name, text in [("a.py", "x = 1"), ("a.py", "x = 2"), ("deep/b.py", "x = 2"), ("c.py", "")]:
        (folder / name).write_text(text)
        seen.append(package())
    (folder / "a.py").rename(folder / "d.py")
    seen.append(package())
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/blocks.py").write_text("BLOCK = 64")
    seen.append(package())
    assert len(set(seen)) == len(seen)


def test_a_package_in_a_zip_file_is_told_by_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "app.zip"
    monkeypatch.setattr(module(), "PACKAGE_ROOT", archive / module().PACKAGE_ROOT.name)
    seen = []
    for content in (b"one", b"two"):
        archive.write_bytes(content)
        seen += [module()._package(code) for code in (module().CPU_CODE, module().GPU_CODE)]
    assert len(set(seen)) == 4


def test_a_package_without_sources_is_told_by_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module(), "PACKAGE_ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    seen = []
    for code in (b"", b"one", b"two"):
        (tmp_path / "kernels/key.pyc").write_bytes(code)
        seen.append(module()._package(module().CPU_CODE))
    assert len(set(seen)) == 3


def test_what_generated_code_reads_is_part_of_it() -> None:
    for pattern in (*module().CPU_CODE, *module().GPU_CODE):
        assert list(module().PACKAGE_ROOT.glob(pattern)), pattern


def test_only_the_start_of_cpuinfo_is_read_and_flags_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda path, *a, **k: real(cpuinfo if path == "/proc/cpuinfo" else path, *a, **k)
    )
    digests = []
    for text in (
        "processor : 0\nflags\t\t: sse avx\n" + "x" * 10**6,
        "flags : avx sse\n",
        "flags : avx\n",
        "Features\t: neon\n",
        "nothing\n",
    ):
        cpuinfo.write_text(text)
        digests.append(module()._cpu_flags_digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert digests[-1] == "unknown"


@pytest.mark.skipif(
    os.environ.get("SOFTCAP_TEST_DEVICE", "cpu") != "cpu", reason="needs a machine without GPU"
)
def test_a_device_that_is_not_there_fits_nothing() -> None:
    assert fingerprint("cuda")["gpu"] == "no cuda device"
    assert fingerprint("xpu")["gpu"] == "no xpu device"
    assert Key({}, fingerprint("cuda")) != Key({}, fingerprint("cpu"))
