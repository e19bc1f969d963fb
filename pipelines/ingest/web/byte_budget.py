"""The byte budget of a downloader: how many bytes of bodies are in memory at a time.

A hostile web could send a thousand large bodies at once, none slow enough for a time-out. So large
bodies share a second limit, within which the oldest can always be read to its end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

MAX_BYTES = 128 << 20
"""Bytes of bodies in flight or not used yet, beyond which no further request starts."""
RESERVATION = 128 << 10
"""Bytes counted for a body in flight: the size of its connection's buffer."""
LARGE_BODY = 1 << 20
"""Bytes above which a body is large."""
MAX_LARGE_BYTES = 256 << 20
"""Bytes of large bodies in flight, beyond which all of them but the oldest wait."""
_POLL_SECONDS = 0.05


class ByteBudget:
    """The bytes of bodies that are in flight, or that have arrived and are not used yet."""

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        reservation: int = RESERVATION,
        large_body: int = LARGE_BODY,
        max_large_bytes: int = MAX_LARGE_BYTES,
    ) -> None:
        """All limits are in bytes; see the constants of this module."""
        self.max_bytes, self.reservation = max_bytes, reservation
        self.large_body, self.max_large_bytes = large_body, max_large_bytes
        self.used = 0
        self.large: dict[BodyReservation, int] = {}  # bytes of each large body, the oldest first
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def is_free(self) -> bool:
        """Whether another request may start."""
        return self.used < self.max_bytes

    def count(self, size: int) -> None:
        """Add `size` bytes, which may be negative."""
        self.used += size
        # Only as many waiters are woken as fit: hundreds may wait.
        while self._waiters and self.is_free:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.used += self.reservation
                waiter.set_result(None)

    async def reserve(self) -> None:
        """Count one reservation as soon as the budget is free, in FIFO order."""
        if self.is_free:  # so no task waits
            self.count(self.reservation)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # it had just got its reservation
                self.count(-self.reservation)
            raise


class BodyReservation:
    """A context manager for one body in flight: its bytes of the budget, and its time limit."""

    def __init__(self, budget: ByteBudget, seconds: float) -> None:
        self.budget = budget
        self.kept = 0  # bytes that stay counted until the body was used
        self.limit = asyncio.timeout(seconds)

    async def __aenter__(self) -> BodyReservation:
        await self.budget.reserve()
        await self.limit.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.budget.count(self.kept - self.budget.reservation)
        self.budget.large.pop(self, None)
        await self.limit.__aexit__(*error)

    async def grow(self, size: int) -> None:
        """Note that the body has `size` bytes now; return when it may be read on.

        The time limit does not run while it waits.
        """
        if size <= self.budget.large_body:
            return
        large, deadline = self.budget.large, self.limit.when()
        large[self] = size
        began = time.monotonic()
        self.limit.reschedule(None)
        while sum(large.values()) > self.budget.max_large_bytes and next(iter(large)) is not self:
            await asyncio.sleep(_POLL_SECONDS)
        assert deadline is not None
        self.limit.reschedule(deadline + time.monotonic() - began)
