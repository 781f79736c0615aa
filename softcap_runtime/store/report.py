"""The pydantic models of the store's reports, also the documents of ``inspect --json``. Not imported at start-up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Name = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
Text = Annotated[str, Field(strict=True, max_length=4000)]
Fields = dict[Name, StrictBool | StrictInt | StrictStr]
Seconds = Annotated[float, Field(ge=0, le=2**40, allow_inf_nan=False)]


class Frozen(BaseModel):
    """The base of all reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Described(Frozen):
    """The contents of an entry's document: ``created`` in seconds since the epoch, ``bytes`` of its payload."""

    fields: Fields
    fingerprint: dict[Name, Text]
    bytes: Annotated[int, Field(strict=True, ge=0)]
    created: Seconds
    build_seconds: Seconds
    provenance: dict[Name, Text]


class Document(Described):
    """An entry's document, as read from disk or from a bundle."""

    format: Literal[1]


class EntryInfo(Described):
    """One entry; ``last_used`` in seconds since the epoch.

    ``hits``: how often it was loaded; each process loads it once and then keeps it in memory. ``fits``: whether this
    environment can use it; ``differs``: the fields of the fingerprint that differ.
    """

    digest: str
    last_used: float
    hits: int
    fits: bool
    differs: list[str]


class StoreStatus(Frozen):
    """The state of a cache folder. ``fault``: why the disk is not used, or what last went wrong with it.

    ``owner`` and ``mode``: those of the folder. ``verdict``: the result of checking owners and modes (``trusted``,
    ``does not exist yet``, or the problem with its remedy). ``filesystem``: its type. ``schema_version``: that of the
    database. ``bytes``: of all payloads. ``held_in_memory``: entries that could not be written. ``quarantine``: names
    of the files there. ``counters``: of all processes, since the database was created.
    """

    folder: str
    exists: bool
    writable: bool
    trusted: bool
    verdict: str
    owner: str
    mode: str
    filesystem: str
    network_filesystem: bool
    schema_version: int
    fault: str | None
    authenticated: bool
    entries: int
    bytes: int
    size_limit: int
    held_in_memory: int
    quarantine: list[str]
    counters: dict[str, int]


class Problem(Frozen):
    """One finding of ``verify``: ``where`` (an entry's digest, a row or a file) and ``what``.

    ``repaired``: whether it was moved into quarantine.
    """

    where: str
    what: str
    repaired: bool


class Difference(Frozen):
    """A field whose value is not the one asked for; None on a side that lacks the field."""

    field: str
    wanted: bool | int | str | None
    stored: bool | int | str | None


class Explanation(Frozen):
    """Whether the key of ``fields`` would hit and, if not, how the nearest entry differs (None: the cache is empty).

    If the entry itself is there but must not be used, it is the nearest, and ``reason`` says what is wrong with it.
    """

    digest: str
    fields: Fields
    present: bool
    reason: str
    nearest: EntryInfo | None
    differences: list[Difference]


class ImportReport(Frozen):
    """What an import did: entries ``imported``, already ``present``, and ``refused`` with the reason."""

    imported: int
    present: int
    refused: list[Problem]
