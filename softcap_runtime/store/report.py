"""The pydantic models of what the store reports, also as ``inspect --json``. Not imported at start-up."""

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
    """What an entry's document says: ``created`` in seconds since the epoch, ``bytes`` of its payload."""

    fields: Fields
    fingerprint: dict[Name, Text]
    bytes: Annotated[int, Field(strict=True, ge=0)]
    created: Seconds
    build_seconds: Seconds
    provenance: dict[Name, Text]


class Document(Described):
    """The document of an entry, as read from disk or from a bundle."""

    format: Literal[1]


class EntryInfo(Described):
    """One entry; ``last_used`` in seconds since the epoch.

    ``hits``: how often a process loaded it; a process does so once, and then calls it from its memory.
    ``fits``: whether this environment can use it; ``differs``: the fingerprint fields that say no.
    """

    digest: str
    last_used: float
    hits: int
    fits: bool
    differs: list[str]


class StoreStatus(Frozen):
    """The state of a cache folder. ``fault``: why the disk is not used, or what last went wrong with it.

    ``owner`` and ``mode`` are the folder's, ``verdict`` what the check of owners and modes says (``trusted``,
    ``does not exist yet``, or the problem with its remedy), ``filesystem`` its type, ``schema_version`` that of
    the database.
    ``bytes`` counts payloads, ``held_in_memory`` entries that could not be written, ``quarantine`` names the
    files that were moved aside. ``counters``: of every process, since the database was made.
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
    """Something that ``verify`` found: ``where`` (an entry's digest, a row or a file) and ``what``.

    ``repaired``: whether it was put into quarantine.
    """

    where: str
    what: str
    repaired: bool


class Difference(Frozen):
    """A field whose value is not the one asked for; None where a side has no such field."""

    field: str
    wanted: bool | int | str | None
    stored: bool | int | str | None


class Explanation(Frozen):
    """Whether the key of ``fields`` would hit, and if not how the nearest entry differs (None: the cache is empty).

    An entry that is there and must not be used is its own nearest; ``reason`` then says what is wrong with it.
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
