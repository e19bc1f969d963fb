"""Slots whose waiters have a rank, so that what began first is done first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Protocol


class Slots(Protocol):
    """What a `Turn` is taken of."""

    async def acquire(self, rank: int = 0) -> None: ...

    def release(self) -> None: ...


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

    def turn(self, rank: int) -> Turn:
        """Hold a slot: `async with turns.turn(rank)`."""
        return Turn(self, rank)


class Turn:
    """A slot that is held; not a generator, as each request has two of them."""

    def __init__(self, turns: Slots, rank: int) -> None:
        self.turns, self.rank = turns, rank

    async def __aenter__(self) -> None:
        await self.turns.acquire(self.rank)

    async def __aexit__(self, *_: object) -> None:
        self.turns.release()
