"""What people ask of a store: its entries and state, why a key would miss, what is damaged."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import quarantine, schema, trust
from softcap_runtime.store.entry import BadEntry, NotAuthenticated
from softcap_runtime.store.fingerprint import fingerprints
from softcap_runtime.store.index import Index, Row
from softcap_runtime.store.key import Key
from softcap_runtime.store.report import Difference, Document, EntryInfo, Explanation, Problem, StoreStatus
from softcap_runtime.store.store import Store

log = logging.getLogger(__name__)

NETWORK_FILESYSTEM = re.compile(r"nfs4?|cifs|smb3|smbfs|lustre|ceph|glusterfs|beegfs|gpfs|9p|fuse\..*")

BadRows = list[tuple[Row, BadEntry]]


def entries(store: Store) -> list[EntryInfo]:
    """Every usable entry, least recently used first. All other rows are counted as rejected and removed."""
    good, bad = rows(store)
    for row, why in bad:
        store.counters.add(why.kind)
        log.warning("row %d of %s is not used: %s", row.rowid, store.folder, why)
    if bad and store.database.writable:
        numbers = [row.rowid for row, _ in bad]
        store.database.use("write", lambda index: index.remove_rows(numbers), None)
    return good


def rows(store: Store) -> tuple[list[EntryInfo], BadRows]:
    """Every usable entry, least recently used first, and every other row with the reason. Removes nothing."""
    store.flush()
    good, bad, nothing = [], [], list[Row]()
    for row in store.database.use("read", lambda index: index.rows(), nothing):
        try:
            good.append(_info(row))
        except BadEntry as why:
            bad.append((row, why))
    return sorted(good, key=lambda info: (info.last_used, info.digest)), bad


def _info(row: Row) -> EntryInfo:
    digest = row.check()
    document = document_of(row.text)
    if entries_.document_digest(document.model_dump()) != digest:
        raise BadEntry("rejected", "it belongs to another key")
    # Of this environment's fingerprints for that type of device, the one most like the entry's.
    known = fingerprints("cuda" if "gpu" in document.fingerprint else "cpu")
    differs = min((differing(document.fingerprint, here) for here in known), key=len)
    return EntryInfo(
        **document.model_dump(exclude={"format", "bytes"}),
        digest=digest,
        bytes=row.value_bytes,
        last_used=float(_plausible(row.last_used)),
        hits=int(_plausible(row.hits)),
        fits=not differs,
        differs=differs,
    )


def _plausible(number: Any) -> float:
    """A count or time from a column that any process may have written; 0 if it cannot be one."""
    return number if type(number) in (int, float) and 0 <= number < 2**53 else 0


def document_of(text: Any) -> Document:
    """The validated document of an entry's text, its seals unchecked. Raises BadEntry if it is not valid."""
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


def status(store: Store) -> StoreStatus:
    """The state of the folder and the counters of every process."""
    entry_count, size = store.database.use("read", lambda index: index.totals(), (0, 0))
    stored = store.database.use("read", lambda index: index.counters(), None)
    exists = os.path.lexists(store.folder)
    verdict = trust.check(store.folder) if exists else trust.Verdict(trust.probe(store.folder), False)
    kind = filesystem_type(store.folder)
    return StoreStatus(
        folder=_unicode(str(store.folder)),
        exists=store.folder.is_dir(),
        writable=verdict.writable,
        trusted=verdict.problem is None,
        verdict=_unicode(verdict.problem or ("trusted" if exists else "does not exist yet")),
        owner="" if verdict.owner is None else trust.owner_name(verdict.owner),
        mode="" if verdict.mode is None else f"{verdict.mode:04o}",
        filesystem=kind,
        network_filesystem=NETWORK_FILESYSTEM.fullmatch(kind) is not None,
        schema_version=schema.USER_VERSION,
        fault=None if store.fault is None else _unicode(store.fault),
        authenticated=store.auth_key is not None,
        entries=entry_count,
        bytes=size,
        size_limit=store.size_limit,
        held_in_memory=store.held_in_memory,
        quarantine=sorted(_unicode(path.name) for path in store.folder.glob(f"{quarantine.FOLDER}/*")),
        counters=store.counters.total(stored),
    )


def absent(folder: Path) -> str:
    """The message for a command that only reads and finds no cache folder."""
    return f"cache folder {folder} does not exist"


def _unicode(text: str) -> str:
    """``text`` as valid Unicode, which JSON requires: file names may hold any bytes."""
    return os.fsencode(text).decode("utf-8", "replace")


def filesystem_type(folder: Path) -> str:
    """The type of filesystem that holds ``folder``, as /proc names it; ``unknown`` if it cannot be told."""
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


def explain(store: Store, key: Key) -> Explanation:
    """Whether ``key`` would hit and, if not, the nearest entry and the fields that differ."""
    known, _ = rows(store)
    nearest = next((info for info in known if info.digest == key.digest), None)
    found = store.examine(key.digest)
    differences: list[Difference] = []
    if isinstance(found, NotAuthenticated):
        reason = f"{found}; set SOFTCAP_CACHE_KEY_FILE to that one, or prewarm it"
    elif isinstance(found, BadEntry):
        reason = f"its entry is not used: {found}; prewarm builds it anew"
    elif nearest is not None:
        reason = "present"
    elif known:
        nearest = min(known, key=lambda info: _distance(key, info))
        differences = _differences(key, nearest)
        fields = "; ".join(f"{d.field}: wanted {d.wanted!r}, stored {d.stored!r}" for d in differences)
        reason = f"no such entry; the nearest differs in {fields}"
    else:
        empty = "the cache is empty" if os.path.lexists(store.folder) else absent(store.folder)
        reason = store.fault or empty
    return Explanation(
        digest=key.digest,
        fields=dict(key.fields),
        present=reason == "present",
        reason=reason,
        nearest=nearest,
        differences=differences,
    )


def _distance(key: Key, info: EntryInfo) -> tuple[int, int]:
    """How many fields differ; among equals, an entry that differs only in its environment is nearer."""
    differences = _differences(key, info)
    return len(differences), sum(not one.field.startswith("fingerprint.") for one in differences)


def _differences(key: Key, info: EntryInfo) -> list[Difference]:
    # Fields and fingerprint share one namespace: a prefix marks those of the fingerprint.
    wanted, stored = (
        {**one.fields, **{f"fingerprint.{name}": value for name, value in one.fingerprint.items()}}
        for one in (key, info)
    )
    return [
        Difference(field=name, wanted=wanted.get(name), stored=stored.get(name)) for name in differing(stored, wanted)
    ]


def verify(store: Store, repair: bool = False) -> list[Problem]:
    """Read and check everything; ``repair`` moves what is bad into the folder's quarantine."""
    store.flush()
    known, nothing = len(store.database.moved), list[Problem]()
    problems = store.database.use("verify", lambda index: list(_problems(store, index, repair)), nothing)
    for line in store.database.moved[known:]:
        problems.insert(0, Problem(where=schema.DBNAME, what=line, repaired=True))
    if store.fault is not None:
        problems.append(Problem(where=str(store.folder), what=store.fault, repaired=False))
    return problems


def _problems(store: Store, index: Index, repair: bool) -> Iterator[Problem]:
    repair = repair and store.database.can_write()
    damage = index.damage()
    if damage and repair:
        raise sqlite3.DatabaseError(damage[0])  # makes ``use`` move the database aside
    for line in damage:
        yield Problem(where=schema.DBNAME, what=line, repaired=False)
    for row in index.rows():
        try:
            digest = row.check()
            found = index.read(digest)
            if found is not None:
                entries_.verify(found.text, found.payload, digest, store.auth_key)
                document_of(found.text)
        except BadEntry as bad:
            store.counters.add(bad.kind)
            if repair:
                quarantine.keep_row(store.folder, *index.raw_row(row.rowid))
                index.remove_rows([row.rowid])
            yield Problem(where=str(row.key)[:100], what=str(bad), repaired=repair)
