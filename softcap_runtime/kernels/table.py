"""The one table from a kernel's key to the kernel, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.kernels.engine import Runner
from softcap_runtime.kernels.jit import compile_runner, compiles_in_process
from softcap_runtime.kernels.key import KernelSpec
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.torch_private import load_package

# Block tables of band masks that are kept: those of 32 windows over a million tokens, or of any number of usual ones.
MASK_BYTES = 64 * 2**20


class KernelTable:
    """Loads each kernel once per process, whatever the number of threads that ask.

    ``fetch`` gives the bytes of a kernel's package, from wherever it is kept or by building it.
    """

    def __init__(self, fetch: Callable[[KernelSpec], bytes]) -> None:
        self.masks = MaskMemo(MASK_BYTES)
        self._fetch = fetch
        self._runners: dict[KernelSpec, Runner] = {}
        self.renew_locks()

    def runner(self, spec: KernelSpec) -> Runner:
        """The kernel of ``spec``, fetched and loaded if need be; what ``fetch`` raises passes through."""
        return self._runners.get(spec) or self._make(spec, self._fetch)

    def install(self, spec: KernelSpec, data: bytes) -> None:
        """Load a kernel from the bytes of its package, unless it is loaded already."""
        self._make(spec, lambda _: data)

    def ready(self, spec: KernelSpec) -> bool:
        """Whether the kernel is loaded."""
        return spec in self._runners

    def renew_locks(self) -> None:
        """After a fork: locks that another thread held in the parent would never be released here."""
        self._locks: dict[KernelSpec, threading.Lock] = {}
        self._guard = threading.Lock()

    def _make(self, spec: KernelSpec, fetch: Callable[[KernelSpec], bytes]) -> Runner:
        with self._guard:
            lock = self._locks.setdefault(spec, threading.Lock())
        with lock:
            found = self._runners.get(spec)
            if found is None:
                found = compile_runner(spec) if compiles_in_process(spec) else _loaded(spec, fetch(spec))
                self._runners[spec] = found
            return found


def _loaded(spec: KernelSpec, data: bytes) -> Runner:
    try:
        return load_package(data)
    except Exception as error:
        raise SoftcapRuntimeError(
            f"the package of kernel {spec.op} does not load ({(str(error) or repr(error)).splitlines()[0]}); "
            "run: softcap-runtime clear"
        ) from error
