"""What an artifact is: a kernel, or a library of them, that is built once per machine and loaded by every process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.store.key import Key


class Artifact(Hashable, Protocol):
    """A source, a toolchain and a key. Equal artifacts are one: it stands in tables by its hash.

    Implementations are small tuples (``NamedTuple`` classes with these methods); making one does no work.
    """

    def key(self) -> Key | None:
        """The name under which the store keeps it: everything that its bytes depend on.

        ``fields`` holds what it is compiled for and ``sources``, the digest of the files that it comes from (see
        ``sources.digest``); ``fingerprint`` the environment that can use it (see ``store.fingerprint``). None for what
        has no bytes to keep, as ``torch.compile`` makes it in each process: ``load`` makes it, and nothing else is
        called.
        """

    def describe(self) -> KernelSpec:
        """What people read of it, in tables and errors."""

    def build(self) -> bytes:
        """Its bytes, made by a child process (see ``build``). Raises BuildFailed in one line; ``children.Stopped``
        when the work that wants it is given up."""

    def provenance(self) -> Mapping[str, str]:
        """What built it (the compiler's version, say), kept beside its bytes; never raises. Called after ``build``."""

    def load(self, data: bytes) -> Any:
        """Ready to run, from verified bytes; called once per process. Raises SoftcapRuntimeError, in one line that says
        what to do, when it cannot be loaded."""
