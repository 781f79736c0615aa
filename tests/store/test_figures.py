"""A cache of 10,000 entries: opening it and looking up in it stay quick."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softcap_runtime.store import Key, Store, fingerprint, inspection
from softcap_runtime.store import entry as entries_

ENTRIES = 10_000
SIZE = 1000
FINGERPRINT = fingerprint("cpu")


def key(number: int) -> Key:
    return Key({"name": "kernel", "number": number}, FINGERPRINT)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "cache"
    store = Store(folder, 2**30)
    assert store.database.can_write()  # makes it
    store.close()
    rows = []
    for n in range(ENTRIES):
        text, payload = entries_.seal(key(n), bytes(SIZE), created=1.0, build_seconds=1.0, provenance={}, auth_key=None)
        rows.append((key(n).digest, text, payload))
    with contextlib.closing(sqlite3.connect(folder / "cache.db")) as connection:
        # All at once: publishing each takes a transaction.
        insert = "INSERT INTO Cache(key, raw, tag, mode, value, access_time) VALUES (?, 1, ?, 1, ?, 1)"
        connection.executemany(insert, rows)
        connection.commit()
    return folder


def test_looking_up(large: Path) -> None:
    store = Store(large, 2**30)
    keys = [key(n) for n in range(0, ENTRIES, 50)]
    assert store.load(keys[0]) == bytes(SIZE)
    seconds = []
    for one in keys:
        started = time.process_time()
        assert store.load(one) is not None
        seconds.append(time.process_time() - started)
    assert statistics.median(seconds) < 1e-3
    assert len(inspection.entries(store)) == ENTRIES


OPEN = """
import time
from softcap_runtime.store import Key, Store
import softcap_runtime.store.index  # its imports are not the opening
key = Key({fields!r}, {fingerprint!r})
started = time.process_time()
assert Store({folder!r}, 2**30).load(key) is not None
print(time.process_time() - started)
"""


def test_opening(large: Path, run_bare: Callable[[str], str]) -> None:
    code = OPEN.format(fields=dict(key(7).fields), fingerprint=FINGERPRINT, folder=str(large))
    seconds = [float(run_bare(code)) for _ in range(3)]
    print(seconds)
    assert min(seconds) < 20e-3  # of the processor, which a busy machine shares out
