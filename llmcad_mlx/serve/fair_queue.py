"""A bounded queue that takes turns between clients."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFullError(Exception):
    """No place is free for this client."""


class QueueClosedError(Exception):
    """Nothing is taken any more."""


class FairQueue(Generic[Item]):
    """Items of several clients, handed out round robin: one from each client that has any, then the next.

    Safe to use from several threads. `limit`: most items that wait. One client may hold half of the places (but
    always one), so that a client with many requests leaves room for the others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._per_client = max(1, limit // 2)
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return self._size()

    def _size(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, client: str, item: Item) -> None:
        """Add at the end of the client's line. Raises QueueFullError or QueueClosedError."""
        with self._changed:
            if self._closed:
                raise QueueClosedError
            if self._size() >= self._limit or len(self._waiting.get(client, ())) >= self._per_client:
                raise QueueFullError
            self._waiting.setdefault(client, deque()).append(item)
            self._changed.notify()

    def take(self) -> Item | None:
        """Wait for the next item; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            client, line = self._waiting.popitem(last=False)
            item = line.popleft()
            if line:
                self._waiting[client] = line  # at the end: the others come first
            return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out before its turn; False when its turn has come already."""
        with self._changed:
            line = self._waiting.get(client)
            if line is None or item not in line:
                return False
            line.remove(item)
            if not line:
                del self._waiting[client]
            return True

    def close(self) -> list[Item]:
        """End: `take` returns None from now on. Returns what was still waiting."""
        with self._changed:
            self._closed = True
            left = [item for line in self._waiting.values() for item in line]
            self._waiting.clear()
            self._changed.notify_all()
            return left
