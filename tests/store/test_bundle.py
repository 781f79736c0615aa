"""Bundles: carried whole, refused when changed, and told apart by fingerprint."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import stat
from pathlib import Path

import pytest

from softcap_runtime.store import Key, Store, bundle, inspection
from softcap_runtime.store.bundle import Incomplete

HERE = {"cpu": "AVX512 1", "torch": "2.13", "libc": "glibc 2.36"}
THERE = {**HERE, "torch": "2.14", "cpu": "AVX2 2"}
MB = 2**20


def payload(name: str) -> bytes:
    return random.Random(name).randbytes(30_000)


def filled(folder: Path, auth_key: bytes | None = None) -> Store:
    store = Store(folder, 100 * MB, auth_key)
    for name in "ab":
        store.load_or_build(Key({"name": name}, HERE), lambda name=name: payload(name), lambda: {"compiler": "g++"})
    store.load_or_build(Key({"name": "c"}, THERE), lambda: payload("c"))
    return store


def test_entries_arrive_as_they_were(tmp_path: Path) -> None:
    store = filled(tmp_path / "one")
    assert bundle.export(store, tmp_path / "bundle", HERE) == 2
    other = Store(tmp_path / "two", 100 * MB)
    report = bundle.import_(other, tmp_path / "bundle", HERE)
    assert (report.imported, report.present, report.refused) == (2, 0, [])
    assert other.load(Key({"name": "a"}, HERE)) == payload("a")
    assert [info.provenance for info in inspection.entries(other)] == [{"compiler": "g++"}] * 2
    assert bundle.import_(other, tmp_path / "bundle", HERE).present == 2
    assert inspection.verify(other) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "one", "two"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    assert bundle.export(filled(tmp_path / "one"), tmp_path / "bundle") == 3
    other = Store(tmp_path / "two", 100 * MB)
    report = bundle.import_(other, tmp_path / "bundle", HERE)
    assert report.imported == 2
    (refused,) = report.refused
    assert "torch: bundle has '2.14', here '2.13'" in refused.what
    assert "cpu: bundle has 'AVX2 2', here 'AVX512 1'" in refused.what
    assert "libc" not in refused.what
    assert len(inspection.entries(other)) == 2


def test_any_change_is_refused(tmp_path: Path, seed: int) -> None:
    bundle.export(filled(tmp_path / "one"), tmp_path / "bundle")
    good = (tmp_path / "bundle").read_bytes()
    draw = random.Random(seed)
    other = Store(tmp_path / "two", 100 * MB)
    for _ in range(100):
        changed = bytearray(good)
        changed[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(ValueError, match=r"^bundle .*changed: [^\n]+$"):
            bundle.import_(other, tmp_path / "changed", HERE)
    for size in (0, 1, 24, 25, 41, len(good) // 2, len(good) - 32, len(good) - 1):
        (tmp_path / "cut").write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"^bundle .*cut: [^\n]+$"):
            bundle.import_(other, tmp_path / "cut", HERE)
    (tmp_path / "longer").write_bytes(good + b"x")
    with pytest.raises(ValueError, match="longer: refused"):
        bundle.import_(other, tmp_path / "longer", HERE)
    assert inspection.entries(other) == []


def test_authentication(tmp_path: Path) -> None:
    bundle.export(filled(tmp_path / "one"), tmp_path / "plain")
    bundle.export(filled(tmp_path / "three", b"secret"), tmp_path / "signed")
    careful = Store(tmp_path / "two", 100 * MB, b"secret")
    with pytest.raises(ValueError, match="plain: refused, its HMAC is missing"):
        bundle.import_(careful, tmp_path / "plain", HERE)
    assert bundle.import_(careful, tmp_path / "signed", HERE).imported == 2
    assert careful.load(Key({"name": "a"}, HERE)) == payload("a")
    with pytest.raises(ValueError, match="signed: refused, its HMAC is missing or made with another key"):
        bundle.import_(Store(tmp_path / "two", MB, b"other"), tmp_path / "signed", HERE)
    assert bundle.import_(Store(tmp_path / "four", MB), tmp_path / "signed", HERE).imported == 2


def test_an_export_vouches_for_no_entry_without_its_signature(tmp_path: Path) -> None:
    filled(tmp_path / "one").close()
    with pytest.raises(Incomplete, match=r"^nothing was exported: 3 entries are not authenticated with this key; set"):
        bundle.export(Store(tmp_path / "one", 100 * MB, b"secret"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert bundle.export(Store(tmp_path / "one", 100 * MB), tmp_path / "bundle") == 3


@pytest.mark.parametrize("column", ["value", "tag"])
def test_an_export_that_would_lack_an_entry_writes_nothing(tmp_path: Path, column: str) -> None:
    store = filled(tmp_path / "one")
    digest = Key({"name": "a"}, HERE).digest
    with contextlib.closing(sqlite3.connect(tmp_path / "one" / "cache.db")) as connection:
        connection.execute(f"UPDATE Cache SET {column} = x'00' WHERE key = ?", (digest,))
        connection.commit()
    for _ in range(2):  # it stays so until somebody built it again
        with pytest.raises(Incomplete, match="1 entry is damaged; run verify --repair") as caught:
            bundle.export(store, tmp_path / "bundle", HERE)
        assert [where for where, _ in caught.value.bad] == [digest]
    assert not (tmp_path / "bundle").exists()
    inspection.verify(store, repair=True)
    assert bundle.export(store, tmp_path / "bundle", HERE) == 1


def test_a_bundle_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^bundle \S+/none/bundle cannot be written: No such file or directory$"):
        bundle.export(filled(tmp_path / "one"), tmp_path / "none" / "bundle")


def test_a_bundle_replaces_files_alone(tmp_path: Path) -> None:
    """To rename a file over /dev/null removes it for the whole machine."""
    store = filled(tmp_path / "one")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "one", "."):
        with pytest.raises(OSError, match=r"^bundle \S+ cannot be written: it is no file; name one$"):
            bundle.export(store, tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one", "pipe"]


def test_a_link_where_a_bundle_is_written_first_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path / "one")
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(os, "urandom", bytes)
    for guess in (os.getpid(), "00000000"):
        (tmp_path / f"bundle.{guess}.tmp").symlink_to("mine")
    with pytest.raises(OSError, match="cannot be written: File exists"):
        bundle.export(store, tmp_path / "bundle")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_bundle_above_the_size_limit_is_not_begun(tmp_path: Path) -> None:
    bundle.export(filled(tmp_path / "one"), tmp_path / "bundle", HERE)
    small = Store(tmp_path / "two", 50_000)
    small.load_or_build(Key({"name": "mine"}, HERE), lambda: b"mine")
    told = r"its 2 entries that fit here need 60000 bytes; SOFTCAP_CACHE_SIZE_LIMIT is 50000, raise it$"
    with pytest.raises(ValueError, match=told):
        bundle.import_(small, tmp_path / "bundle", HERE)
    assert small.load(Key({"name": "mine"}, HERE)) == b"mine"


def test_an_import_evicts_others_before_its_own(tmp_path: Path) -> None:
    bundle.export(filled(tmp_path / "one"), tmp_path / "bundle", HERE)
    store = Store(tmp_path / "two", 70_000)
    for name in "a-":  # what is present was used before what is not in the bundle
        store.load_or_build(Key({"name": name}, HERE), lambda name=name: payload(name))
    report = bundle.import_(store, tmp_path / "bundle", HERE)
    assert (report.imported, report.present) == (1, 1)
    assert [store.load(Key({"name": name}, HERE)) is not None for name in "ab-"] == [True, True, False]


def test_missing_file_and_unusable_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "one", MB)
    with pytest.raises(FileNotFoundError):
        bundle.import_(store, tmp_path / "none", HERE)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a file"):
        bundle.export(Store(tmp_path / "file", MB), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
