"""A memory of block tables, bounded by the bytes that they hold."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound=Sequence[Tensor])


class MaskMemo:
    """The most recently used tuples of tensors, up to ``limit_bytes`` of storage; thread-safe.

    A view counts with all the bytes of the storage that it keeps alive; what is larger than the limit is handed out
    and not kept. ``evictions``: since the start. ``bytes``: held now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.evictions = 0
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The tensors of ``key``; ``make()`` if they are not held. What ``make`` raises passes through."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                held: T = self._entries[key][0]
                return held
            # Made under the lock: it takes microseconds, and threads that need the same mask make it once.
            made = make()
            storages = (tensor.untyped_storage() for tensor in made)
            size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
            if size <= self.limit_bytes:
                self._entries[key] = made, size
                self.bytes += size
            while self.bytes > self.limit_bytes:
                _, (_, size) = self._entries.popitem(last=False)
                self.bytes -= size
                self.evictions += 1
            return made
