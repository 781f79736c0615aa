"""GPU kernels through CUDA's driver: load them, describe tiles to the tensor memory accelerator, launch.

The driver's C interface (CUDA Driver API) is public and stable, and comes with the GPU's driver. A launch costs some
3 us of Python, a third of Triton's own; and a process that finds its kernels in the cache never imports Triton.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_int32, c_int64, c_uint, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

from softcap_runtime.compat.torch_private import current_stream
from softcap_runtime.cuda.cubin import Box, Cubin
from softcap_runtime.cuda.parameters import Number, Parameter, Pointer, Tile, letter
from softcap_runtime.errors import SoftcapRuntimeError

# Names and values of cuda.h.
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CU_FUNC_CACHE_PREFER_SHARED = 1
CUDA_ERROR_INVALID_CONTEXT = 201
CU_TENSOR_MAP_INTERLEAVE_NONE = 0
CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2
CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0
CU_TENSOR_MAP_DATA_TYPE = {torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64
# ``cubin.letter``'s letters.
_Kind = type[c_float] | type[c_int32] | type[c_int64]
_NUMBERS: dict[str, _Kind] = {"f": c_float, "i": c_int32, "l": c_int64}
# Shared memory that a kernel may take without asking.
USUAL_SHARED = 48 * 1024


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SoftcapRuntimeError(f"CUDA's driver cannot be loaded: {error}") from None
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    driver.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    return driver


def _check(status: int, what: str) -> None:
    if status:
        name = c_char_p()
        _driver().cuGetErrorName(status, byref(name))
        told = (name.value or b"an unknown error").decode()
        raise RuntimeError(f"CUDA: {what} failed with {told} ({status})")


def _primary_context(device: int) -> c_void_p:
    """The context that torch uses on a device."""
    driver, handle, context = _driver(), c_int(), c_void_p()
    _check(driver.cuInit(0), "starting the driver")
    _check(driver.cuDeviceGet(byref(handle), device), f"finding device {device}")
    _check(driver.cuDevicePrimaryCtxRetain(byref(context), handle), f"the context of device {device}")
    return context


class LoadedCubin:
    """A kernel on one device. It stays there until it is unloaded."""

    def __init__(self, cubin: Cubin, device: int) -> None:
        self.cubin, self.device = cubin, device
        self.context = _primary_context(device)
        self.function = c_void_p()
        self._module = module = c_void_p()
        driver = _driver()
        _check(driver.cuCtxPushCurrent_v2(self.context), "entering a context")
        try:
            _check(driver.cuModuleLoadData(byref(module), cubin.code), f"loading kernel {cubin.name}")
            found = driver.cuModuleGetFunction(byref(self.function), module, cubin.name.encode())
            _check(found, f"finding kernel {cubin.name}")
            if cubin.shared > USUAL_SHARED:
                wanted = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(driver.cuFuncSetCacheConfig(self.function, CU_FUNC_CACHE_PREFER_SHARED), "setting a cache")
                _check(
                    driver.cuFuncSetAttribute(self.function, wanted, cubin.shared),
                    f"taking {cubin.shared} bytes of shared memory",
                )
        finally:
            driver.cuCtxPopCurrent_v2(byref(c_void_p()))

    def unload(self) -> None:
        """Give its memory back. Nothing that was bound may be launched any more, and all that was must be done."""
        driver = _driver()
        _check(driver.cuCtxPushCurrent_v2(self.context), "entering a context")
        try:
            _check(driver.cuModuleUnload(self._module), f"unloading kernel {self.cubin.name}")
        finally:
            driver.cuCtxPopCurrent_v2(byref(c_void_p()))

    def bind(
        self, grid: tuple[int, int, int], parameters: Sequence[Parameter], numbers: Sequence[Number]
    ) -> Callable[..., None]:
        """See ``cubin.Function``. Threads may share the result; launches of one do not overlap on the host."""
        space = _Parameters(parameters, numbers, self.cubin)
        launch, lock = _driver().cuLaunchKernel, threading.Lock()
        function, device = self.function, self.device
        shape = (*grid, self.cubin.threads, 1, 1, self.cubin.shared)

        def send(tensors: tuple[Tensor | None, ...]) -> int:
            for place, write in space.writers:
                status = write(tensors[place].data_ptr())  # type: ignore[union-attr]
                if status:
                    return status
            return int(launch(function, *shape, current_stream(device), space.table, None))

        def run(*tensors: Tensor | None) -> None:
            with lock:  # the driver copies the parameters before it returns
                status = send(tensors)
                if status == CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the device yet
                    _check(_driver().cuCtxSetCurrent(self.context), "entering a context")
                    status = send(tensors)
            if status:
                _check(status, f"launching kernel {self.cubin.name}")

        return run


class _Parameters:
    """A launch's parameters in memory: ``table`` of their addresses, ``writers`` of what changes from call to call.

    A writer is a tensor's place among the arguments and a function that takes its address and returns the driver's
    status, or None.
    """

    def __init__(self, parameters: Sequence[Parameter], numbers: Sequence[Number], cubin: Cubin) -> None:
        self.writers: list[tuple[int, Callable[[int], int | None]]] = []
        self._memory = ctypes.create_string_buffer(
            TENSOR_MAP_ALIGNMENT * (4 * len(parameters) + len(numbers) + cubin.scratch + 1)
        )
        self._start = -ctypes.addressof(self._memory) % TENSOR_MAP_ALIGNMENT
        self._addresses: list[int] = []
        boxes = iter(cubin.boxes)
        for place, one in enumerate(parameters):
            if isinstance(one, Tile):
                self._add_tile(place, one, next(boxes))
            elif isinstance(one, Pointer):
                slot = c_uint64.from_buffer(self._memory, self._place(8))
                self.writers.append((place, functools.partial(setattr, slot, "value")))
        for number in numbers:
            self._add(_NUMBERS[letter(number)], number)
        for _ in range(cubin.scratch):
            self._add(c_int64, 0)
        self.table = (c_void_p * len(self._addresses))(*self._addresses)

    def _place(self, size: int, alignment: int = 8) -> int:
        """Room for ``size`` bytes as the next parameter: its offset in the memory."""
        self._start += -(ctypes.addressof(self._memory) + self._start) % alignment
        offset, self._start = self._start, self._start + size
        self._addresses.append(ctypes.addressof(self._memory) + offset)
        return offset

    def _add(self, kind: _Kind, number: Number) -> None:
        kind.from_buffer(self._memory, self._place(ctypes.sizeof(kind))).value = number

    def _add_tile(self, place: int, tile: Tile, box: Box) -> None:
        """A tensor map; and the shape and strides that Triton passes after it, which its kernels do not read."""
        offset = self._place(TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT)
        target = ctypes.addressof(self._memory) + offset
        self.writers.append((place, _tensor_map(target, tile, box)))
        for size in tile.shape:
            self._add(c_int32, size)
        for stride in tile.strides:
            self._add(c_int64, stride)


def _tensor_map(target: int, tile: Tile, box: Box) -> Callable[[int], int]:
    """A function that writes to ``target`` the tensor map of a tile's tensor at an address, and returns the status."""
    rank, itemsize = len(tile.shape), tile.dtype.itemsize
    # The driver takes the innermost dimension first, and no stride for it.
    sizes = (c_uint64 * rank)(*reversed(tile.shape))
    steps = (c_uint64 * rank)(*(stride * itemsize for stride in reversed(tile.strides[:-1])))
    blocks = (c_uint32 * rank)(*reversed(box.sizes))
    ones = (c_uint32 * rank)(*[1] * rank)
    encode, written = _driver().cuTensorMapEncodeTiled, 0

    def write(address: int) -> int:
        nonlocal written
        if address == written:  # the same tensor again, or another where it lay
            return 0
        status: int = encode(
            c_void_p(target), CU_TENSOR_MAP_DATA_TYPE[tile.dtype], rank, c_void_p(address), sizes, steps, blocks,
            ones, CU_TENSOR_MAP_INTERLEAVE_NONE, box.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        written = 0 if status else address
        return status

    return write
