"""Hostile databases, rows, journals and entries: refused, counted, never followed, never obeyed."""

from __future__ import annotations

import contextlib
import os
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softcap_runtime.store import Key, Store, fingerprint, inspection

FINGERPRINT = fingerprint("cpu")
GOOD = Key({"name": "good"}, FINGERPRINT)
VICTIM = Key({"name": "victim"}, FINGERPRINT)
ROUND = 2**20


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with a good entry and one to attack."""
    store = Store(tmp_path / "cache", ROUND)
    store.load_or_build(GOOD, lambda: b"good")
    store.load_or_build(VICTIM, lambda: b"victim")
    store.close()
    return tmp_path / "cache"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that must survive."""
    path = tmp_path / "outside.txt"
    path.write_text("precious")
    return path


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(folder / "cache.db")
    try:
        yield connection
        connection.commit()
    finally:
        connection.close()


def update(folder: Path, assignment: str, *values: object) -> None:
    with opened(folder) as connection:
        connection.execute(f"UPDATE Cache SET {assignment} WHERE key = ?", (*values, VICTIM.digest))


ROWS: dict[str, Callable[[Path, Path, Path], None]] = {
    "pickle value": lambda f, o, bomb: update(f, "mode = 4, value = ?", pickle.dumps(Bomb(bomb))),
    "pickle file": lambda f, o, bomb: update(f, "mode = 4, value = NULL, filename = ?", str(o)),
    "file that climbs out": lambda f, o, bomb: update(f, "mode = 2, filename = ?", f"../{o.name}"),
    "absolute file": lambda f, o, bomb: update(f, "mode = 2, value = NULL, filename = ?", str(o)),
    "text file": lambda f, o, bomb: update(f, "mode = 3, value = NULL, filename = ?", str(o)),
    "file beside a value": lambda f, o, bomb: update(f, "filename = ?", str(o)),
    "text value": lambda f, o, bomb: update(f, "value = 'text'"),
    "number value": lambda f, o, bomb: update(f, "value = 7"),
    "no value": lambda f, o, bomb: update(f, "value = NULL"),
    "no document": lambda f, o, bomb: update(f, "tag = NULL"),
    "blob document": lambda f, o, bomb: update(f, "tag = CAST(tag AS BLOB)"),
    "not JSON": lambda f, o, bomb: update(f, "tag = ?", "{\n\n"),
    "deep JSON": lambda f, o, bomb: update(f, "tag = ?", "[" * 60_000 + "\n\n"),
    "huge document": lambda f, o, bomb: update(f, "tag = ?", "x" * 10**6),
    "invalid UTF-8": lambda f, o, bomb: update(f, "tag = CAST(x'ff' AS TEXT)"),
    "zeros": lambda f, o, bomb: update(f, "value = zeroblob(?)", 2**21),
    "odd mode": lambda f, o, bomb: update(f, "mode = 'x'"),
    "another key's bytes": lambda f, o, bomb: update(
        f, "(tag, value) = (SELECT tag, value FROM Cache WHERE key = ?)", GOOD.digest
    ),
}


@pytest.mark.parametrize("attack", ROWS)
def test_a_bad_row_is_refused_alone(folder: Path, outside: Path, guard: Any, tmp_path: Path, attack: str) -> None:
    ROWS[attack](folder, outside, tmp_path / "bomb")
    guard.folder = str(folder)
    store = Store(folder, ROUND)
    assert store.load(VICTIM) is None
    assert store.load(GOOD) == b"good"
    counters = inspection.status(store).counters
    assert counters["rejected"] + counters["corrupt"] == 1 or attack == "no value"
    assert store.load_or_build(VICTIM, lambda: b"rebuilt").source == "built"
    assert Store(folder, ROUND).load(VICTIM) == b"rebuilt"
    assert inspection.verify(store) == []
    assert outside.read_text() == "precious"
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("attack", ROWS)
def test_listing_and_repair_refuse_it_too(folder: Path, outside: Path, guard: Any, tmp_path: Path, attack: str) -> None:
    ROWS[attack](folder, outside, tmp_path / "bomb")
    guard.folder = str(folder)
    store = Store(folder, ROUND)
    problems = inspection.verify(store)
    assert [problem.where for problem in problems] == [VICTIM.digest]
    assert [problem.repaired for problem in inspection.verify(store, repair=True)] == [True]
    assert inspection.verify(store) == []
    assert [info.fields for info in inspection.entries(store)] == [GOOD.fields]
    assert len(inspection.status(store).quarantine) == 1
    assert outside.read_text() == "precious"
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("attack", ["file beside a value", "odd mode", "text value", "pickle value"])
def test_a_row_of_another_form_is_not_listed(folder: Path, outside: Path, tmp_path: Path, attack: str) -> None:
    ROWS[attack](folder, outside, tmp_path / "bomb")
    assert [info.fields for info in inspection.entries(Store(folder, ROUND))] == [GOOD.fields]


INSERT = "INSERT INTO Cache(key, raw, mode, size, filename, value, tag) VALUES (?, ?, ?, 0, ?, ?, 'tag')"


@pytest.mark.parametrize(
    "row",
    [
        (b"\x80\x04N.", 0, 1, None, b"x"),
        (b"pickle", 0, 4, None, b"x"),
        (None, 1, 1, None, b"x"),
        (7, 1, 1, None, b"x"),
        ("../../etc", 1, 1, "../../x", b"x"),
        ("counters", 0, 4, None, b"x"),
        (GOOD.digest, 0, 4, "/etc/passwd", None),
    ],
    ids=repr,
)
def test_odd_rows_are_listed_as_rejected_and_removed(folder: Path, guard: Any, row: tuple[Any, ...]) -> None:
    if row[0] == b"pickle":
        row = (pickle.dumps(Bomb(folder / "bomb")), *row[1:])
    with opened(folder) as connection:
        connection.execute(INSERT, row)
    guard.folder = str(folder)
    store = Store(folder, ROUND)
    assert len(inspection.entries(store)) == 2
    assert inspection.status(store).counters["rejected"] == 1
    assert inspection.verify(store) == []
    assert store.load(GOOD) == b"good"
    assert not (folder / "bomb").exists()


def script(*statements: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        with opened(folder) as connection:
            for statement in statements:
                connection.execute(statement)

    return run


RENAMED = "ALTER TABLE Cache RENAME TO Hidden"
DATABASES: dict[str, Callable[[Path], None]] = {
    "trigger": script("CREATE TRIGGER t AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END"),
    "trigger on Settings": script("CREATE TRIGGER t AFTER UPDATE ON Settings BEGIN DELETE FROM Cache; END"),
    "changed trigger": script(
        "DROP TRIGGER Settings_count_insert",
        "CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
    ),
    "view": script("CREATE VIEW v AS SELECT * FROM Cache"),
    "view in place of the table": script(RENAMED, "CREATE VIEW Cache AS SELECT * FROM Hidden"),
    "endless view in place of the table": script(
        RENAMED,
        "CREATE VIEW Cache AS WITH RECURSIVE r(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM r)"
        " SELECT x AS rowid, x AS key FROM r",
    ),
    "extra table": script("CREATE TABLE t (x)"),
    "virtual table": script("CREATE VIRTUAL TABLE t USING fts5(x)"),
    "no index": script("DROP INDEX Cache_key_raw"),
    "no table": script("DROP TABLE Settings"),
    "extra index": script("CREATE INDEX i ON Cache(value)"),
    "pragma in Settings": script("INSERT INTO Settings VALUES ('sqlite_writable_schema', 1)"),
    "statement in Settings": script("INSERT INTO Settings VALUES ('sqlite_mmap_size = 1; --', 1)"),
    "disk setting": script("UPDATE Settings SET value = 0 WHERE key = 'disk_min_file_size'"),
    "eviction by diskcache": script("UPDATE Settings SET value = 10 WHERE key = 'cull_limit'"),
    "odd policy": script("UPDATE Settings SET value = x'00' WHERE key = 'eviction_policy'"),
    "setting of another type": script("UPDATE Settings SET value = 0.0 WHERE key = 'cull_limit'"),
    "missing setting": script("DELETE FROM Settings WHERE key = 'size_limit'"),
    "text in a counter": script("UPDATE Settings SET value = 'x' WHERE key = 'count'"),
    "schema version": script("PRAGMA user_version = 0"),
}


@pytest.mark.parametrize("attack", DATABASES)
def test_a_bad_database_is_moved_aside_and_nothing_of_it_is_used(folder: Path, guard: Any, attack: str) -> None:
    DATABASES[attack](folder)
    guard.folder = str(folder)
    store = Store(folder, ROUND)
    assert store.load(GOOD) is None
    assert store.load_or_build(VICTIM, lambda: b"victim").data == b"victim"
    status = inspection.status(store)
    assert status.fault is None
    assert status.counters["rejected"] == 1
    assert len(status.quarantine) == 1
    assert (status.counters["builds"], status.entries) == (1, 1)
    assert inspection.verify(store) == []


def test_a_database_of_a_newer_version_is_left_alone(folder: Path) -> None:
    script("PRAGMA user_version = 2", "CREATE TABLE More (x)")(folder)
    before = (folder / "cache.db").read_bytes()
    store = Store(folder, ROUND)
    assert store.load_or_build(GOOD, lambda: b"mine").source == "built"
    assert store.fault is not None
    assert "newer version" in store.fault
    assert "set another SOFTCAP_CACHE_DIR or remove this folder" in store.fault
    assert (folder / "cache.db").read_bytes() == before


def test_a_journal_that_names_another_file_removes_nothing(folder: Path, outside: Path) -> None:
    # SQLite rolls such a journal back and then removes the file it names, wherever that is.
    name = str(outside).encode()
    magic = bytes.fromhex("d9d505f920a163d7")
    checksum = sum(name) & 0xFFFFFFFF
    page = 1024 * 4
    header = magic + (0).to_bytes(4, "big") + bytes(4) + (7).to_bytes(4, "big") + (512).to_bytes(4, "big")
    header += page.to_bytes(4, "big")
    trailer = (2**30 // page + 1).to_bytes(4, "big") + name + len(name).to_bytes(4, "big")
    trailer += checksum.to_bytes(4, "big") + magic
    (folder / "cache.db-journal").write_bytes(header.ljust(512, b"\0") + trailer)
    store = Store(folder, ROUND)
    assert store.load(GOOD) is None
    assert outside.read_text() == "precious"
    assert inspection.status(store).counters["rejected"] == 1
    assert any(name.endswith("-journal") for name in inspection.status(store).quarantine)
    assert store.load_or_build(GOOD, lambda: b"good").source == "built"


def test_odd_counters_start_anew(folder: Path) -> None:
    for value in (
        b"[]",
        b'{"hits": ["x", 1], "misses": [-1, 0], "other": [1, 1]}',
        b"[" * 10_000,
        b'{"hits": [NaN, 1]}',
    ):
        with opened(folder) as connection:
            connection.execute("UPDATE Cache SET value = ? WHERE key = 'counters'", (value,))
        store = Store(folder, ROUND)
        assert store.load(GOOD) == b"good"
        store.close()
        assert inspection.status(store).counters["hits"] == 1


def test_authentication(folder: Path) -> None:
    secret = b"s" * 32
    store = Store(folder, ROUND, auth_key=secret)
    assert store.load(GOOD) is None, "an entry without an HMAC was accepted"
    assert store.load_or_build(GOOD, lambda: b"signed").source == "built"
    assert Store(folder, ROUND, auth_key=secret).load(GOOD) == b"signed"
    assert Store(folder, ROUND).load(GOOD) == b"signed"
    other = Store(folder, ROUND, auth_key=b"another")
    assert other.load(GOOD) is None, "an entry signed with another key was accepted"
    assert inspection.status(other).counters["rejected"] == 2


@pytest.mark.parametrize("secret", [None, b"their secret"], ids=["without", "another"])
def test_a_reader_with_another_secret_leaves_entries_to_their_owner(tmp_path: Path, secret: bytes | None) -> None:
    keys = [Key({"name": name}, fingerprint("cpu")) for name in "abc"]
    owner = Store(tmp_path / "cache", ROUND, secret)
    for key in keys:
        owner.load_or_build(key, lambda: b"theirs")
    owner.close()
    other = Store(tmp_path / "cache", ROUND, b"our secret")
    for key in keys:
        assert other.load(key) is None
        assert other.load(key) is None
    assert inspection.status(other).counters["rejected"] == 3
    assert len(inspection.entries(other)) == 3
    assert len(inspection.verify(other)) == 3
    other.close()
    assert [Store(tmp_path / "cache", ROUND, secret).load(key) for key in keys] == [b"theirs"] * 3
    # Who builds replaces, and a damaged entry belongs to nobody.
    assert other.load_or_build(keys[0], lambda: b"ours").source == "built"
    assert Store(tmp_path / "cache", ROUND, b"our secret").load(keys[0]) == b"ours"
    with opened(tmp_path / "cache") as connection:
        connection.execute("UPDATE Cache SET value = x'00' WHERE key = ?", (keys[1].digest,))
    assert other.load(keys[1]) is None
    assert len(inspection.entries(other)) == 2
