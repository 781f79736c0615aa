"""Faults of the disk, really made: the right bytes come back, the fault is counted and shown, the cache heals."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softcap_runtime.store import Key, Store, database, inspection, quarantine, schema
from softcap_runtime.store.index import Index

FINGERPRINT = {"cpu": "AVX512", "torch": "2"}
MB = 2**20
FLIPS = int(os.environ.get("SOFTCAP_TEST_FLIPS", "60"))  # 1,000 in the long run
LOCKED_S = float(os.environ.get("SOFTCAP_TEST_LOCKED", "0"))  # 30 in the long run


def key(name: str) -> Key:
    return Key({"name": name}, FINGERPRINT)


def payload(name: str, size: int = 20_000) -> bytes:
    return random.Random(name).randbytes(size)


def fill(folder: Path, names: str) -> None:
    store = Store(folder, 100 * MB)
    for name in names:
        store.load_or_build(key(name), lambda name=name: payload(name))
    store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_works_from_memory(store: Store, name: str, *words: str) -> None:
    before = inspection.status(store).counters["write_failures"]
    assert store.load_or_build(key(name), lambda: payload(name)).data == payload(name)
    assert store.load_or_build(key(name), lambda: b"built twice").data == payload(name)
    status = inspection.status(store)
    assert status.fault is not None
    assert "\n" not in status.fault
    assert any(word in status.fault for word in words), status.fault
    assert status.counters["write_failures"] > before
    assert status.held_in_memory >= 1


def assert_healed(store: Store, folder: Path, names: str) -> None:
    store.flush()
    status = inspection.status(store)
    assert (status.fault, status.held_in_memory) == (None, 0)
    store.close()
    fresh = Store(folder, 100 * MB)
    assert {name: fresh.load(key(name)) for name in names} == {name: payload(name) for name in names}
    assert inspection.verify(fresh) == []


def test_disk_full(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=1m")
    folder = place / "cache"
    fill(folder, "ab")
    (place / "ballast").write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_bsize))
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    assert_works_from_memory(store, "c", "full", "disk I/O error")
    assert store.load(key("b")) == payload("b")
    (place / "ballast").unlink()
    assert_healed(store, folder, "abc")


def test_disk_full_from_the_start(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=256k")
    (place / "ballast").write_bytes(bytes(248 * 1024))
    store = Store(place / "cache", 100 * MB)
    assert_works_from_memory(store, "a", "full", "No space", "I/O")
    (place / "ballast").unlink()
    assert_healed(store, place / "cache", "a")


def test_no_inodes(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=4m,nr_inodes=20")
    folder = place / "cache"
    fill(folder, "a")
    ballast = place / "ballast"
    ballast.mkdir()
    count = 0
    while os.statvfs(place).f_favail:
        (ballast / str(count)).touch()
        count += 1
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    assert_works_from_memory(store, "b", "unable to open database file", "full", "No space")
    shutil.rmtree(ballast)
    assert_healed(store, folder, "ab")


def test_read_only_filesystem(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=4m")
    folder = place / "cache"
    fill(folder, "a")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    assert store.load_or_build(key("b"), lambda: b"b").source == "built"
    assert store.load_or_build(key("b"), lambda: b"no").source == "memory"
    status = inspection.status(store)
    assert (status.writable, status.held_in_memory, status.counters["write_failures"]) == (False, 1, 1)


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("disk I/O error"),
        OSError(5, "Input/output error"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["publish", "read", "merge"])
def test_injected_errors(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> None:
    fill(folder, "a")

    def fail(*_: object, **__: object) -> None:
        raise error

    store = Store(folder, 100 * MB)
    monkeypatch.setattr(Index, method, fail)
    for name in "ab":
        assert store.load_or_build(key(name), lambda name=name: payload(name)).data == payload(name)
    assert store.fault is not None
    assert str(error) in store.fault
    monkeypatch.undo()
    assert_healed(store, folder, "ab")


def test_folder_removed_under_a_running_process(folder: Path) -> None:
    fill(folder, "a")
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    shutil.rmtree(folder)
    assert store.load(key("a")) is None
    assert store.load_or_build(key("a"), lambda: payload("a")).source == "built"
    shutil.rmtree(folder)
    assert store.load_or_build(key("b"), lambda: payload("b")).source == "built"
    store.counters.use(key("b").digest)
    assert_healed(store, folder, "b")


def test_folder_replaced_by_a_file(folder: Path) -> None:
    fill(folder, "a")
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert_works_from_memory(store, "a", "is a file")
    folder.unlink()
    assert_healed(store, folder, "a")


def test_locked_by_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not LOCKED_S:
        monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
        monkeypatch.setattr(database, "RETRY_SECONDS", 0.1)
    fill(folder, "a")
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
            "c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()",
            str(folder / "cache.db"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "locked\n"
    store = Store(folder, 100 * MB)
    started = time.monotonic()
    assert_works_from_memory(store, "b", "database is locked")
    assert store.load_or_build(key("a"), lambda: payload("a")).source == "built"
    while time.monotonic() < started + LOCKED_S:
        asked = time.monotonic()
        assert store.load(key("a")) == payload("a")
        assert time.monotonic() - asked < database.BUSY_SECONDS + 1
        time.sleep(0.1)
    other.stdin.close()
    other.wait(30)
    time.sleep(database.RETRY_SECONDS + 0.1)
    assert_healed(store, folder, "ab")


def truncated(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def overwritten(make: Callable[[int], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with open(path, "r+b") as file:
            file.write(make(path.stat().st_size))

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": truncated(0),
    "one byte": lambda path: os.truncate(path, 1),
    "a third": truncated(0.33),
    "half": truncated(0.5),
    "most": truncated(0.9),
    "odd size": lambda path: os.truncate(path, path.stat().st_size - 777),
    "zeros": overwritten(bytes),
    "random": overwritten(random.Random(1).randbytes),
    "zero header": overwritten(lambda _: bytes(100)),
    "zero first page": overwritten(lambda _: bytes(4096)),
    "text": overwritten(lambda size: b"not a database\n" * (size // 15)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("running", [False, True], ids=["at start", "while open"])
def test_damaged_database(folder: Path, damage: str, running: bool) -> None:
    fill(folder, "abcdef")
    store = Store(folder, 100 * MB)
    if running:
        assert store.load(key("a")) == payload("a")
    DAMAGE[damage](folder / "cache.db")
    found = {name: store.load(key(name)) for name in "abcdef"}
    assert all(data in (None, payload(name)) for name, data in found.items())
    for name in "abcdef":
        assert store.load_or_build(key(name), lambda name=name: payload(name)).data == payload(name)
    assert inspection.verify(store, repair=True) is not None
    counters = inspection.status(store).counters
    assert counters["corrupt"] + counters["rejected"] >= 1
    assert len(inspection.status(store).quarantine) >= 1 or damage == "odd size"
    assert_healed(store, folder, "abcdef")


@pytest.mark.parametrize(
    ("place", "bit"),
    [(18, 1 << 5), (47, 1 << 6), (44, 1), (60, 1), (61, 16), (62, 1 << 7), *((63, 1 << bit) for bit in range(8))],
)
def test_flipped_bits_of_the_header_that_look_like_a_newer_format(folder: Path, place: int, bit: int) -> None:
    fill(folder, "ab")
    database = folder / "cache.db"
    damaged = bytearray(database.read_bytes())
    damaged[place] ^= bit
    database.write_bytes(damaged)
    store = Store(folder, 100 * MB)
    assert [store.load(key(name)) for name in "ab"] in ([None, None], [payload(name) for name in "ab"])
    for name in "ab":
        assert store.load_or_build(key(name), lambda name=name: payload(name)).data == payload(name)
    assert_healed(store, folder, "ab")


def test_a_damaged_name_in_the_schema(folder: Path) -> None:
    """One bit makes a text a blob."""
    fill(folder, "ab")
    connection = sqlite3.connect(folder / "cache.db")
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET name = CAST(name AS BLOB) WHERE name = 'Settings_size_update'")
    connection.commit()
    connection.close()
    store = Store(folder, 100 * MB)
    for name in "ab":
        assert store.load_or_build(key(name), lambda name=name: payload(name)).data == payload(name)
    assert len(inspection.status(store).quarantine) == 1
    assert_healed(store, folder, "ab")


def test_flipped_bits(folder: Path, tmp_path: Path, seed: int) -> None:
    """At random places: never a wrong byte, and a database that stays loses no entry but the one that was hit."""
    fill(folder, "abcd")
    draw = random.Random(seed)
    good = (folder / "cache.db").read_bytes()
    lost = 0
    for _ in range(FLIPS):
        place, bit = draw.randrange(len(good)), 1 << draw.randrange(8)
        copy = tmp_path / "copy"
        copy.mkdir(mode=0o700)
        damaged = bytearray(good)
        damaged[place] ^= bit
        (copy / "cache.db").write_bytes(damaged)
        (copy / "cache.db").chmod(0o600)
        store = Store(copy, 100 * MB)
        found = {name: store.load(key(name)) for name in "abcd"}
        assert all(data in (None, payload(name)) for name, data in found.items()), (place, bit)
        missing = sum(data is None for data in found.values())
        assert missing <= 1 or store.database.moved, (place, bit)
        lost += missing
        for name in "abcd":
            data = store.load_or_build(key(name), lambda name=name: payload(name)).data
            assert data == payload(name), (place, bit)
        inspection.verify(store, repair=True)
        assert inspection.verify(store) == [], (place, bit)
        store.close()
        shutil.rmtree(copy)
    # 294 by 400 flips: three in four hit an entry, one in 70 has the database moved aside.
    assert lost <= FLIPS * 1.2, f"{lost} entries were lost by {FLIPS} flipped bits"


@pytest.mark.parametrize("step", [-10 * 365 * 86400.0, -3600.0, 10 * 365 * 86400.0])
def test_clock_that_jumps(folder: Path, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    fill(folder, "ab")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step)
    store = Store(folder, 100 * MB)
    assert store.load(key("a")) == payload("a")
    assert store.load_or_build(key("c"), lambda: payload("c")).source == "built"
    store.counters.use(key("a").digest)
    quarantine.sweep(store.folder)
    assert_healed(store, folder, "abc")
    assert [info.hits for info in inspection.entries(store) if info.fields == {"name": "a"}] == [3]


def test_a_clock_that_ran_ahead_and_was_set_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used then does not stay for years in place of what is used now."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 20 * 365 * 86400.0)
    store = Store(folder, 5 * 20_000)
    for name in "abcde":
        store.load_or_build(key(name), lambda name=name: payload(name))
    store.flush()
    monkeypatch.setattr(time, "time", real)
    assert store.load(key("a")) == payload("a")
    for name in "xyz":
        store.load_or_build(key(name), lambda name=name: payload(name))
    assert sorted(str(info.fields["name"]) for info in inspection.entries(store)) == ["a", "e", "x", "y", "z"]


NO_DESCRIPTORS = """
import os, resource, sys
from softcap_runtime.store import Key, Store
key = Key({{"name": "a"}}, {fingerprint!r})
store = Store({folder!r}, 2**20)
if {opened}:
    assert store.load(key) is not None
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
while True:
    try:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
for name in "ab":
    key = Key({{"name": name}}, {fingerprint!r})
    assert len(store.load_or_build(key, lambda: bytes(20_000)).data) == 20_000
for descriptor in taken:
    os.close(descriptor)
assert store.fault is not None
store.flush()
assert store.load(Key({{"name": "b"}}, {fingerprint!r})) == bytes(20_000)
assert store.fault is None, store.fault
assert not os.path.exists({folder!r} + "/quarantine")
"""


@pytest.mark.parametrize("opened", [False, True])
def test_out_of_file_descriptors(folder: Path, opened: bool, run_bare: Callable[[str], str]) -> None:
    fill(folder, "a")
    code = NO_DESCRIPTORS.format(folder=str(folder), fingerprint=FINGERPRINT, opened=opened)
    run_bare(code)
    assert Store(folder, MB).load(key("b")) == bytes(20_000)


def test_a_locked_database_is_left_alone_for_a_while(folder: Path) -> None:
    """Each access would wait for the lock anew."""
    fill(folder, "a")
    store = Store(folder, MB)

    def locked(_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    store.database.use("read", locked, None)
    assert store.load(key("a")) is None
    store.database._retry_at = time.monotonic()
    assert store.load(key("a")) == payload("a")


def test_a_database_replaced_while_it_is_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, "a")
    fill(tmp_path / "other", "b")
    other, real = tmp_path / "other" / "cache.db", schema.check_schema

    def check(connection: sqlite3.Connection) -> None:
        real(connection)
        if other.exists():
            other.replace(folder / "cache.db")

    monkeypatch.setattr(schema, "check_schema", check)
    store = Store(folder, MB)
    assert [info.fields for info in inspection.entries(store)] == [{"name": "b"}]


def test_who_has_a_database_open_that_is_moved_aside_cannot_write_it(folder: Path) -> None:
    fill(folder, "a")
    with open(folder / "cache.db", "r+b") as file:
        file.write(bytes(16))  # its magic
    moved = quarantine.move_database(folder, schema.inode(folder))
    assert moved is not None
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0x40000001)"
    other = subprocess.run([sys.executable, "-c", code, str(moved)], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr, "the byte that SQLite locks to write"


def test_a_database_left_in_wal_mode_keeps_its_entries(folder: Path) -> None:
    fill(folder, "a")
    connection = sqlite3.connect(folder / "cache.db")
    assert connection.execute("PRAGMA journal_mode = wal").fetchall() == [("wal",)]
    connection.close()
    assert_healed(Store(folder, 100 * MB), folder, "a")


def test_a_fault_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.touch()
    store = Store(folder, MB)
    threads = [threading.Thread(target=store.load, args=(key("a"),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([record for record in caplog.records if "is a file" in record.getMessage()]) == 1


def test_a_bad_database_that_another_process_moves_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, "a")
    (folder / "cache.db").write_bytes(b"damaged" * 1000)
    real = quarantine.move_database

    def too_late(*where: Any) -> Path | None:
        assert real(*where) is not None
        return real(*where)

    monkeypatch.setattr(quarantine, "move_database", too_late)
    store = Store(folder, MB)
    assert store.load_or_build(key("a"), lambda: payload("a")).source == "built"
    assert (store.fault, store.database.moved) == (None, [])
    assert_healed(store, folder, "a")


@pytest.mark.parametrize(
    ("kind", "network"), [("nfs4", True), ("fuse.sshfs", True), ("fuseblk", False), ("ext4", False)]
)
def test_a_network_filesystem_is_told(folder: Path, kind: str, network: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "filesystem_type", lambda _: kind)
    status = inspection.status(Store(folder, MB))
    assert (status.filesystem, status.network_filesystem) == (kind, network)


def test_the_filesystem_of_a_mount(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=1m")
    assert inspection.filesystem_type(place / "not there" / "yet") == "tmpfs"
    assert inspection.filesystem_type(place.with_name(place.name + "beside")) != "tmpfs"
