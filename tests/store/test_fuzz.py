"""Fuzzing: databases, documents and bundles made up or damaged at random.

Nothing crashes, no wrong byte comes back, no code runs, nothing outside the folder is written or removed.
SOFTCAP_TEST_EXAMPLES sets how many of each are tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from softcap_runtime.cli import tables as cli_tables
from softcap_runtime.report import cache as cache_report
from softcap_runtime.store import Key, Store, inspection
from softcap_runtime.store import bundle as bundles
from softcap_runtime.store import entry as entries_
from softcap_runtime.store.entry import BadEntry, Sealed
from softcap_runtime.store.inspection import document_of

EXAMPLES = int(os.environ.get("SOFTCAP_TEST_EXAMPLES", "60"))
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no waiting for a disk to sync
FINGERPRINT = {"cpu": "x", "torch": "2"}
KEYS = [Key({"name": name}, FINGERPRINT) for name in "ab"]
PAYLOAD = {key: key.digest.encode() * 100 for key in KEYS}
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good database and a good bundle."""
    folder = tmp_path_factory.mktemp("good")
    store = Store(folder / "cache", 2**20)
    for key in KEYS:
        store.load_or_build(key, lambda key=key: PAYLOAD[key])
    store.close()
    bundles.export(store, folder / "bundle")
    store.close()
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings are expected, and none is read."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


cells = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
    st.sampled_from([key.digest for key in KEYS]),
    st.sampled_from(["counters", "../../x", "/etc/passwd", 0, 1, 4]),
)
columns = st.sampled_from(["key", "raw", "expire_time", "access_time", "access_count", "tag", "size", "mode"])
columns |= st.sampled_from(["filename", "value", "store_time"])
changes = st.one_of(
    st.tuples(st.just("INSERT INTO Cache(key, raw, mode, filename, value, tag) VALUES (?, ?, ?, ?, ?, ?)"),
              st.tuples(cells, cells, cells, cells, cells, cells)),
    st.builds(lambda column, value: (f"UPDATE Cache SET {column} = ?", (value,)), columns, cells),
    st.builds(
        lambda column, value, key: (f"UPDATE Cache SET {column} = ? WHERE key = ?", (value, key.digest)),
        columns,
        cells,
        st.sampled_from(KEYS),
    ),
    st.tuples(st.just("UPDATE Settings SET value = ? WHERE key = ?"),
              st.tuples(cells, st.sampled_from(["count", "size", "size_limit", "eviction_policy", "cull_limit"]))),
    st.tuples(st.just("INSERT OR REPLACE INTO Settings VALUES (?, ?)"), st.tuples(st.text(max_size=20), cells)),
    st.tuples(st.sampled_from([
        "DROP INDEX Cache_key_raw", "DROP TABLE Cache", "ALTER TABLE Cache ADD COLUMN x",
        "ALTER TABLE Cache RENAME TO Other", "CREATE VIEW Cache2 AS SELECT * FROM Cache",
        "CREATE TRIGGER t BEFORE DELETE ON Cache BEGIN SELECT RAISE(ABORT, 'no'); END",
        "PRAGMA user_version = 9", "PRAGMA journal_mode = wal", "PRAGMA application_id = 1", "DELETE FROM Settings",
        "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = 'CREATE TABLE Cache (x)'",
    ]), st.just(())),
)  # fmt: skip
places = st.one_of(st.integers(0, 2000), st.integers(0, 2**17))
damages = st.lists(
    st.one_of(
        st.tuples(st.just("set"), places, st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("cut"), places, st.just(b"")),
        st.tuples(st.just("add"), places, st.binary(max_size=64)),
    ),
    max_size=4,
)


def damaged(data: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, piece in damage:
        place %= len(data) + 1
        if kind == "set":
            data = data[:place] + piece + data[place + len(piece) :]
        elif kind == "cut":
            data = data[:place]
        else:
            data = data[:place] + piece + data[place:]
    return data


def check_cache(folder: Path) -> None:
    store = Store(folder, 2**20)
    for key in KEYS:
        assert store.load(key) in (None, PAYLOAD[key])
    inspection.entries(store)
    inspection.status(store)
    inspection.explain(store, KEYS[0])
    inspection.verify(store)
    for key in KEYS:
        assert store.load_or_build(key, lambda key=key: PAYLOAD[key]).data == PAYLOAD[key]
    inspection.verify(store, repair=True)
    assert inspection.verify(store) == [] or store.fault is not None
    store.close()


@fuzz
@given(statements=st.lists(changes, max_size=5), damage=damages, journal=st.one_of(st.none(), st.binary(max_size=600)))
@example(statements=[("PRAGMA journal_mode = wal", ())], damage=[], journal=b"")
def test_databases(
    good: Path,
    guard: Any,
    statements: list[tuple[str, tuple[Any, ...]]],
    damage: list[tuple[str, int, bytes]],
    journal: bytes | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = Path(scratch).resolve() / "cache"
        shutil.copytree(good / "cache", folder)
        connection = sqlite3.connect(folder / "cache.db", isolation_level=None)
        for statement, values in statements:
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                connection.execute(statement, values)
        connection.close()
        database = folder / "cache.db"
        if damage:
            database.write_bytes(damaged(database.read_bytes(), damage))
        if journal is not None:
            (folder / "cache.db-journal").write_bytes(journal)
            (folder / "cache.db-journal").chmod(0o600)
        outside = Path(scratch) / "outside"
        outside.write_text("precious")
        guard.folder = str(folder)
        try:
            check_cache(folder)
        finally:
            guard.folder = None
        assert outside.read_text() == "precious"
        assert sorted(os.listdir(scratch)) == ["cache", "outside"]


odd_text = st.text(max_size=20) | st.sampled_from(["[/red]", "[link=file:///]", "\x1b]0;x\x07", "\ud800", "../x"])
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), odd_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=10), inner, max_size=3)),
    max_leaves=10,
)
documents = st.one_of(
    st.text(max_size=300),
    st.binary(max_size=100),
    st.none(),
    st.fixed_dictionaries(
        {"format": st.just(1)},
        optional={name: json_values for name in ("fields", "fingerprint", "bytes", "created", "build_seconds")},
    ).map(lambda document: entries_.json.dumps(document) + "\n\n"),
)


@fuzz
@given(text=documents, payload=st.one_of(st.binary(max_size=50), st.none(), st.text(max_size=5)))
def test_documents(text: object, payload: object) -> None:
    with contextlib.suppress(BadEntry):
        entries_.verify(text, payload, KEYS[0].digest, None)
        pytest.fail("a made-up entry was accepted")
    with contextlib.suppress(BadEntry):
        document_of(text)


def sealed(changed: dict[str, Any], payload: bytes) -> Sealed:
    """An entry whose checksum holds, of a document like ours with some of it replaced (by ... : removed)."""
    plain = {"fields": {"name": "c"}, "fingerprint": FINGERPRINT, "bytes": len(payload), "provenance": {}}
    document = {"format": 1, **plain, "created": 1.0, "build_seconds": 1.0, **changed}
    line = entries_.json.dumps({name: value for name, value in document.items() if value is not ...})
    return entries_.reseal(Sealed(f"{line}\n\n", payload), None)


json_objects = st.dictionaries(odd_text, json_values, max_size=3)
text_objects = st.dictionaries(odd_text, odd_text, max_size=2)
sealed_entries = st.builds(
    sealed,
    st.dictionaries(
        st.sampled_from(["fields", "fingerprint", "bytes", "created", "build_seconds", "provenance", "format", "x"]),
        st.one_of(json_objects, text_objects, json_values, st.just(...)),
        max_size=3,
    ),
    st.binary(max_size=50),
)


@fuzz
@given(entries=st.lists(sealed_entries, min_size=1, max_size=4))
def test_sealed_documents(guard: Any, entries: list[Sealed]) -> None:
    """Whoever can write to the folder can compute checksums too: in a database, and in a bundle."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = Path(scratch).resolve() / "cache"
        body = bundles.MAGIC
        for text, payload in [*entries, Sealed("", b"")]:
            body += bundles.LENGTHS.pack(len(text), len(payload)) + text.encode() + payload
        path = Path(scratch) / "bundle"
        path.write_bytes(body + hashlib.sha256(body).digest())
        guard.folder = str(folder)
        try:
            store = Store(folder, 2**20)
            with contextlib.suppress(ValueError):
                bundles.import_(store, path, FINGERPRINT)
            for entry in entries:
                document = entries_.json.loads(entry.text.split("\n")[0])
                store.put(entries_.document_digest(document) or KEYS[0].digest, entry)
            store.close()
            check_shown(folder)
            check_cache(folder)
        finally:
            guard.folder = None


def check_shown(folder: Path) -> None:
    """What people see of it raises nothing and holds no command to their terminal."""
    store = Store(folder, 2**20)
    problems = inspection.verify(store)
    shown = Console(file=io.StringIO(), width=cli_tables.PIPE_WIDTH, force_terminal=False)
    cli_tables.show_report(shown, cache_report.report(store))
    cli_tables.show_explanation(shown, inspection.explain(store, KEYS[1]))
    shown.print(cli_tables.problems_table(problems))
    cache_report.report(store).model_dump_json()
    text = shown.file.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)
    store.close()


@fuzz
@given(damage=damages, made_up=st.one_of(st.none(), st.binary(max_size=200)))
def test_bundles(good: Path, guard: Any, damage: list[tuple[str, int, bytes]], made_up: bytes | None) -> None:
    original = (good / "bundle").read_bytes()
    data = damaged(original, damage) if made_up is None else bundles.MAGIC + made_up
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        path = Path(scratch) / "bundle"
        path.write_bytes(data)
        store = Store(Path(scratch).resolve() / "cache", 2**20)
        guard.folder = str(store.folder)
        try:
            if data == original:
                assert bundles.import_(store, path, FINGERPRINT).imported == 2
            else:
                with pytest.raises(ValueError, match=r"^bundle [^\n]+$"):
                    bundles.import_(store, path, FINGERPRINT)
                assert inspection.entries(store) == []
        finally:
            guard.folder = None
        store.close()
