"""Limits of requests in flight: a semaphore with priorities, and one whose size adapts."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol

from pipelines.execution.telemetry import INGEST_REQUESTS


class PrioritySemaphore:
    """A semaphore that serves the waiter with the lowest priority first, equal ones in FIFO order."""

    def __init__(self, size: int) -> None:
        self.free = size  # never above zero while a task waits
        self._order = itertools.count()
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []

    def locked(self) -> bool:
        """Whether `acquire` would wait."""
        return not self.free

    async def acquire(self, priority: int = 0) -> None:
        """Take a slot; wait while there is none, or while a lower priority waits."""
        if self.free:
            self.free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (priority, next(self._order), waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # it had just got the slot
                self.release()
            raise

    def release(self) -> None:
        """Return a slot, or add one."""
        self.free += 1
        while self.free and self._waiters:
            _, _, waiter = heapq.heappop(self._waiters)
            if not waiter.done():
                self.free -= 1
                waiter.set_result(None)

    def slot(self, priority: int) -> Slot:
        """Hold a slot: `async with semaphore.slot(priority)`."""
        return Slot(self, priority)


class RequestWindow:
    """A semaphore for requests in flight that adapts to the bandwidth, up to `max_size`.

    It grows by one for each body that arrives while all slots are taken. It halves when bodies
    stall: more requests are then in flight than the bandwidth serves, and all of them may time out.
    """

    def __init__(
        self, max_size: int, initial: int = 64, min_size: int = 8, recovery_seconds: float = 5.0
    ) -> None:
        """After it halved, further stalls within `recovery_seconds` are ignored."""
        self.max_size, self.min_size = max_size, min_size
        self.recovery_seconds = recovery_seconds
        self.size = min(max_size, initial)
        self.in_flight = 0
        self._semaphore = PrioritySemaphore(self.size)
        self._surplus = 0  # slots that are taken and will not be returned
        self._halved_at = -recovery_seconds

    async def acquire(self, priority: int = 0) -> None:
        """Take a slot; the lowest priority comes first."""
        await self._semaphore.acquire(priority)
        self._count(1)

    def release(self) -> None:
        """Return a slot."""
        self._count(-1)
        self._free_slot()

    def slot(self, priority: int = 0) -> Slot:
        """Hold a slot: `async with window.slot(priority)`."""
        return Slot(self, priority)

    def _count(self, change: int) -> None:
        self.in_flight += change
        INGEST_REQUESTS.set(self.in_flight)

    def grow(self) -> None:
        """Add a slot after a body arrived, if all slots are taken."""
        if self.size < self.max_size and self._semaphore.locked():
            self.size += 1
            self._free_slot()

    def shrink(self) -> None:
        """Halve the slots after a body stalled."""
        now = time.monotonic()
        if now - self._halved_at >= self.recovery_seconds:
            self._halved_at = now
            half = max(self.size // 2, min(self.size, self.min_size))
            self._surplus += self.size - half
            self.size = half

    def _free_slot(self) -> None:
        if self._surplus:
            self._surplus -= 1
        else:
            self._semaphore.release()


class _Semaphore(Protocol):
    async def acquire(self, priority: int = 0) -> None: ...

    def release(self) -> None: ...


class Slot:
    """Holds a slot. A class, not a generator, because each request enters two of them."""

    def __init__(self, semaphore: _Semaphore, priority: int) -> None:
        self.semaphore, self.priority = semaphore, priority

    async def __aenter__(self) -> None:
        await self.semaphore.acquire(self.priority)

    async def __aexit__(self, *_: object) -> None:
        self.semaphore.release()
