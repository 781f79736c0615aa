"""Bundles: cache entries in one file, to copy kernels to other machines with the same fingerprint.

Format: a magic line; the entries, each as length of text, length of payload, text, payload; a pair of zero lengths;
the SHA-256 of everything before it; the HMAC-SHA256 of the same (empty without an authentication key). Lengths are
8-byte big-endian integers. Every entry also carries its own seals.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store import entry as entries_
from softcap_runtime.store.entry import MAX_DOCUMENT, BadEntry, NotAuthenticated, Sealed, printable
from softcap_runtime.store.inspection import differing, document_of, rows
from softcap_runtime.store.report import ImportReport, Problem
from softcap_runtime.store.store import Store

MAGIC = b"softcap-runtime bundle 1\n"
LENGTHS = struct.Struct(">QQ")
MAX_BUNDLE = 2**34


class Incomplete(SoftcapRuntimeError):
    """An export would be incomplete, so nothing was written. ``bad``: the damaged entries, by digest."""

    def __init__(self, bad: Sequence[tuple[str, BadEntry]]) -> None:
        self.bad = [one for one in bad if not isinstance(one[1], NotAuthenticated)]
        foreign = len(bad) - len(self.bad)
        counts = (len(self.bad), "damaged"), (foreign, "not authenticated with this key")
        why = [f"{count} {'entry is' if count == 1 else 'entries are'} {what}" for count, what in counts if count]
        remedy = "run verify --repair and prewarm, then export again"
        if foreign:
            remedy = f"set SOFTCAP_CACHE_KEY_FILE to the one that they were made with, or {remedy}"
        super().__init__(f"nothing was exported: {' and '.join(why)}; {remedy}")


def export(store: Store, path: Path, fingerprint: Mapping[str, str] | None = None) -> int:
    """Write the entries of ``fingerprint`` (None: all) into one file; returns how many.

    Raises Incomplete, and writes nothing, if one of them is bad or not authenticated: else only the machines that lack
    it would notice. Raises OSError if the file cannot be written or the cache cannot be read.
    """
    # Bad entries stay: an export that failed must fail again until the missing kernels have been built.
    known, odd = rows(store)
    bad = [(printable(str(row.key)[:100]), why) for row, why in odd]
    parts, count = [MAGIC], 0
    for info in known:
        if fingerprint is not None and info.fingerprint != dict(fingerprint):
            continue
        found = store.examine(info.digest)
        if isinstance(found, BadEntry):
            bad.append((info.digest, found))
        elif found is not None:
            text = entries_.reseal(found, store.auth_key).text.encode("ascii")
            parts += [LENGTHS.pack(len(text), len(found.payload)), text, found.payload]
            count += 1
    if store.fault is not None:
        raise OSError(store.fault)
    if bad:
        raise Incomplete(bad)
    body = b"".join([*parts, LENGTHS.pack(0, 0)])
    try:
        _write(path, body, _seals(body, store.auth_key))
    except OSError as error:
        raise OSError(f"bundle {path} cannot be written: {error.strerror or error}") from error
    return count


def _seals(body: bytes, auth_key: bytes | None) -> bytes:
    mac = b"" if auth_key is None else hmac.digest(auth_key, body, "sha256")
    return hashlib.sha256(body).digest() + mac


def _write(path: Path, *parts: bytes) -> None:
    if path.exists() and not path.is_file():  # to rename a file over /dev/null is to remove it
        raise OSError("it is no file; name one")
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:  # follows no link that another user put there
            file.writelines(parts)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def import_(store: Store, path: Path, expected: Mapping[str, str]) -> ImportReport:
    """Import the entries of a bundle that fit the fingerprint ``expected``; the report names the rest.

    Raises OSError if the file cannot be read; ValueError if it is not a bundle, was changed, or its fitting entries
    exceed the size limit. Nothing is imported then.
    """
    fitting: dict[str, Sealed] = {}
    refused: list[Problem] = []
    try:
        for entry in _read(path, store.auth_key):
            document = document_of(entry.text)
            digest = entries_.document_digest(document.model_dump())
            entries_.verify(entry.text, entry.payload, digest, store.auth_key)
            differs = differing(document.fingerprint, expected)
            if not differs:
                fitting[digest] = entry
                continue
            why = "; ".join(
                f"{name}: bundle has {document.fingerprint.get(name)!r}, here {expected.get(name)!r}"
                for name in differs
            )
            refused.append(Problem(where=digest, what=f"does not fit: {why}", repaired=False))
    except BadEntry as bad:
        raise ValueError(f"bundle {path}: refused, one of its entries is bad: {bad}") from None
    needed = sum(len(entry.payload) for entry in fitting.values())
    if needed > store.size_limit:  # the last entry would evict the first
        raise ValueError(
            f"bundle {path}: nothing was imported, its {len(fitting)} entries that fit here need {needed} bytes; "
            f"SOFTCAP_CACHE_SIZE_LIMIT is {store.size_limit}, raise it"
        )
    present = [digest for digest in fitting if store.sealed(digest) is not None]
    for digest in present:
        store.counters.use(digest, 0)  # not a load, but new entries must not evict it
    store.flush()
    imported = 0
    for digest in [digest for digest in fitting if digest not in present]:
        if store.put(digest, fitting[digest]):
            imported += 1
        else:
            what = f"could not be written: {store.fault}"
            refused.append(Problem(where=digest, what=what, repaired=False))
    return ImportReport(imported=imported, present=len(present), refused=refused)


def _read(path: Path, auth_key: bytes | None) -> list[Sealed]:
    """The entries of a bundle, once the seals of the file are verified; those of each entry are not checked here.

    Raises OSError when the file cannot be read, ValueError when it is not a bundle or was changed.
    """
    size = os.stat(path).st_size
    if size > MAX_BUNDLE:
        raise ValueError(f"bundle {path}: {size} bytes, expected at most {MAX_BUNDLE}")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"bundle {path}: not a bundle of this version; export it again")
        data = MAGIC + file.read()
    found, end = [], len(MAGIC)
    while True:
        try:
            text_length, payload_length = LENGTHS.unpack_from(data, end)
        except struct.error:
            raise ValueError(f"bundle {path}: refused, it ends in the middle of an entry") from None
        middle = end + LENGTHS.size + text_length
        if text_length > MAX_DOCUMENT or middle + payload_length > len(data):
            raise ValueError(f"bundle {path}: refused, an entry claims more bytes than the file has")
        text, end = data[end + LENGTHS.size : middle], middle + payload_length
        if text_length == payload_length == 0:
            break
        found.append(Sealed(text.decode("ascii", "replace"), data[middle:end]))
    body, checksum, mac = data[:end], data[end : end + 32], data[end + 32 :]
    if not hmac.compare_digest(hashlib.sha256(body).digest(), checksum) or len(mac) not in (0, 32):
        raise ValueError(f"bundle {path}: refused, its checksum does not match its bytes; copy it again")
    if auth_key is not None and not hmac.compare_digest(hmac.digest(auth_key, body, "sha256"), mac):
        raise ValueError(f"bundle {path}: refused, its HMAC is missing or made with another key")
    return found
