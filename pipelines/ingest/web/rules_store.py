"""What is known of the sites' rules, for all processes of a job, so that each site is asked once.

    process ── asks for a site ──▶ RulesStore ──▶ its rules
                                       |
                                       '── no process has them: "fetch", and the others wait
    process ── put ──────────────▶ RulesStore

One process owns the store. With several it is an actor, and each of them sends what has gathered
meanwhile in one call.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from vlv_model.errors import RunError

Answer = bytes | Literal["fetch", "wait"]
"""A site's rules; or the caller has to fetch them; or another process is fetching them."""
Put = tuple[str, bytes, float]
"""A site, its rules, and the seconds for which they are valid."""

_CLAIM_SECONDS = 30.0  # after which another process may fetch, if the first has ended
_RENEWAL_SECONDS = 5.0
_POLL_SECONDS = 0.2
_BATCH_SECONDS = 0.01


class RulesStore:
    """The rules of all sites that were asked so far; on disk beyond SQLite's cache."""

    def __init__(self, claim_seconds: float = _CLAIM_SECONDS) -> None:
        self.claim_seconds = claim_seconds
        # The empty name is a private temporary database. It may be used in another thread.
        self.database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.database.execute(
            "CREATE TABLE rules (site TEXT PRIMARY KEY, until REAL, content BLOB) WITHOUT ROWID"
        )
        self.claims: dict[str, tuple[str, float]] = {}

    def exchange(
        self, process: str, asked: Sequence[str], puts: Sequence[Put], held: Sequence[str]
    ) -> dict[str, Answer]:
        """Take over `puts`, renew the claims on the `held` sites, and answer for each site that is `asked`."""
        now = time.time()
        for site, content, seconds in puts:
            self.database.execute(
                "INSERT OR REPLACE INTO rules VALUES (?, ?, ?)", (site, now + seconds, content)
            )
            self.claims.pop(site, None)
        for site in held:
            self._claim(site, process, now)
        return {site: self._answer(site, process, now) for site in asked}

    def _answer(self, site: str, process: str, now: float) -> Answer:
        found = self.database.execute(
            "SELECT content FROM rules WHERE site = ? AND until > ?", (site, now)
        ).fetchone()
        if found is not None:
            return bytes(found[0])
        return "fetch" if self._claim(site, process, now) else "wait"

    def _claim(self, site: str, process: str, now: float) -> bool:
        holder, until = self.claims.get(site, (process, 0.0))
        if holder != process and until > now:
            return False
        self.claims[site] = (process, now + self.claim_seconds)
        return True


class RulesClient:
    """One process's view of a store; used in one event loop."""

    def __init__(self, store: Any = None) -> None:
        """`store` is the handle of a RulesStore actor; None: a store of this process."""
        self.process = uuid.uuid4().hex
        self._exchange = _local(RulesStore()) if store is None else _remote(store)
        self._pause = 0.0 if store is None else _BATCH_SECONDS
        self._asked: dict[str, asyncio.Future[bytes | None]] = {}  # without an answer
        self._held: set[str] = set()  # being fetched here
        self._puts: list[Put] = []
        self._changed = asyncio.Event()
        self._sender = asyncio.ensure_future(self._send())

    async def close(self) -> None:
        """End the exchange."""
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)

    async def get(self, site: str) -> bytes | None:
        """The rules of a site; None if the caller has to fetch and `put` them. Call it once at a time for a site.

        Raises RunError if the store is gone.
        """
        answer = self._asked[site] = asyncio.get_running_loop().create_future()
        self._changed.set()
        return await answer

    def put(self, site: str, content: bytes, seconds: float) -> None:
        """Store the rules of a site for `seconds`."""
        self._held.discard(site)
        self._puts.append((site, content, seconds))
        self._changed.set()

    def give_up(self, site: str) -> None:
        """Let another caller fetch the rules of a site, when the claim on it has ended."""
        self._held.discard(site)

    async def _send(self) -> None:
        while True:
            timeout = _POLL_SECONDS if self._asked else _RENEWAL_SECONDS if self._held else None
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
                await asyncio.sleep(self._pause)
            except TimeoutError:
                pass
            self._changed.clear()
            puts, self._puts = self._puts, []
            try:
                answers = await self._exchange(
                    self.process, list(self._asked), puts, list(self._held)
                )
            except Exception as error:
                self._fail(error)
                continue
            self._deliver(answers)

    def _deliver(self, answers: Mapping[str, Answer]) -> None:
        for site, answer in answers.items():
            if answer == "wait":
                continue
            waiting = self._asked.pop(site)
            if waiting.done():  # cancelled
                continue
            if answer == "fetch":
                self._held.add(site)
            waiting.set_result(None if isinstance(answer, str) else answer)

    def _fail(self, error: Exception) -> None:
        asked, self._asked = self._asked, {}
        for waiting in asked.values():
            if not waiting.done():
                waiting.set_exception(RunError(f"the store of the sites' rules is gone: {error}"))


_Exchange = Callable[..., Awaitable[dict[str, Answer]]]


def _local(store: RulesStore) -> _Exchange:
    async def exchange(*arguments: Any) -> dict[str, Answer]:
        return store.exchange(*arguments)

    return exchange


def _remote(actor: Any) -> _Exchange:
    async def exchange(*arguments: Any) -> dict[str, Answer]:
        answers: dict[str, Answer] = await actor.exchange.remote(*arguments)
        return answers

    return exchange
