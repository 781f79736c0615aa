"""The life cycle of an artifact: each of its steps, with one that is made here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from softcap_runtime import BuildFailed, KernelNotPrewarmed, SoftcapRuntimeError
from softcap_runtime.artifacts.lifecycle import Artifacts
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.store import Key, Store, inspection

BUILDS: list[str] = []
LOADS: list[bytes] = []
BUILD: dict[str, Any] = {}


class Made(NamedTuple):
    name: str
    kept: bool = True

    def key(self) -> Key | None:
        return Key({"op": self.name}, {"cpu": "x"}) if self.kept else None

    def describe(self) -> KernelSpec:
        return KernelSpec(self.name, "cpu", "float32", 0, True, "")

    def build(self) -> bytes:
        BUILDS.append(self.name)
        made = BUILD.get(self.name, lambda: f"the {self.name}".encode())()
        assert isinstance(made, bytes)
        return made

    def provenance(self) -> Mapping[str, str]:
        return {"compiler": "none, a test"}

    def load(self, data: bytes) -> Any:
        LOADS.append(data)
        if data == b"bad":
            raise SoftcapRuntimeError("it does not load")
        return [data]


@pytest.fixture(autouse=True)
def nothing_yet() -> None:
    BUILDS.clear()
    LOADS.clear()
    BUILD.clear()


def artifacts(folder: Path, **policy: Any) -> Artifacts:
    return Artifacts(Store(folder, 2**20), **policy)


def command() -> str:
    return "make it"


def fails() -> bytes:
    raise BuildFailed("no luck")


def test_built_once_then_in_the_process_then_on_disk(tmp_path: Path) -> None:
    first = artifacts(tmp_path)
    one = first.get(Made("a"), command)
    assert first.get(Made("a")) is one
    assert (one, first.supplied[Made("a")].source, BUILDS) == ([b"the a"], "built", ["a"])
    assert inspection.status(first.store).counters["misses"] == 1
    second = artifacts(tmp_path, jit="forbid")
    assert second.get(Made("a"), command) == one
    assert (second.supplied[Made("a")].source, second.supplied[Made("a")].bytes) == ("disk", 5)
    assert BUILDS == ["a"]
    (entry,) = inspection.entries(second.store)
    assert entry.provenance == {"compiler": "none, a test"}


def test_threads_share_one_build_and_one_load(tmp_path: Path) -> None:
    BUILD["a"] = lambda: time.sleep(0.2) or b"slow"
    mine = artifacts(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: mine.get(Made("a"), command), range(8)))
    assert all(one is found[0] for one in found)
    assert (BUILDS, LOADS) == (["a"], [b"slow"])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_forbidden(tmp_path: Path, kept: bool, background: bool) -> None:
    mine = artifacts(tmp_path, jit="forbid", background=background)
    words = "run: make it$" if kept else r"call Runtime\.prewarm in this one first$"
    for _ in range(2):
        with pytest.raises(KernelNotPrewarmed, match=f"^kernel a float32 .*{words}"):
            mine.require([Made("a", kept)], command)
        with pytest.raises(KernelNotPrewarmed, match=words):
            mine.get(Made("a", kept), command)
    assert (BUILDS, LOADS, mine.supplied, mine.pending) == ([], [], {}, 0)
    mine.get(Made("a", kept))  # as prewarming asks
    assert mine.require([Made("a", kept)], command) is None
    assert (["a"] if kept else []) == BUILDS


def test_a_warning_tells_the_command_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = artifacts(tmp_path, jit="warn")
    with caplog.at_level(logging.WARNING, "softcap_runtime"):
        for _ in range(2):
            mine.get(Made("a"), command)
    assert [record.message for record in caplog.records] == [
        "building in a serving process: kernel a float32 is not in the cache; run: make it"
    ]


def test_what_fails_is_tried_anew(tmp_path: Path) -> None:
    mine = artifacts(tmp_path)
    BUILD["a"] = fails
    for _ in range(2):
        with pytest.raises(BuildFailed, match="no luck"):
            mine.get(Made("a"), command)
    assert inspection.entries(mine.store) == []
    BUILD["a"] = lambda: b"bad"
    for _ in range(2):
        with pytest.raises(SoftcapRuntimeError, match="does not load"):
            mine.get(Made("a"), command)
    assert (len(BUILDS), len(LOADS)) == (3, 2), "its bytes are good and stay"
    assert (mine.supplied, mine.ready(Made("a"))) == ({}, False)


def test_made_in_the_process_alone(tmp_path: Path) -> None:
    mine = artifacts(tmp_path / "cache")
    assert mine.get(Made("a", kept=False), command) == [b""]
    assert mine.supplied[Made("a", kept=False)].source == "compiled"
    assert (BUILDS, list(tmp_path.iterdir())) == ([], [])


def test_behind_calls(tmp_path: Path) -> None:
    go_on = threading.Event()
    BUILD["a"] = lambda: go_on.wait(60) and b"late"
    BUILD["b"] = fails
    mine = artifacts(tmp_path, background=True)
    for _ in range(3):
        assert mine.require([Made("a"), Made("b")], command) == "until its kernel is built"
    assert mine.pending == 2
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "softcap-build":
            thread.join(60)
    assert (mine.pending, mine.failed, BUILDS) == (0, {Made("b"): "no luck"}, ["a", "b"])
    assert mine.require([Made("a")], command) is None
    assert mine.require([Made("a"), Made("b")], command) == "its kernel could not be built"
    assert BUILDS == ["a", "b"], "it is not begun again"
    BUILD["b"] = lambda: b"another process's"
    artifacts(tmp_path).get(Made("b"))
    assert mine.require([Made("a"), Made("b")], command) is None
    assert mine.supplied[Made("b")].source == "disk"
