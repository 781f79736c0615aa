"""What must be equal for machine code to be usable here."""

from __future__ import annotations

import builtins
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
    fields["cpu"] = "changed"
    assert fingerprint("cpu")["cpu"] != "changed"


def test_it_is_the_same_in_another_process() -> None:
    code = "from softcap_runtime.store import fingerprint; print(fingerprint('cpu'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == str(fingerprint("cpu"))


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


@pytest.mark.skipif(os.environ.get("SOFTCAP_TEST_DEVICE", "cpu") != "cpu", reason="needs a machine without GPU")
def test_a_device_that_is_not_there_fits_nothing() -> None:
    assert fingerprint("cuda")["gpu"] == "no cuda device"
    assert fingerprint("xpu")["gpu"] == "no xpu device"
    assert Key({}, fingerprint("cuda")) != Key({}, fingerprint("cpu"))
