"""Many processes on one folder: one build per key, killed builders, fork and spawn, eviction and clear meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
from support.workers import results_of

from softcap_runtime.store import Key, Store, database, inspection, quarantine, schema

FINGERPRINT = {"cpu": "AVX512", "torch": "2"}
MB = 2**20
KILLS = int(os.environ.get("SOFTCAP_TEST_KILLS", "8"))  # 50 in the long run


def key(name: str) -> Key:
    return Key({"name": name}, FINGERPRINT)


def payload(name: str, size: int = 50_000) -> bytes:
    return random.Random(name).randbytes(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def slow_build(name: str, seconds: float, record: str) -> Callable[[], bytes]:
    def build() -> bytes:
        with open(record, "a") as file:
            file.write(f"{name}\n")
        time.sleep(seconds)
        return payload(name)

    return build


def need_three(folder: str, record: str, barrier: Any, results: Any) -> None:
    database.BUSY_SECONDS = 60.0  # a disk that stalls for 3 s would cost counts
    barrier.wait(60)
    store = Store(folder, 100 * MB)
    loaded = [store.load_or_build(key(name), slow_build(name, 0.3, record)) for name in "abc"]
    right = [one.data for one in loaded] == [payload(name) for name in "abc"]
    results.put((right, max(one.waited for one in loaded)))


@pytest.mark.parametrize(("method", "processes"), [("fork", 8), ("spawn", 2)])
def test_processes_build_three_kernels_once(folder: Path, tmp_path: Path, method: str, processes: int) -> None:
    context: BaseContext = multiprocessing.get_context(method)
    barrier, results = context.Barrier(processes), context.Queue()
    record = tmp_path / "record"
    workers = [
        context.Process(target=need_three, args=(str(folder), str(record), barrier, results))  # type: ignore[attr-defined]
        for _ in range(processes)
    ]
    outcomes = results_of(workers, results)
    assert all(right for right, _ in outcomes)
    assert max(waited for _, waited in outcomes) <= 0.3 + 2
    assert sorted(record.read_text().split()) == ["a", "b", "c"]
    counters = inspection.status(Store(folder, MB)).counters
    assert counters["builds"] == 3
    assert counters["hits"] + counters["misses"] == 3 * processes
    assert counters["lock_waits"] > 0
    assert counters["longest_lock_wait_ms"] > 0


def build_large(folder: str, seconds: float, building: Any) -> None:
    def build() -> bytes:
        building.set()
        time.sleep(seconds)
        return payload("a", 2_000_000)

    Store(folder, 100 * MB).load_or_build(key("a"), build)


def test_killed_builders_leave_no_lock_and_no_partial_entry(folder: Path, seed: int) -> None:
    """kill -9 in the build, in the write, in the publishing: the next process takes over at once."""
    draw = random.Random(seed)
    whole = payload("a", 2_000_000)
    context = multiprocessing.get_context("fork")
    for _ in range(KILLS):
        building = context.Event()
        arguments = (str(folder), draw.choice([0.0, 0.02]), building)
        builder = context.Process(target=build_large, args=arguments)
        builder.start()
        assert building.wait(60)
        time.sleep(draw.uniform(0, 0.06))
        builder.kill()
        builder.join(30)
        store = Store(folder, 100 * MB)
        assert store.load(key("a")) in (None, whole)
        loaded = store.load_or_build(key("a"), lambda: whole)
        assert loaded.data == whole
        assert loaded.waited < 2
        assert inspection.verify(store) == []
        store.clear()
        store.close()
    assert {path.name.split(".")[0] for path in folder.iterdir()} <= {"cache", "locks"}


def test_a_database_killed_while_it_is_created_is_not_seen(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    leftover = folder / f"{schema.DBNAME}.123.abcd.tmp"
    leftover.write_bytes(b"half")
    leftover.chmod(0o600)
    store = Store(folder, MB)
    assert store.load_or_build(key("a"), lambda: b"x").source == "built"
    assert leftover.exists(), "a temporary file of a running process was removed"
    os.utime(leftover, (1, 1))
    (folder / "locks" / f"{key('a').digest}.lock").touch()
    os.utime(folder / "locks" / f"{key('a').digest}.lock", (1, 1))
    assert quarantine.sweep(store.folder) == 2
    assert store.load_or_build(key("b"), lambda: b"x").source == "built"


def test_sweep_leaves_held_locks(folder: Path) -> None:
    store = Store(folder, MB)
    lock = folder / "locks" / f"{key('a').digest}.lock"

    def build() -> bytes:
        os.utime(lock, (1, 1))
        assert quarantine.sweep(Store(folder, MB).folder) == 0
        assert lock.exists()
        return b"x"

    assert store.load_or_build(key("a"), build).source == "built"


def use_in_child(store: Store, results: Any) -> None:
    data = store.load(key("a"))
    built = store.load_or_build(key(str(os.getpid())), lambda: b"child").data
    store.counters.use(key("a").digest)
    results.put((data == payload("a"), built == b"child"))


@pytest.mark.parametrize("held", [False, True], ids=["idle", "while threads use it"])
def test_fork_shares_no_connection_and_loses_no_count(folder: Path, held: bool) -> None:
    store = Store(folder, 100 * MB)
    store.load_or_build(key("a"), lambda: payload("a"))
    store.counters.use(key("a").digest)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    stop = threading.Event()

    def work() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            store.load_or_build(key(f"thread {count % 5}"), lambda: b"thread")
            store.clear() if count % 7 == 0 else store.flush()
            store.load_or_build(key("a"), lambda: payload("a"))

    threads = [threading.Thread(target=work) for _ in range(2 if held else 0)]
    for thread in threads:
        thread.start()
    try:
        children = [context.Process(target=use_in_child, args=(store, results)) for _ in range(4)]
        outcomes = results_of(children, results, timeout=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert all(built for _, built in outcomes)
    assert inspection.verify(store) == []
    store.close()
    if not held:
        assert all(right for right, _ in outcomes)
        status = inspection.status(Store(folder, MB))
        assert status.counters["builds"] == 5
        (info,) = [info for info in inspection.entries(Store(folder, MB)) if info.fields == {"name": "a"}]
        assert info.hits == 9


LOADS = """
import sys
from softcap_runtime.store import Key, Store
sys.kept = Store({folder!r}, 2**20)
assert sys.kept.load(Key({fields!r}, {fingerprint!r})) is not None
"""
STARTS = """
import multiprocessing, runpy, sys
child = multiprocessing.get_context(sys.argv[1]).Process(target=runpy.run_path, args=(sys.argv[2],))
child.start()
child.join()
sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_writes_its_counts_at_its_end(folder: Path, tmp_path: Path, method: str) -> None:
    """Started by a process that has not imported the store."""
    a = key("a")
    Store(folder, MB).load_or_build(a, lambda: payload("a"))
    script = tmp_path / "loads.py"
    script.write_text(LOADS.format(folder=str(folder), fields=a.fields, fingerprint=a.fingerprint))
    subprocess.run([sys.executable, "-c", STARTS, method, str(script)], check=True, timeout=120)
    assert [info.hits for info in inspection.entries(Store(folder, MB))] == [1]


def test_raw_fork_counts_once(folder: Path) -> None:
    store = Store(folder, MB)
    store.load_or_build(key("a"), lambda: b"x")
    store.load(key("a"))
    child = os.fork()
    if child == 0:
        store.load(key("a"))
        store.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.close()
    assert inspection.status(Store(folder, MB)).counters["hits"] == 2


def hammer(folder: str, number: int, rounds: int, results: Any) -> None:
    draw = random.Random(number)
    store = Store(folder, 300_000)  # about six entries: evictions all the time
    wrong = 0
    for _ in range(rounds):
        name = draw.choice("abcdefghij")
        if draw.random() < 0.05:
            store.clear()
        data = store.load_or_build(key(name), lambda name=name: payload(name)).data
        wrong += data != payload(name)
        store.counters.use(key(name).digest)
    results.put(wrong)


def test_eviction_and_clear_while_others_run(folder: Path, seed: int) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=hammer, args=(str(folder), seed + n, 25, results)) for n in range(4)]
    assert results_of(workers, results) == [0, 0, 0, 0]
    store = Store(folder, 300_000)
    assert inspection.verify(store) == []
    status = inspection.status(store)
    assert status.bytes <= 300_000
    assert status.quarantine == []
    assert status.counters["corrupt"] == 0
    assert status.counters["evictions"] > 0
    assert status.counters["hits"] + status.counters["misses"] == 100


def test_two_environments_share_a_folder(folder: Path) -> None:
    old = Key({"name": "a"}, {**FINGERPRINT, "torch": "1.0"})
    store = Store(folder, MB)
    assert store.load_or_build(key("a"), lambda: b"new").data == b"new"
    assert store.load_or_build(old, lambda: b"old").data == b"old"
    assert (store.load(key("a")), store.load(old)) == (b"new", b"old")


def test_a_database_moved_aside_by_another_process_is_noticed(folder: Path) -> None:
    first, second = Store(folder, MB), Store(folder, MB)
    first.load_or_build(key("a"), lambda: payload("a"))
    assert second.load(key("a")) == payload("a")
    with open(folder / "cache.db", "r+b") as file:
        file.write(bytes(4096))
    first.close()
    assert first.load_or_build(key("b"), lambda: b"b").source == "built"
    assert second.load(key("b")) == b"b"
    assert len(inspection.status(first).quarantine) == 1
