"""The key of an entry: what was asked for and the environment it was built in, as canonical JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FieldValue = str | int | bool


def canonical(document: Any) -> str:
    """JSON with one spelling per document: sorted keys, no whitespace, ASCII only, no NaN.

    Raises ValueError or TypeError for what JSON cannot represent.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class Key:
    """``fields`` say what the entry is, ``fingerprint`` which environment can use it (see ``fingerprint()``).

    ``digest``: the SHA-256 of both, as 64 hex digits; equality and hash follow it. Raises TypeError for a value that
    is not a str, int or bool.
    """

    fields: Mapping[str, FieldValue] = field(compare=False)
    fingerprint: Mapping[str, str] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        for name, value in self.fields.items():
            if type(name) is not str or type(value) not in (str, int, bool):
                raise TypeError(f"fields: {name!r}={value!r}, expected a str naming a str, int or bool")
        for name, value in self.fingerprint.items():
            if type(name) is not str or type(value) is not str:
                raise TypeError(f"fingerprint: {name!r}={value!r}, expected a str naming a str")
        object.__setattr__(self, "fields", dict(self.fields))
        object.__setattr__(self, "fingerprint", dict(self.fingerprint))
        object.__setattr__(self, "digest", digest_of(self.fields, self.fingerprint))


def digest_of(fields: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    """The SHA-256 of fields and fingerprint, as 64 hex digits."""
    document = {"fields": dict(fields), "fingerprint": dict(fingerprint)}
    return hashlib.sha256(canonical(document).encode("ascii")).hexdigest()


def is_digest(text: object) -> bool:
    """Whether ``text`` has the form of ``Key.digest``."""
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")
