"""The artifact: a kernel, or a library of kernels, that is built once per machine and loaded by every process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.store.key import Key


class Artifact(Hashable, Protocol):
    """A source, a toolchain and a key. Equal artifacts are the same one, and serve as dictionary keys.

    Implementations are small ``NamedTuple`` classes with these methods; creating one does no work.
    """

    def key(self) -> Key | None:
        """The key under which the store keeps it: everything that its bytes depend on.

        ``fields`` holds what it is compiled for and ``sources``, the digest of its source files (see
        ``sources.digest``); ``fingerprint`` the environment that can use it (see ``store.fingerprint``). None for an
        artifact without bytes, which ``torch.compile`` makes in each process: only ``load`` is called then.
        """

    def describe(self) -> KernelSpec:
        """Its description in tables and errors."""

    def build(self) -> bytes:
        """Its bytes, built in a child process (see ``build``). Raises BuildFailed, in one line, or ``children.Stopped``
        if the work that needs it is cancelled."""

    def provenance(self) -> Mapping[str, str]:
        """What built it, such as the compiler's version; kept with its bytes. Called after ``build``; never raises."""

    def load(self, data: bytes) -> Any:
        """The runnable kernel, from verified bytes; called once per process. Raises SoftcapRuntimeError if it cannot be
        loaded, in one line that says what to do."""
