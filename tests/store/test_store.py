"""The life cycle of an entry: look up, build once, publish, list, evict, clear."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from softcap_runtime.store import Key, Store, fingerprint, inspection, locks

FINGERPRINT = fingerprint("cpu")
MB = 1024 * 1024


def key(name: str, **fields: str | int | bool) -> Key:
    return Key({"name": name, **fields}, FINGERPRINT)


def never() -> bytes:
    raise AssertionError("built although it is in the cache")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10 * MB)


def test_built_then_loaded_by_the_next_process(store: Store, tmp_path: Path) -> None:
    built = store.load_or_build(key("a"), lambda: b"payload")
    assert (built.data, built.source) == (b"payload", "built")
    again = Store(tmp_path / "cache", 10 * MB)
    loaded = again.load_or_build(key("a"), never)
    assert (loaded.data, loaded.source) == (b"payload", "disk")
    assert again.load(key("a")) == b"payload"
    assert again.load(key("b")) is None


def test_key_identity() -> None:
    assert key("a", n=1) == key("a", n=1)
    assert hash(key("a", n=1)) == hash(key("a", n=1))
    digests = {key("a", n=n).digest for n in (1, True, "1")} | {Key({"name": "a"}, {}).digest, key("a").digest}
    assert len(digests) == 5
    with pytest.raises(TypeError, match=r"fields: 'n'=1\.5, expected"):
        Key({"n": 1.5}, {})  # type: ignore[dict-item]


def test_an_error_of_the_build_passes_through_and_frees_the_lock(store: Store) -> None:
    def fail() -> bytes:
        raise LookupError("no compiler")

    with pytest.raises(LookupError, match="no compiler"):
        store.load_or_build(key("a"), fail)
    assert store.load_or_build(key("a"), lambda: b"x").source == "built"


def test_threads_build_once(store: Store) -> None:
    builds: list[int] = []
    barrier = threading.Barrier(8)
    results: list[bytes] = []

    def build() -> bytes:
        builds.append(1)
        return b"payload"

    def work() -> None:
        barrier.wait()
        results.append(store.load_or_build(key("a"), build).data)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(builds) == 1
    assert results == [b"payload"] * 8


def test_uses_are_counted_without_a_write_and_survive_the_process(store: Store, tmp_path: Path) -> None:
    store.load_or_build(key("a"), lambda: b"x")
    database = tmp_path / "cache" / "cache.db"
    before = database.stat().st_mtime_ns
    for _ in range(100):
        store.counters.use(key("a").digest)
    assert database.stat().st_mtime_ns == before
    store.close()
    (info,) = inspection.entries(Store(tmp_path / "cache", MB))
    assert info.hits == 100


def test_counters_of_several_stores_add_up(tmp_path: Path) -> None:
    for _ in range(3):
        store = Store(tmp_path / "cache", MB)
        store.load(key("nothing"))
        store.close()
    assert inspection.status(Store(tmp_path / "cache", MB)).counters["misses"] == 3


def test_least_recently_used_leave_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", 3 * MB)
    for name in "abc":
        store.load_or_build(key(name), lambda: bytes(MB))
    store.counters.use(key("a").digest)
    store.flush()
    store.load_or_build(key("d"), lambda: bytes(MB))
    assert [store.load(key(name)) is not None for name in "abcd"] == [True, False, True, True]
    assert inspection.status(store).counters["evictions"] == 1
    assert inspection.status(store).bytes <= 3 * MB


def test_what_this_process_loaded_was_used_when_it_builds_more(tmp_path: Path) -> None:
    first = Store(tmp_path / "cache", 3 * MB)
    for name in "abc":
        first.load_or_build(key(name), lambda: bytes(MB))
    first.close()
    store = Store(tmp_path / "cache", 3 * MB)
    store.load_or_build(key("a"), never)
    store.load_or_build(key("d"), lambda: bytes(MB))
    assert [store.load(key(name)) is not None for name in "abcd"] == [True, False, True, True]


def test_an_entry_above_the_limit_works_from_memory(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", 10)
    assert store.load_or_build(key("a"), lambda: bytes(11)).source == "built"
    assert store.load_or_build(key("a"), never).source == "memory"
    assert store.fault is not None
    assert "above the size limit of 10" in store.fault
    assert inspection.status(store).counters["write_failures"] == 1


def test_clear(store: Store) -> None:
    for name in "abc":
        store.load_or_build(key(name), lambda: b"x")
    assert store.clear() == 3
    assert inspection.entries(store) == []
    assert store.load(key("a")) is None


def test_entries_tell_what_does_not_fit(store: Store) -> None:
    other = Key({"name": "other"}, {**FINGERPRINT, "torch": "1.0", "libc": "musl"})
    store.load_or_build(other, lambda: b"xyz", lambda: {"compiler": "g++ 1"})
    (info,) = inspection.entries(store)
    assert (info.fits, info.differs, info.bytes) == (False, ["libc", "torch"], 3)
    assert info.provenance == {"compiler": "g++ 1"}
    store.load_or_build(key("a"), lambda: b"x")
    assert [info.fits for info in inspection.entries(store)] == [False, True]


def test_explain_names_the_fields_of_the_nearest(store: Store) -> None:
    assert inspection.explain(store, key("a")).reason == f"cache folder {store.folder} does not exist"
    assert store.database.can_write()
    assert inspection.explain(store, key("a")).reason == "the cache is empty"
    store.load_or_build(key("a", n=1), lambda: b"x")
    store.load_or_build(key("b", n=7), lambda: b"x")
    explained = inspection.explain(store, key("a", n=2))
    assert not explained.present
    assert explained.nearest is not None
    assert explained.nearest.fields == {"name": "a", "n": 1}
    assert [(d.field, d.wanted, d.stored) for d in explained.differences] == [("n", 2, 1)]
    assert "n: wanted 2, stored 1" in explained.reason
    assert inspection.explain(store, key("a", n=1)).present


@pytest.mark.parametrize("size_limit", [0, -1])
def test_bad_size_limit(tmp_path: Path, size_limit: int) -> None:
    with pytest.raises(ValueError, match=f"size_limit: {size_limit}, expected at least 1 byte"):
        Store(tmp_path, size_limit)


@pytest.mark.parametrize("name", ["a b", "q?mode=ro#x", "100%", "ünï", "quote'\"", "-rf", os.fsdecode(b"\xff")])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / name, MB)
    store.load_or_build(key("a"), lambda: b"x")
    store.close()
    assert store.fault is None
    inspection.status(store).model_dump_json()
    assert Store(tmp_path / name, MB).load(key("a")) == b"x"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_load_is_a_use(store: Store) -> None:
    for name in "ab":
        store.load_or_build(key(name), lambda: b"x")
    first = {info.fields["name"]: info.last_used for info in inspection.entries(store)}
    store.load(key("a"))
    store.load_or_build(key("a"), never)
    infos = {info.fields["name"]: info for info in inspection.entries(store)}
    assert (infos["a"].hits, infos["b"].hits) == (2, 0)
    assert infos["a"].last_used > first["a"]
    assert [info.fields["name"] for info in inspection.entries(store)] == ["b", "a"]


def test_what_another_thread_built_meanwhile_is_a_hit_and_a_load(store: Store) -> None:
    building, both = threading.Event(), threading.Event()

    def build() -> bytes:
        building.set()
        both.wait(10)
        return b"x"

    first = threading.Thread(target=store.load_or_build, args=(key("a"), build))
    first.start()
    assert building.wait(10)
    waiting: list[str] = []
    second = threading.Thread(target=lambda: waiting.append(store.load_or_build(key("a"), never).source))
    second.start()
    time.sleep(0.2)
    both.set()
    first.join(10)
    second.join(10)
    counters = inspection.status(store).counters
    assert (waiting, counters["hits"], counters["misses"]) == (["disk"], 1, 1)
    assert [info.hits for info in inspection.entries(store)] == [1]


def test_no_wait_is_counted_where_nobody_else_builds(store: Store) -> None:
    store.load_or_build(key("a"), lambda: b"x")
    assert inspection.status(store).counters["lock_waits"] == 0


def test_without_flock_each_builds_for_itself_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    for name in "ab":
        assert store.load_or_build(key(name), lambda: b"x").source == "built"
    assert len([record for record in caplog.records if "has no flock" in record.getMessage()]) == 1
    assert store.load_or_build(key("a"), never).source == "disk"


def test_a_database_that_is_damaged_again_and_again_is_told(tmp_path: Path) -> None:
    def damaged(_: object) -> None:
        raise sqlite3.DatabaseError("damaged")

    store = Store(tmp_path / "cache", 2**20)
    assert store.database.use("read", damaged, None, create=True) is None
    assert store.fault is not None
    assert "replaced again and again; not used now" in store.fault


def test_a_thread_that_waits_too_long_goes_on_without_the_lock(tmp_path: Path) -> None:
    def wait() -> float:
        with locks.hold(tmp_path, "a", 0.05) as waited:
            return waited

    with locks.hold(tmp_path, "a"), ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # the first leaves the lock with its holder
            assert pool.submit(wait).result() >= 0.05
    assert wait() < 0.05


def test_a_dropped_store_loses_no_count(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", MB)
    store.load_or_build(key("a"), lambda: b"x")
    store.load(key("a"))
    del store
    again = Store(tmp_path / "cache", MB)  # writes what was dropped
    assert inspection.status(again).counters["hits"] == 1
    assert [info.hits for info in inspection.entries(again)] == [1]


def test_what_could_not_be_written_replaces_no_good_entry(store: Store, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert store.load_or_build(key("a"), lambda: b"held").source == "built"
    (tmp_path / "cache").unlink()
    Store(tmp_path / "cache", MB).load_or_build(key("a"), lambda: b"good")
    store.flush()
    assert store.held_in_memory == 0
    assert Store(tmp_path / "cache", MB).load(key("a")) == b"good"
