"""Faults of the disk under attention calls, really made: the result is right, and the fault is there to see."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import Sizes, expected, make_qkv, package_of, relative_error

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, SoftcapRuntimeError
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.report.cache import report
from softcap_runtime.store import database, inspection

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)
DB = "cache.db"


@pytest.fixture
def filled(runtime: Runtime, tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a kernel, on a filesystem of its own; a build gives the session's library."""
    data = package_of(runtime, library())
    monkeypatch.setattr(CpuLibrary, "build", lambda artifact: data)
    monkeypatch.setattr(CpuLibrary, "provenance", lambda artifact: {"compiler": "none, a test"})
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    folder = tmpfs("size=8m") / "cache"
    first = make(folder)
    assert_right(first)
    first.supply.store.close()
    return folder


def make(folder: Path) -> Runtime:
    return Runtime(RuntimeSettings(cache_dir=folder, engine="blocked"))


def assert_right(runtime: Runtime) -> None:
    inputs = make_qkv(Sizes(1, 4, 2, 30, 30))
    assert relative_error(runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG)) <= 2e-6


def overwrite(path: Path, make_bytes: Callable[[int], bytes]) -> None:
    with open(path, "r+b") as file:
        file.write(make_bytes(path.stat().st_size))


def fill_disk(folder: Path) -> None:
    (folder / DB).unlink()
    space = os.statvfs(folder)
    (folder.parent / "ballast").write_bytes(bytes(space.f_bavail * space.f_bsize))


def lock(folder: Path) -> Any:
    other = sqlite3.connect(folder / DB, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other


def file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def remount(folder: Path) -> None:
    (folder / DB).unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "disk full": fill_disk,
    "read-only and empty": remount,
    "file in place of the folder": file_in_its_place,
    "writable by others": lambda folder: folder.chmod(0o777),
    "locked": lock,
    "truncated": lambda folder: os.truncate(folder / DB, (folder / DB).stat().st_size // 2),
    "zeroed": lambda folder: overwrite(folder / DB, bytes),
    "random bytes": lambda folder: overwrite(folder / DB, random.randbytes),
    "flipped in the library": lambda folder: overwrite(folder / DB, lambda size: flipped(folder / DB, size)),
}


def flipped(path: Path, size: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[size // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_is_right_and_the_fault_is_seen(filled: Path, fault: str, seed: int) -> None:
    running = make(filled)
    assert_right(running)
    running.supply.store.close()  # a filesystem with a file open for writing cannot be made read-only
    held = FAULTS[fault](filled)  # a lock lasts as long as its connection
    assert_right(running)
    fresh = make(filled)
    assert_right(fresh)
    assert_right(fresh)
    status = report(fresh.supply.store).status
    seen = [name for name in ("corrupt", "rejected", "write_failures") if status.counters[name]]
    assert seen, "the fault is not counted"
    healed = fault in ("truncated", "zeroed", "random bytes", "flipped in the library")
    assert (status.fault is None) == (fresh.stats().cache_fault is None) == healed
    if healed:
        assert inspection.verify(make(filled).supply.store) == []
    del held


def test_a_folder_removed_under_a_running_process(filled: Path, seed: int) -> None:
    running = make(filled)
    assert_right(running)
    shutil.rmtree(filled)
    assert_right(running)
    assert_right(make(filled))
    assert report(make(filled).supply.store).status.entries == 1


def test_out_of_file_descriptors(filled: Path, seed: int) -> None:
    """A kernel in memory serves on; one that must be loaded cannot be, and the error says so."""
    running = make(filled)
    assert_right(running)
    gc.collect()
    fresh = make(filled)  # which closes what tests before have left open
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        assert_right(running)
        with pytest.raises(SoftcapRuntimeError, match=r"^[^\n]+$"):
            assert_right(fresh)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_right(fresh)
