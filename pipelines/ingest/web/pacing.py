"""How much is asked of the line, and how much of what comes is held in memory.

A hostile web could send a thousand large bodies at the same time, none of them slowly enough for
a time-out. So large ones share a bound, in which the oldest always comes to its end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from pipelines.execution.metrics import INGEST_REQUESTS
from pipelines.ingest.web.turns import Turn, Turns

MAX_WAITING = 128 << 20
"""Bytes of bodies that may be under way or wait to be used before no further URL is asked for."""
ALLOWANCE = 128 << 10
"""What a body that is under way counts for there, in bytes: its connection has such a buffer."""
LARGE = 1 << 20
"""Bytes up to which a body is read at once, whatever the others do."""
MAX_LARGE = 256 << 20
"""Bytes of larger bodies that are under way at which all of them but the oldest wait."""
_LOOK = 0.05  # seconds between two looks of a body that waits


class Window:
    """Slots of requests in flight, as many as the line carries: at most `most` of them.

    One more for each body that came while all were taken; half as many when bodies stall, for then
    there are more than the line has room for, and what is read in part is lost for all of them.
    """

    def __init__(self, most: int, first: int = 64, least: int = 8, patience: float = 5.0) -> None:
        """`first` and `least` are slots to begin with and at least, `patience` seconds to recover."""
        self.most, self.least, self.patience = most, least, patience
        self.size = min(most, first)
        self.taken = 0  # requests in flight
        self._free = Turns(self.size)
        self._surplus = 0  # slots that are taken and will not be given back
        self._shrunk = -self.patience

    async def acquire(self, rank: int = 0) -> None:
        """Take a slot, which the waiters of the lowest rank get first."""
        await self._free.acquire(rank)
        self._count(1)

    def release(self) -> None:
        """Give a slot back."""
        self._count(-1)
        self._give_back()

    def turn(self, rank: int = 0) -> Turn:
        """Hold a slot: `async with window.turn(rank)`."""
        return Turn(self, rank)

    def _count(self, more: int) -> None:
        self.taken += more
        INGEST_REQUESTS.set(self.taken)

    def grow(self) -> None:
        """A body came."""
        if self.size < self.most and self._free.locked():
            self.size += 1
            self._give_back()

    def shrink(self) -> None:
        """A body stalled; of those that stall together the first counts."""
        now = time.monotonic()
        if now - self._shrunk >= self.patience:
            self._shrunk = now
            half = max(self.size // 2, min(self.size, self.least))
            self._surplus += self.size - half
            self.size = half

    def _give_back(self) -> None:
        if self._surplus:
            self._surplus -= 1
        else:
            self._free.release()


class Room:
    """The bytes of bodies that are under way, or have come and are not used yet.

    Its bounds are those of this module's constants, unless others are given.
    """

    def __init__(
        self,
        max_waiting: int = MAX_WAITING,
        allowance: int = ALLOWANCE,
        large_from: int = LARGE,
        max_large: int = MAX_LARGE,
    ) -> None:
        self.max_waiting, self.allowance = max_waiting, allowance
        self.large_from, self.max_large = large_from, max_large
        self.taken = 0
        self.large: dict[Share, int] = {}  # bytes of each that is under way, the oldest first
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_free(self) -> bool:
        return self.taken < self.max_waiting

    def count(self, size: int) -> None:
        """Count `size` further bytes, or fewer."""
        self.taken += size
        # No more of them are woken than there is room for: hundreds wait, at each image's end.
        while self._waiting and self.is_free:
            turn = self._waiting.popleft()
            if not turn.done():
                self.taken += self.allowance
                turn.set_result(None)

    async def enter(self) -> None:
        """Count an allowance as soon as there is any room; who waits longest comes first."""
        if self.is_free:  # then nobody waits
            self.count(self.allowance)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given
                self.count(-self.allowance)
            raise


class Share:
    """A body under way, and what it holds of the room; entered as soon as there is any."""

    def __init__(self, room: Room, seconds: float) -> None:
        self.room = room
        self.kept = 0  # bytes that it leaves to whoever uses the body
        self.limit = asyncio.timeout(seconds)

    async def __aenter__(self) -> Share:
        await self.room.enter()
        await self.limit.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.room.count(self.kept - self.room.allowance)
        self.room.large.pop(self, None)
        await self.limit.__aexit__(*error)

    async def grown(self, size: int) -> None:
        """The body has `size` bytes; returns when it may be read on, which is no time-out."""
        if size <= self.room.large_from:
            return
        large, left = self.room.large, self.limit.when()
        large[self] = size
        began = time.monotonic()
        self.limit.reschedule(None)
        while sum(large.values()) > self.room.max_large and next(iter(large)) is not self:
            await asyncio.sleep(_LOOK)
        assert left is not None
        self.limit.reschedule(left + time.monotonic() - began)
