"""How a process gets its artifacts: one table, one policy, one way from a key to a loaded kernel."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.artifacts.children import Stopped
from softcap_runtime.engines.spec import kernel_name
from softcap_runtime.errors import KernelNotPrewarmed
from softcap_runtime.store.key import Key
from softcap_runtime.store.store import Loaded, Store

log = logging.getLogger(__name__)

Jit = Literal["allow", "warn", "forbid"]
# Returns the shell command that builds what is missing. None: the caller is that command.
Command = Callable[[], str] | None


class Supplied(NamedTuple):
    """How this process got an artifact: ``source`` is built, disk, memory or compiled (in this process)."""

    source: Literal["built", "disk", "memory", "compiled"]
    seconds: float
    bytes: int


class Artifacts:
    """The artifacts of one runtime. Thread-safe; call ``after_fork`` in a forked child.

    ``supplied``: how each loaded artifact was obtained. ``failed``: the errors of background builds.
    """

    def __init__(self, store: Store, jit: Jit = "allow", background: bool = False) -> None:
        self.store, self.jit, self.background = store, jit, background
        self.supplied: dict[Artifact, Supplied] = {}
        self.failed: dict[Artifact, str] = {}
        self._made: dict[Artifact, Any] = {}
        self._building: set[Artifact] = set()
        self.after_fork()

    def get(self, artifact: Artifact, command: Command = None) -> Any:
        """What ``artifact.load`` returned.

        1. Look it up in this process, in a dictionary.
        2. Take its lock, so that one thread at a time goes on, and look up again.
        3. Look it up on disk. Bytes that fail a check count as missing (see ``Store``); nothing on disk raises.
        4. Apply the policy: with ``jit="forbid"`` raise KernelNotPrewarmed, whose text holds ``command()``; with
           ``warn`` log it. Without a ``command`` everything is allowed.
        5. Lock it for this machine, look up again, build in a child process, publish: see ``Store.load_or_build``.
           Errors of ``build`` (BuildFailed, Stopped) pass through, and nothing is published. A disk that cannot be
           written raises nothing.
        6. Load. Errors of ``load`` pass through; the bytes were good, so they stay on disk.

        After any error the next call tries again.
        """
        found = self._made.get(artifact)
        if found is None:
            with self._lock(artifact):
                found = self._made.get(artifact)
                if found is None:
                    found = self._obtain(artifact, command)
        return found

    def require(self, artifacts: Sequence[Artifact], command: Command = None) -> str | None:
        """``get`` all of ``artifacts``; returns None once they are loaded, else why they are not yet.

        With ``background``, a call that finds one missing on disk starts a thread that builds it, once, and does not
        wait. ``failed`` keeps the error of such a build, which is not started again; but what another process
        publishes later is found.
        """
        missing = [one for one in artifacts if one not in self._made]
        if not self.background:
            for one in missing:
                self.get(one, command)
            return None
        missing = [one for one in missing if one in self._building or not self._find(one)]
        if not missing:
            return None
        if self.jit == "forbid":
            self._check_policy(missing[0], command)
        with self._guard:
            new = [one for one in missing if one not in self._building and one not in self.failed]
            self._building.update(new)
        if self.jit == "warn":
            for one in new:
                self._check_policy(one, command)
        if new:
            threading.Thread(target=self._build_all, args=(new,), name="softcap-build", daemon=True).start()
        failed = not self.failed.keys().isdisjoint(missing)
        return "its kernel could not be built" if failed else "until its kernel is built"

    def ready(self, artifact: Artifact) -> bool:
        """Whether the artifact is loaded."""
        return artifact in self._made

    @property
    def pending(self) -> int:
        """How many artifacts are being built in the background."""
        return len(self._building)

    def after_fork(self) -> None:
        """In a forked child: no lock is held, and no background build runs here."""
        self._guard = threading.Lock()
        self._locks: dict[Artifact, threading.Lock] = {}
        self._building.clear()

    def _lock(self, artifact: Artifact) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(artifact, threading.Lock())

    def _obtain(self, artifact: Artifact, command: Command) -> Any:
        key = artifact.key()
        if key is None:
            self._check_policy(artifact, command)
            return self._install(artifact, None)

        if self.jit == "forbid" and command is not None:
            loaded = self._on_disk(key)  # without a lock: there is no build to wait for
            if loaded is None:
                raise KernelNotPrewarmed(self._why_missing(artifact, command))
            return self._install(artifact, loaded)

        def build() -> bytes:
            self._check_policy(artifact, command)
            return artifact.build()

        return self._install(artifact, self.store.load_or_build(key, build, artifact.provenance))

    def _find(self, artifact: Artifact) -> bool:
        """Load it if it is on disk; returns whether it was."""
        key = artifact.key()
        loaded = None if key is None else self._on_disk(key)
        if loaded is not None:
            self._install(artifact, loaded)
        return loaded is not None

    def _on_disk(self, key: Key) -> Loaded | None:
        started = time.perf_counter()
        data = self.store.load(key)
        return None if data is None else Loaded(data, "disk", time.perf_counter() - started, 0.0)

    def _install(self, artifact: Artifact, loaded: Loaded | None) -> Any:
        started = time.perf_counter()
        made = artifact.load(b"" if loaded is None else loaded.data)
        if loaded is None:
            supplied = Supplied("compiled", time.perf_counter() - started, 0)
        else:
            supplied = Supplied(loaded.source, loaded.seconds, len(loaded.data))
        with self._guard:
            # Before ``_made``: a thread that finds it there reads ``supplied``.
            self.supplied.setdefault(artifact, supplied)
            return self._made.setdefault(artifact, made)

    def _check_policy(self, artifact: Artifact, command: Command) -> None:
        """Raise KernelNotPrewarmed or log a warning if the settings ask for it."""
        if command is None or self.jit == "allow":
            return
        why = self._why_missing(artifact, command)
        if self.jit == "forbid":
            raise KernelNotPrewarmed(why)
        log.warning("building in a serving process: %s", why)

    def _why_missing(self, artifact: Artifact, command: Callable[[], str]) -> str:
        """Why an artifact is not here, in one line that says what to do."""
        name = kernel_name(artifact.describe())
        if artifact.key() is None:
            return f"kernel {name} is compiled in each process; call Runtime.prewarm in this one first"
        # Try to read, as the store's fault may be one of writing. Not readable without a fault: there is no cache yet.
        readable = self.store.database.use("read", lambda index: index.totals() is not None, False)
        if readable or self.store.fault is None or self.store.database.is_empty():
            return f"kernel {name} is not in the cache; run: {command()}"
        return f"kernel {name} cannot be read; fix the cache and retry: {self.store.fault}"

    def _build_all(self, artifacts: list[Artifact]) -> None:
        for one in artifacts:
            try:
                self.get(one)
            except Stopped:  # the process ends
                return
            except Exception as error:  # nobody waits for this thread, so keep the error and log it
                self.failed[one] = str(error)
                log.error(
                    "background build of kernel %s failed, eager serves it: %s", kernel_name(one.describe()), error
                )
            finally:
                self._building.discard(one)
