"""Bundles: entries in one file, to be built once and carried to other machines of the same fingerprint.

A magic line, then the entries (length of text, length of payload, text, payload), then the SHA-256 of
everything before, then the HMAC-SHA256 of the same (empty without an authentication key). Lengths are 8-byte
big-endian; a pair of zeros ends the entries. Every entry carries its own seals as well.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store import entry as entries_
from softcap_runtime.store.entry import MAX_DOCUMENT, BadEntry, NotAuthenticated, Sealed, printable
from softcap_runtime.store.inspection import differing, document_of, listed
from softcap_runtime.store.report import ImportReport, Problem

if TYPE_CHECKING:
    from softcap_runtime.store.stock import Stock

MAGIC = b"softcap-runtime bundle 1\n"
LENGTHS = struct.Struct(">QQ")
MAX_BUNDLE = 2**34


class Incomplete(SoftcapRuntimeError):
    """An export that would lack entries; nothing was written. ``bad``: the damaged ones, by digest."""

    def __init__(self, bad: Sequence[tuple[str, BadEntry]]) -> None:
        foreign = sum(isinstance(why, NotAuthenticated) for _, why in bad)
        self.bad = [one for one in bad if not isinstance(one[1], NotAuthenticated)]
        told = [f"{len(self.bad)} entries are damaged"] if self.bad else []
        remedy = "run verify --repair and prewarm, then export again"
        if foreign:
            told.append(f"{foreign} entries are not authenticated with this key")
            remedy = f"set SOFTCAP_CACHE_KEY_FILE to the one that they were made with, or {remedy}"
        super().__init__(f"nothing was exported: {' and '.join(told)}; {remedy}")


def export(stock: Stock, path: Path, fingerprint: Mapping[str, str] | None) -> int:
    """See ``Store.export_bundle``."""
    chosen, bad = _chosen(stock, fingerprint)
    if stock.fault is not None:
        raise OSError(stock.fault)
    if bad:
        raise Incomplete(bad)
    body = io.BytesIO()
    body.write(MAGIC)
    for one in chosen:
        carried = entries_.reseal(one, stock.auth_key)
        text = carried.text.encode("ascii")
        body.write(LENGTHS.pack(len(text), len(carried.payload)) + text + carried.payload)
    body.write(LENGTHS.pack(0, 0))
    try:
        _write(path, body.getvalue(), stock.auth_key)
    except OSError as error:
        raise OSError(f"bundle {path} cannot be written: {error.strerror or error}") from error
    return len(chosen)


def _chosen(
    stock: Stock, fingerprint: Mapping[str, str] | None
) -> tuple[list[Sealed], list[tuple[str, BadEntry]]]:
    """The entries that belong into a bundle, and which of them, or of rows that may be one, are bad and why.

    Nothing is removed: an export that failed must fail again until somebody built what is missing.
    """
    bad: list[tuple[str, BadEntry]] = []
    known = listed(stock, lambda _, row, why: bad.append((printable(str(row.key)[:100]), why)))
    chosen = []
    for info in known:
        if fingerprint is not None and info.fingerprint != dict(fingerprint):
            continue
        found = stock.examine(info.digest)
        if isinstance(found, BadEntry):
            bad.append((info.digest, found))
        elif found is not None:
            chosen.append(found)
    return chosen, bad


def _write(path: Path, body: bytes, auth_key: bytes | None) -> None:
    if path.exists() and not path.is_file():  # to rename a file over /dev/null is to remove it
        raise OSError("it is no file; name one")
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:  # follows no link that another user put there
            file.write(body)
            file.write(hashlib.sha256(body).digest())
            if auth_key is not None:
                file.write(hmac.digest(auth_key, body, "sha256"))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def import_(stock: Stock, path: Path, expected: Mapping[str, str]) -> ImportReport:
    """See ``Store.import_bundle``."""
    fitting: dict[str, Sealed] = {}
    refused: list[Problem] = []
    for entry in read(path, stock.auth_key):
        try:
            document = document_of(entry.text)
            digest = entries_.document_digest(document.model_dump())
            entries_.verify(entry.text, entry.payload, digest, stock.auth_key)
        except BadEntry as bad:
            raise ValueError(f"bundle {path}: refused, one of its entries is bad: {bad}") from None
        differs = differing(document.fingerprint, expected)
        if not differs:
            fitting[digest] = entry
            continue
        told = "; ".join(
            f"{name}: bundle has {document.fingerprint.get(name)!r}, here {expected.get(name)!r}"
            for name in differs
        )
        refused.append(Problem(where=digest, what=f"does not fit: {told}", repaired=False))
    needed = sum(len(entry.payload) for entry in fitting.values())
    if needed > stock.size_limit:  # the last would evict the first
        raise ValueError(
            f"bundle {path}: nothing was imported, its {len(fitting)} entries for here need {needed} bytes; "
            f"SOFTCAP_CACHE_SIZE_LIMIT is {stock.size_limit}, raise it"
        )
    return _taken(stock, fitting, refused)


def _taken(stock: Stock, fitting: Mapping[str, Sealed], refused: list[Problem]) -> ImportReport:
    """Publish what is not here yet."""
    present = [digest for digest in fitting if stock.sealed(digest) is not None]
    for digest in present:
        stock.counters.use(digest, 0)  # no load, but none of those that the new ones may evict
    stock.flush()
    new = [digest for digest in fitting if digest not in present]
    imported = 0
    for digest in new:
        if stock.put(digest, fitting[digest]):
            imported += 1
        else:
            what = f"could not be written: {stock.fault}"
            refused.append(Problem(where=digest, what=what, repaired=False))
    return ImportReport(imported=imported, present=len(present), refused=refused)


def read(path: Path, auth_key: bytes | None) -> list[Sealed]:
    """The entries of a bundle whose file seals hold; their own seals are not checked here.

    Raises OSError when it cannot be read, ValueError when it is not a bundle or was changed.
    """
    size = os.stat(path).st_size
    if size > MAX_BUNDLE:
        raise ValueError(f"bundle {path}: {size} bytes, expected at most {MAX_BUNDLE}")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"bundle {path}: not a bundle of this version; export it again")
        data = MAGIC + file.read()
    try:
        carried, end = _entries(io.BytesIO(data), len(data))
    except BadEntry as bad:
        raise ValueError(f"bundle {path}: refused, {bad}") from None
    body, seals = data[:end], data[end:]
    if not hmac.compare_digest(hashlib.sha256(body).digest(), seals[:32]) or len(seals) not in (32, 64):
        raise ValueError(f"bundle {path}: refused, its checksum does not match its bytes; copy it again")
    if auth_key is not None and not hmac.compare_digest(hmac.digest(auth_key, body, "sha256"), seals[32:]):
        raise ValueError(f"bundle {path}: refused, its HMAC is missing or made with another key")
    return carried


def _entries(file: BinaryIO, size: int) -> tuple[list[Sealed], int]:
    file.seek(len(MAGIC))
    return list(_each(file, size)), file.tell()


def _each(file: BinaryIO, size: int) -> Iterator[Sealed]:
    while True:
        lengths = file.read(LENGTHS.size)
        if len(lengths) != LENGTHS.size:
            raise BadEntry("corrupt", "it ends in the middle of an entry")
        text_length, payload_length = LENGTHS.unpack(lengths)
        if text_length == payload_length == 0:
            return
        if text_length > MAX_DOCUMENT or payload_length > size:
            raise BadEntry("corrupt", "an entry claims more bytes than the file has")
        text, payload = file.read(text_length), file.read(payload_length)
        if len(text) != text_length or len(payload) != payload_length:
            raise BadEntry("corrupt", "it ends in the middle of an entry")
        yield Sealed(text.decode("ascii", "replace"), payload)
