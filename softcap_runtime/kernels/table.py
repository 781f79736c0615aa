"""The one table from a kernel's key to the kernel, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from softcap_runtime.kernels.engine import Runner
from softcap_runtime.kernels.jit import compile_runner, compiles_in_process
from softcap_runtime.kernels.key import KernelSpec
from softcap_runtime.kernels.torch_private import load_package


class KernelTable:
    """Loads each kernel once per process, whatever the number of threads that ask.

    ``fetch`` gives the bytes of a kernel's package, from wherever it is kept or by building it; ``allow`` is asked
    before a kernel is compiled in this process and may raise.
    """

    def __init__(
        self, fetch: Callable[[KernelSpec], bytes], allow: Callable[[KernelSpec], None] = lambda spec: None
    ) -> None:
        self._fetch, self._allow = fetch, allow
        self._runners: dict[KernelSpec, Runner] = {}
        self._locks: dict[KernelSpec, threading.Lock] = {}
        self._guard = threading.Lock()

    def runner(self, spec: KernelSpec) -> Runner:
        """The kernel of ``spec``; what ``fetch``, ``allow`` and the loader raise passes through."""
        return self._runners.get(spec) or self._load(spec)

    def ready(self, spec: KernelSpec) -> bool:
        """Whether the kernel is loaded."""
        return spec in self._runners

    def loaded(self) -> list[KernelSpec]:
        """The kernels that this process has."""
        return list(self._runners)

    def renew_locks(self) -> None:
        """After a fork: locks that another thread held in the parent would never be released here."""
        self._locks, self._guard = {}, threading.Lock()

    def _load(self, spec: KernelSpec) -> Runner:
        with self._guard:
            lock = self._locks.setdefault(spec, threading.Lock())
        with lock:
            found = self._runners.get(spec)
            if found is None:
                if compiles_in_process(spec):
                    self._allow(spec)
                    found = compile_runner(spec)
                else:
                    found = load_package(self._fetch(spec), torch.device(spec.device))
                self._runners[spec] = found
            return found
