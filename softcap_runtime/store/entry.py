"""One entry: a document that describes it, a payload, and seals over both.

The document is one line of canonical JSON (key, fingerprint, size, creation, provenance). Two lines follow
it: the SHA-256 over document and payload, and the HMAC-SHA256 over the same bytes (empty without an
authentication key). Document and seals lie in the ``tag`` column, so that listing a cache reads no payload.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from softcap_runtime.store.key import Key, canonical, digest_of

FORMAT = 1
MAX_DOCUMENT = 64 * 1024  # characters; ours have about 1,000


class BadEntry(Exception):
    """An entry that must not be used; ``kind``: ``corrupt`` (damaged) or ``rejected`` (not ours)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(printable(reason))
        self.kind = kind


class NotAuthenticated(BadEntry):
    """An intact entry that was not sealed with this process's secret: refused, but kept for its owner."""

    def __init__(self) -> None:
        super().__init__("rejected", "its HMAC is missing or made with another key")


class Sealed(NamedTuple):
    """An entry as stored: the three lines of text, and the payload."""

    text: str
    payload: bytes


def seal(
    key: Key,
    payload: bytes,
    *,
    created: float,
    build_seconds: float,
    provenance: Mapping[str, str],
    auth_key: bytes | None,
) -> Sealed:
    """The entry of ``payload`` under ``key``; ``created`` in seconds since the epoch."""
    document = canonical(
        {
            "format": FORMAT,
            "fields": dict(key.fields),
            "fingerprint": dict(key.fingerprint),
            "bytes": len(payload),
            "created": round(created, 3),
            "build_seconds": round(build_seconds, 3),
            "provenance": dict(provenance),
        }
    )
    return Sealed(_text(document, payload, auth_key), payload)


def reseal(entry: Sealed, auth_key: bytes | None) -> Sealed:
    """The same entry, authenticated with ``auth_key``."""
    return Sealed(_text(entry.text.split("\n")[0], entry.payload, auth_key), entry.payload)


def verify(text: object, payload: object, digest: str, auth_key: bytes | None) -> dict[str, Any]:
    """Verify an entry's seals and that its key is ``digest``; returns its document.

    Raises BadEntry: nothing of the entry may be used. With ``auth_key`` it raises NotAuthenticated for a missing or
    wrong HMAC where nothing else is wrong.
    """
    if not isinstance(payload, bytes):
        raise BadEntry("rejected", f"its value is {type(payload).__name__}, expected bytes")
    line, checksum, mac = split(text)
    expected, expected_mac = _seals(line, payload, auth_key)
    if not hmac.compare_digest(expected, checksum):
        raise BadEntry("corrupt", "its checksum does not match its bytes")
    document = parse(line)
    if document_digest(document) != digest:
        raise BadEntry("rejected", "it belongs to another key")
    if auth_key is not None and not hmac.compare_digest(expected_mac, mac):
        raise NotAuthenticated
    return document


def split(text: object) -> tuple[str, str, str]:
    """Document, checksum and HMAC of an entry's text; BadEntry when it has another form."""
    if not isinstance(text, str):
        raise BadEntry("rejected", f"its document is {type(text).__name__}, expected text")
    if len(text) > MAX_DOCUMENT:
        raise BadEntry("rejected", f"its document has {len(text)} characters, expected at most {MAX_DOCUMENT}")
    lines = text.split("\n")
    if len(lines) != 3 or not text.isascii():
        raise BadEntry("corrupt", "its document is not three lines of ASCII")
    return lines[0], lines[1], lines[2]


def parse(line: str) -> dict[str, Any]:
    """The document as a dict with the right format number; BadEntry otherwise."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise BadEntry("corrupt", "its document is not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadEntry("rejected", f"its document is not of format {FORMAT}")
    return document


def document_digest(document: dict[str, Any]) -> str:
    """The digest that a document claims; empty when it has no key."""
    fields, fingerprint = document.get("fields"), document.get("fingerprint")
    if not isinstance(fields, dict) or not isinstance(fingerprint, dict):
        return ""
    try:
        return digest_of(fields, fingerprint)
    except (ValueError, TypeError, RecursionError):
        return ""


def printable(text: str) -> str:
    """``text`` without line breaks and control characters: what is on disk may be shown on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _text(line: str, payload: bytes, auth_key: bytes | None) -> str:
    return "\n".join([line, *_seals(line, payload, auth_key)])


def _seals(line: str, payload: bytes, auth_key: bytes | None) -> tuple[str, str]:
    """Checksum and HMAC of an entry as hex digits; the HMAC is empty without ``auth_key``."""
    document = line.encode("ascii")
    framed = b"softcap-entry %d %d\n" % (len(document), len(payload)) + document + payload
    mac = "" if auth_key is None else hmac.new(auth_key, framed, hashlib.sha256).hexdigest()
    return hashlib.sha256(framed).hexdigest(), mac
