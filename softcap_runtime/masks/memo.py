"""A memory of finished masks, bounded by the bytes that they hold."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class MaskMemo:
    """The most recently used values up to ``limit_bytes`` of tensor storage; safe to use from many threads.

    A storage counts once, however many views and entries share it, and with all its bytes: a view of one row
    keeps the whole storage alive. A value larger than the limit is handed out and not kept.

    ``hits``, ``misses``, ``evictions``: since the start. ``bytes``: held now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, dict[int, int]]] = OrderedDict()
        self._holders: dict[int, int] = {}
        self._lock = threading.RLock()

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``; ``make()`` if it is not held. What ``make`` raises passes through."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self.hits += 1
                self._entries.move_to_end(key)
                return entry[0]
            self.misses += 1
            # Made under the lock: it takes microseconds, and threads that need the same mask make it once.
            value = make()
            self._keep(key, value)
            return value

    def clear(self) -> None:
        """Let go of every value; the counts of hits and misses stay."""
        with self._lock:
            while self._entries:
                self._drop_oldest()

    def __len__(self) -> int:
        return len(self._entries)

    def _keep(self, key: Hashable, value: Any) -> None:
        storages = {
            storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in _tensors(value))
        }
        if sum(storages.values()) > self.limit_bytes:
            return
        self._entries[key] = (value, storages)
        for storage, size in storages.items():
            holders = self._holders.get(storage, 0)
            self._holders[storage] = holders + 1
            self.bytes += 0 if holders else size
        while self.bytes > self.limit_bytes:
            self._drop_oldest()
            self.evictions += 1

    def _drop_oldest(self) -> None:
        _, (_, storages) = self._entries.popitem(last=False)
        for storage, size in storages.items():
            self._holders[storage] -= 1
            if not self._holders[storage]:
                del self._holders[storage]
                self.bytes -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts, and in the attributes of objects and functions (a BlockMask)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value))
