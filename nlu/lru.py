"""A least-recently-used map under a byte budget: of Encodings in the cache, of whole answers in the servicer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Lru(Generic[Value]):
    """Only the event loop touches it. A budget of 0 keeps nothing."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Value | None:
        """The value under a key, which becomes the most recent."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: Value, size: int) -> None:
        """Keep a value of `size` bytes, dropping the least recent ones to stay within the budget."""
        previous = self._entries.pop(key, None)
        if previous is not None:
            self.nbytes -= previous[1]
        if size > self._budget:  # it would push everything else out and then itself
            return
        self._entries[key] = value, size
        self.nbytes += size
        while self.nbytes > self._budget:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.nbytes -= dropped
