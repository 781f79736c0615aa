"""The one table from a kernel's key to the kernel, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.kernels import gpu_options
from softcap_runtime.kernels.cubin import Cubin, CubinSpec, Function
from softcap_runtime.kernels.cuda_driver import LoadedCubin
from softcap_runtime.kernels.engine import Problem, Runner
from softcap_runtime.kernels.gpu_options import BlockOptions, Direction
from softcap_runtime.kernels.jit import compile_runner, compiles_in_process
from softcap_runtime.kernels.key import KernelSpec
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.torch_private import load_package

# Block tables of band masks that are kept: those of 32 windows over a million tokens, or of any number of usual ones.
MASK_BYTES = 64 * 2**20


class KernelTable:
    """Loads each kernel once per process, whatever the number of threads that ask.

    ``fetch`` gives the bytes of a kernel's package, and ``fetch_cubin`` those of a GPU kernel for a problem that needs
    it, from wherever they are kept or by building them. ``tuned`` gives what a measurement chose for a device, dtype,
    head_dim and kernel, or None.
    """

    def __init__(
        self,
        fetch: Callable[[KernelSpec], bytes],
        fetch_cubin: Callable[[Problem, CubinSpec], bytes],
        tuned: Callable[[int, torch.dtype, int, Direction], BlockOptions | None],
    ) -> None:
        self.masks = MaskMemo(MASK_BYTES)
        self._fetch, self._fetch_cubin, self._tuned = fetch, fetch_cubin, tuned
        self._options: dict[tuple[int, torch.dtype, int, Direction], BlockOptions] = {}
        self._made: dict[Any, Any] = {}
        self.renew_locks()

    def runner(self, spec: KernelSpec) -> Runner:
        """The kernel of ``spec``, fetched and loaded if need be; what ``fetch`` raises passes through."""
        found: Runner = self._made.get(spec) or self._once(spec, lambda: self._load(spec, self._fetch))
        return found

    def install(self, spec: KernelSpec, data: bytes) -> None:
        """Load a kernel from the bytes of its package, unless it is loaded already."""
        self._once(spec, lambda: self._load(spec, lambda _: data))

    def ready(self, spec: KernelSpec) -> bool:
        """Whether the kernel is loaded."""
        return spec in self._made

    def function(self, problem: Problem, spec: CubinSpec) -> Function:
        """A GPU kernel on the device of ``problem``; what ``fetch_cubin`` raises passes through."""
        device = problem.device.index

        def load() -> Function:
            return LoadedCubin(Cubin.unpack(self._fetch_cubin(problem, spec)), device)

        key = (spec, device)
        found: Function = self._made.get(key) or self._once(key, load)
        return found

    def options(self, device: int, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
        """The options of a GPU kernel: what was measured on this machine, else chosen by the device's limits."""
        key = (device, dtype, head_dim, direction)
        found = self._options.get(key)
        if found is None:
            found = self._tuned(*key) or gpu_options.choose(gpu_options.device_limits(device), *key[1:])
            self._options[key] = found
        return found

    def forget_options(self) -> None:
        """After a measurement: calls that are bound from now on take what it chose."""
        self._options.clear()

    def renew_locks(self) -> None:
        """After a fork: locks that another thread held in the parent would never be released here."""
        self._locks: dict[Any, threading.Lock] = {}
        self._guard = threading.Lock()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def _load(self, spec: KernelSpec, fetch: Callable[[KernelSpec], bytes]) -> Runner:
        return compile_runner(spec) if compiles_in_process(spec) else _loaded(spec, fetch(spec))


def _loaded(spec: KernelSpec, data: bytes) -> Runner:
    try:
        return load_package(data)
    except OSError as error:  # descriptors, memory, or the folder for temporary files: the package is good
        raise SoftcapRuntimeError(
            f"kernel {spec.op} cannot be loaded now: {error}; give this process what it lacks and call again"
        ) from error
    except Exception as error:
        raise SoftcapRuntimeError(
            f"the package of kernel {spec.op} does not load ({(str(error) or repr(error)).splitlines()[0]}); "
            "run: softcap-runtime clear"
        ) from error
