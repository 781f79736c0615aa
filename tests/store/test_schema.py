"""The expected shape of a database is diskcache's own, and nothing else passes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import diskcache
import pytest

from softcap_runtime.store import Key, Store, schema
from softcap_runtime.store.entry import BadEntry, Sealed
from softcap_runtime.store.index import BytesDisk, Index

KEY = Key({"name": "a"}, {"cpu": "x"})


def schema_of(path: Path) -> dict[str, str]:
    with sqlite3.connect(path) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def settings_of(path: Path) -> dict[str, object]:
    with sqlite3.connect(path) as connection:
        return dict(connection.execute("SELECT key, value FROM Settings"))


def test_what_we_create_is_what_diskcache_creates(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    schema.create(ours)
    diskcache.Cache(str(theirs), disk=BytesDisk, **schema.SETTINGS).close()
    assert schema_of(ours / "cache.db") == schema_of(theirs / "cache.db")
    assert settings_of(ours / "cache.db") == settings_of(theirs / "cache.db")


def test_stock_diskcache_can_use_our_database(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", 2**20)
    store.load_or_build(KEY, lambda: b"payload")
    store.close()
    with diskcache.Cache(str(tmp_path / "cache"), disk=BytesDisk) as cache:
        assert cache[KEY.digest] == b"payload"
    assert Store(tmp_path / "cache", 2**20).load(KEY) == b"payload"


@pytest.mark.parametrize("key", [b"bytes", 1, ("a",)])
def test_only_text_keys(key: object) -> None:
    with pytest.raises(TypeError, match="expected str"):
        BytesDisk("").put(key)


@pytest.mark.parametrize("value", ["text", 1, {"a": 1}, bytearray(b"x")])
def test_only_bytes_values(value: object) -> None:
    with pytest.raises(TypeError, match="expected bytes"):
        BytesDisk("").store(value, False)


def test_a_transaction_is_rolled_back_on_any_error(tmp_path: Path) -> None:
    def delete_and_fail(index: Index) -> None:
        with index.transact():
            index.remove_entries()
            assert index.totals() == (0, 0)
            raise ZeroDivisionError

    schema.create(tmp_path)
    index = Index(tmp_path, writable=True, busy_seconds=0.1, max_bytes=2**20)
    index.publish(KEY.digest, Sealed("text", b"payload"), 2**20)
    with pytest.raises(ZeroDivisionError):
        delete_and_fail(index)
    assert index.totals() == (1, 7)
    index.close()


def test_a_value_above_the_bound_is_not_read(tmp_path: Path) -> None:
    schema.create(tmp_path)
    index = Index(tmp_path, writable=True, busy_seconds=0.1, max_bytes=10)
    index.publish(KEY.digest, Sealed("text", bytes(11)), 2**20)
    with pytest.raises(BadEntry, match="has 11 bytes, expected at most 10"):
        index.read(KEY.digest)
    index.close()


def test_import_is_light(run_bare: Callable[[str], str]) -> None:
    run_bare(
        "import softcap_runtime.store\n"
        "heavy = {'torch', 'pydantic', 'sqlite3', 'diskcache', 'filelock'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_loading_imports_no_compiler_and_no_models(tmp_path: Path, run_bare: Callable[[str], str]) -> None:
    store = Store(tmp_path / "cache", 2**20)
    store.load_or_build(KEY, lambda: b"payload")
    store.close()
    run_bare(
        "from softcap_runtime.store import Key, Store\n"
        f"store = Store({str(tmp_path / 'cache')!r}, 2**20)\n"
        "assert store.load(Key({'name': 'a'}, {'cpu': 'x'})) == b'payload'\n"
        "heavy = {'torch', 'pydantic', 'filelock'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
