"""Where kernels come from: the secret of the settings, and what a runtime leaves behind."""

from __future__ import annotations

import gc
import logging
import sqlite3
from pathlib import Path

import pytest
import torch

from softcap_runtime import AttentionConfig, KernelNotPrewarmed, Runtime, RuntimeSettings
from softcap_runtime.cpu.library import library
from softcap_runtime.store import Key, Store, bundle, database, inspection, trust
from softcap_runtime.store.schema import DBNAME
from softcap_runtime.supply import Supply

KEY = Key({"name": "a"}, {"cpu": "x"})


def store_with(folder: Path, secret: Path | None) -> Store:
    return Supply(RuntimeSettings(cache_dir=folder, cache_key_file=secret)).store


def test_a_secret_refuses_entries_and_bundles_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_bytes(b"a secret\n")
    other.write_bytes(b"another\n")
    monkeypatch.setenv("SOFTCAP_CACHE_KEY_FILE", str(mine))
    store = Supply(RuntimeSettings(cache_dir=tmp_path / "cache")).store
    assert store.load_or_build(KEY, lambda: b"signed").source == "built"
    assert inspection.status(store).authenticated
    bundle.export(store, tmp_path / "bundle")
    store.close()
    assert store_with(tmp_path / "cache", mine).load(KEY) == b"signed"
    taken = bundle.import_(store_with(tmp_path / "second", mine), tmp_path / "bundle", KEY.fingerprint)
    assert taken.imported == 1
    with pytest.raises(ValueError, match="its HMAC is missing or made with another key"):
        bundle.import_(store_with(tmp_path / "third", other), tmp_path / "bundle", KEY.fingerprint)
    refusing = store_with(tmp_path / "cache", other)
    assert refusing.load(KEY) is None
    assert inspection.status(refusing).counters["rejected"] == 1


def test_a_runtime_with_another_secret_leaves_the_kernels_that_it_refuses(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret\n")
    secret.chmod(0o600)
    key = library().key()
    plain = Supply(RuntimeSettings(cache_dir=tmp_path / "cache"))
    plain.store.load_or_build(key, lambda: b"a kernel")
    plain.store.close()
    settings = RuntimeSettings(cache_dir=tmp_path / "cache", cache_key_file=secret, jit="forbid", engine="blocked")
    runtime = Runtime(settings)
    q = torch.randn(1, 2, 8, 64)
    with pytest.raises(KernelNotPrewarmed):
        runtime.attention(q, q, q, AttentionConfig(scale=0.125, softcap=50.0))
    runtime.supply.store.close()
    assert plain.store.load(key) == b"a kernel"


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), (b" \n", "is empty, expected a secret")])
def test_a_secret_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^cache_key_file: {path} {words}[^\n]*$"):
        store_with(tmp_path / "cache", path)


@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o600, 0)])
def test_a_secret_that_others_can_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warnings: int
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"a secret\n")
    path.chmod(mode)
    caplog.set_level(logging.WARNING, "softcap_runtime")  # a command run in this process may have set another
    assert inspection.status(store_with(tmp_path / "cache", path)).authenticated
    assert [record.message for record in caplog.records if "chmod 600" in record.message] == warnings * [
        f"cache_key_file: {path} is open to others (mode {mode:04o}); run: chmod 600 {path}"
    ]


def test_garbage_collected_in_a_transaction_waits_for_nothing_and_loses_no_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A supply has cycles: it is collected at any moment, also while its thread holds the database's lock."""
    supply = Supply(RuntimeSettings(cache_dir=tmp_path))
    assert supply.store.load(KEY) is None
    abandoned = [supply]
    del supply

    def collect(stored: bytes | None) -> bytes:
        abandoned.clear()
        gc.collect()
        return stored or b"{}"

    other = Store(tmp_path, 2**20)
    with caplog.at_level(logging.WARNING, "softcap_runtime"):
        assert other.database.use("count", lambda index: index.merge({}, collect) is None, False, create=True)
    # Who waits for the transaction that it runs in gives up in the end, and says that the database is locked.
    assert not caplog.records
    assert inspection.status(Store(tmp_path, 2**20)).counters["misses"] == 1


def test_a_store_outlives_its_supply(tmp_path: Path) -> None:
    store = Supply(RuntimeSettings(cache_dir=tmp_path)).store
    store.load_or_build(KEY, lambda: b"x")

    def collect_then_list(index: object) -> int:
        gc.collect()
        return len(list(index.rows()))  # type: ignore[attr-defined]

    assert store.database.use("read", collect_then_list, 0) >= 1
    assert store.fault is None


def refusal(settings: RuntimeSettings) -> str:
    """What a call says whose kernel may not be built."""
    q = torch.randn(1, 2, 8, 64)
    with pytest.raises(KernelNotPrewarmed) as caught:
        Runtime(settings).attention(q, q, q, AttentionConfig(scale=0.125, softcap=50.0))
    return str(caught.value)


def test_a_cache_that_cannot_be_read_is_told_instead_of_a_command_that_cannot_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    settings = RuntimeSettings(cache_dir=tmp_path, engine="blocked", jit="forbid")
    said = refusal(settings)
    assert said.startswith("kernel attention is not in the cache; run: SOFTCAP_CACHE_DIR=")
    tmp_path.chmod(0o770)
    said = refusal(settings)
    assert " cannot be read; " in said
    assert said.endswith(f"is writable by others; run: chmod go-w {tmp_path}")
    tmp_path.chmod(0o700)
    other = sqlite3.connect(tmp_path / DBNAME, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    said = refusal(settings)
    assert " cannot be read; " in said
    assert "locked" in said
    assert "\n" not in said
    other.close()
    assert " is not in the cache; " in refusal(settings)


def test_a_cache_that_is_empty_and_read_only_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner can run it."""
    real = trust.check
    monkeypatch.setattr(trust, "check", lambda folder: real(folder)._replace(writable=False))
    said = refusal(RuntimeSettings(cache_dir=tmp_path, engine="blocked", jit="forbid"))
    assert f" is not in the cache; run: SOFTCAP_CACHE_DIR={tmp_path} softcap-runtime prewarm " in said


def test_a_warning_of_a_kernel_that_no_command_can_prewarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The words come before it compiles, which would take seconds.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    caplog.set_level(logging.WARNING, "softcap_runtime")
    q = torch.randn(1, 2, 8, 64)
    settings = RuntimeSettings(cache_dir=tmp_path, engine="dense", jit="warn")
    Runtime(settings).attention(q, q, q, AttentionConfig(scale=0.125, softcap=50.0))
    (said,) = [record.message for record in caplog.records if "serving process" in record.message]
    assert said.endswith(" is compiled in each process; call Runtime.prewarm in this one first")


def test_the_command_means_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    runtime = Runtime(RuntimeSettings(cache_dir="c", cache_key_file="secret", engine="blocked", jit="forbid"))
    monkeypatch.chdir("/")
    q = torch.randn(1, 2, 8, 64)
    with pytest.raises(KernelNotPrewarmed) as caught:
        runtime.attention(q, q, q, AttentionConfig(scale=0.125, softcap=50.0))
    words = f"run: SOFTCAP_CACHE_DIR={tmp_path}/c SOFTCAP_CACHE_KEY_FILE={secret} softcap-runtime "
    assert words in str(caught.value)


def test_the_command_has_every_setting_of_the_cache(tmp_path: Path) -> None:
    secret = tmp_path / "a secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    settings = RuntimeSettings(
        cache_dir=tmp_path / "c", cache_key_file=secret, cache_size_limit="3GB", engine="blocked", jit="forbid"
    )
    command = refusal(settings).split("run: ", 1)[1]
    files = f"SOFTCAP_CACHE_DIR={tmp_path}/c SOFTCAP_CACHE_KEY_FILE='{secret}'"
    assert command.startswith(f"{files} SOFTCAP_CACHE_SIZE_LIMIT=3000000000 softcap-runtime prewarm --num-heads 2 ")
