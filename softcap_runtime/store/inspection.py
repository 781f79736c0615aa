"""What people see of a store: entries, status, and why a key would miss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import repair, schema, trust
from softcap_runtime.store.entry import BadEntry, NotAuthenticated
from softcap_runtime.store.fingerprint import fingerprints
from softcap_runtime.store.key import Key
from softcap_runtime.store.report import (
    Counter,
    Difference,
    Document,
    EntryInfo,
    Explanation,
    StoreStatus,
)

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index, Row
    from softcap_runtime.store.stock import Stock

NETWORK_FILESYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "ceph",
    "glusterfs",
    "beegfs",
    "gpfs",
    "9p",
)


def entries(stock: Stock) -> list[EntryInfo]:
    """See ``Store.entries``."""
    return listed(stock, lambda index, row, bad: stock.reject_row(index, row.rowid, bad))


def listed(stock: Stock, odd: Callable[[Index, Row, BadEntry], None] | None = None) -> list[EntryInfo]:
    """Every usable entry, least recently used first; ``odd`` is called for each row that is none. Removes nothing."""
    stock.flush()

    def collect(index: Index) -> list[EntryInfo]:
        found = []
        for row in list(index.rows()):
            if row.reserved:
                continue
            try:
                found.append(_info(row))
            except BadEntry as bad:
                if odd is not None:
                    odd(index, row, bad)
        return found

    nothing: list[EntryInfo] = []
    return sorted(
        stock.database.use("read", collect, nothing), key=lambda info: (info.last_used, info.digest)
    )


def _info(row: Row) -> EntryInfo:
    digest = row.check()
    document = document_of(row.text)
    if entries_.document_digest(document.model_dump()) != digest:
        raise BadEntry("rejected", "it belongs to another key")
    differs = differing(document.fingerprint, _environment_of(document.fingerprint))
    return EntryInfo(
        digest=digest,
        fields=document.fields,
        fingerprint=document.fingerprint,
        bytes=row.value_bytes,
        created=document.created,
        last_used=float(_plausible(row.last_used)),
        hits=int(_plausible(row.hits)),
        build_seconds=document.build_seconds,
        provenance=document.provenance,
        fits=not differs,
        differs=differs,
    )


def _plausible(number: Any) -> float:
    """A count or a time from a column that any process may have written; 0 for what is neither."""
    return number if type(number) in (int, float) and 0 <= number < 2**53 else 0


def document_of(text: Any) -> Document:
    """The validated document of an entry's text; BadEntry when it is not one. Its seals are not checked."""
    document = entries_.parse(entries_.split(text)[0])
    try:
        json.dumps(document, ensure_ascii=False).encode()
        return Document.model_validate(document)
    except (UnicodeEncodeError, RecursionError):
        raise BadEntry("rejected", "its document cannot be written as JSON again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadEntry("rejected", f"its document is not valid: {where}: {first['msg']}") from None


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The fields whose values differ, sorted."""
    return sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))


def _environment_of(stored: Mapping[str, str]) -> dict[str, str]:
    """This environment's fingerprint for the device that an entry was built for, or the one most like it."""
    known = fingerprints("cuda" if "gpu" in stored else "cpu")
    return min(known, key=lambda here: len(differing(stored, here)))


def status(stock: Stock) -> StoreStatus:
    """See ``Store.status``."""
    entry_count, size = stock.database.use("read", lambda index: index.totals(), (0, 0))
    stored = stock.database.use("read", lambda index: index.counters(), None)
    exists = os.path.lexists(stock.folder)
    verdict = trust.check(stock.folder) if exists else trust.Verdict(trust.foresee(stock.folder), False)
    good = "trusted" if exists else "does not exist yet"
    kind = filesystem_type(stock.folder)
    return StoreStatus(
        folder=_unicode(str(stock.folder)),
        exists=stock.folder.is_dir(),
        writable=verdict.writable,
        trusted=verdict.problem is None,
        verdict=_unicode(verdict.problem or good),
        owner="" if verdict.owner is None else trust.owner_name(verdict.owner),
        mode="" if verdict.mode is None else f"{verdict.mode:04o}",
        filesystem=kind,
        network_filesystem=kind in NETWORK_FILESYSTEMS or kind.startswith("fuse."),
        schema_version=schema.USER_VERSION,
        fault=None if stock.fault is None else _unicode(stock.fault),
        authenticated=stock.auth_key is not None,
        entries=entry_count,
        bytes=size,
        size_limit=stock.size_limit,
        held_in_memory=stock.held_in_memory,
        quarantine=_names(stock.folder / repair.QUARANTINE),
        counters={
            name: Counter(value=count.value, since=count.since)
            for name, count in stock.counters.merged(stored).items()
        },
    )


def absent(folder: Path) -> str:
    """What is said of a folder that is not there by whoever only looks, and so makes none."""
    return f"cache folder {folder} does not exist"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(map(_unicode, os.listdir(folder)))
    except OSError:
        return []


def _unicode(text: str) -> str:
    """A text with names of files in it, of whatever bytes: JSON can hold it."""
    return os.fsencode(text).decode("utf-8", "replace")


def filesystem_type(folder: Path) -> str:
    """The kernel's name for the type of filesystem that ``folder`` lies on; ``unknown`` if it has none."""
    real = os.path.realpath(folder)
    best, kind = -1, "unknown"
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, place, name, *_ = line.split(" ")
                place = place.replace("\\040", " ")
                inside = real == place or real.startswith(place.rstrip("/") + "/")
                if inside and len(place) >= best:
                    best, kind = len(place), name
    except (OSError, ValueError):
        return "unknown"
    return kind


def explain(stock: Stock, key: Key) -> Explanation:
    """See ``Store.explain``."""
    known = listed(stock)
    same = next((info for info in known if info.digest == key.digest), None)
    found = stock.examine(key.digest)

    def answer(
        present: bool, reason: str, nearest: EntryInfo | None, differences: list[Difference]
    ) -> Explanation:
        return Explanation(
            digest=key.digest,
            fields=dict(key.fields),
            present=present,
            reason=reason,
            nearest=nearest,
            differences=differences,
        )

    if isinstance(found, NotAuthenticated):
        return answer(False, f"{found}; set SOFTCAP_CACHE_KEY_FILE to that one, or prewarm it", same, [])
    if isinstance(found, BadEntry):
        return answer(False, f"its entry is not used: {found}; prewarm builds it anew", same, [])
    if same is not None:
        return answer(True, "present", same, [])
    if not known:
        empty = "the cache is empty" if os.path.lexists(stock.folder) else absent(stock.folder)
        reason = stock.fault or empty
        return answer(False, reason, None, [])
    nearest = min(known, key=lambda info: _distance(key, info))
    differences = _differences(key, nearest)
    told = "; ".join(f"{d.field}: wanted {d.wanted!r}, stored {d.stored!r}" for d in differences)
    return answer(False, f"no such entry; the nearest differs in {told}", nearest, differences)


def _distance(key: Key, info: EntryInfo) -> tuple[int, int]:
    """How far an entry is; of two equally far the one that differs in its environment only is the nearer."""
    differences = _differences(key, info)
    return len(differences), sum(not one.field.startswith("fingerprint.") for one in differences)


def _differences(key: Key, info: EntryInfo) -> list[Difference]:
    # Fields and fingerprint are shown in one namespace: a fingerprint's field is told by its prefix.
    wanted = {**key.fields, **{f"fingerprint.{name}": value for name, value in key.fingerprint.items()}}
    stored = {**info.fields, **{f"fingerprint.{name}": value for name, value in info.fingerprint.items()}}
    return [
        Difference(field=name, wanted=wanted.get(name), stored=stored.get(name))
        for name in differing(stored, wanted)
    ]
