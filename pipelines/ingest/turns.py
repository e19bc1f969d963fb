"""Slots whose waiters have a rank, so that what began first is done first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A semaphore that goes to the waiter of the lowest rank, and within a rank in turn."""

    def __init__(self, size: int) -> None:
        self.free = size  # never more than zero while anybody waits
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def locked(self) -> bool:
        """Whether a further waiter would have to wait."""
        return not self.free

    async def acquire(self, rank: int = 0) -> None:
        """Take a slot as soon as one is free and nobody of a lower rank waits."""
        if self.free:
            self.free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back, or one more than there were."""
        self.free += 1
        while self.free and self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.free -= 1
                turn.set_result(None)

    @asynccontextmanager
    async def turn(self, rank: int) -> AsyncIterator[None]:
        """Hold a slot."""
        await self.acquire(rank)
        try:
            yield
        finally:
            self.release()
