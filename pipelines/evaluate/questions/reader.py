"""Asks an OpenAI-compatible server, and keeps every answer as soon as it is there.

A request is known by a digest of all that decides its answer, so a rerun asks only what is missing,
whatever the run before was killed in.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from pipelines.evaluate.config import AskConfig
from vlv_model.errors import ConfigError, RunError

OK = "ok"
_LONGEST_WAIT = 60.0  # seconds
_REFUSED = {401: "the key", 403: "the key", 404: "the address or the model"}


@dataclass(frozen=True)
class Answer:
    """What the reader said to one request; of another status than ok the text is empty."""

    status: str
    text: str


class _Again(Exception):
    """A reply that another try may better: its status, and how long the server wants to be left."""

    def __init__(self, status: str, wait: float | None = None) -> None:
        super().__init__(status)
        self.status, self.wait = status, wait


def digest(ask: AskConfig, messages: Sequence[dict[str, str]]) -> str:
    """What identifies a request: model, limit and messages."""
    content = json.dumps([ask.model, ask.max_tokens, messages], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def ask_all(
    ask: AskConfig, requests: Sequence[Sequence[dict[str, str]]], log: Path
) -> dict[str, Answer]:
    """The answers to all requests by their digest; `log` holds a line of JSON for each.

    Raises RunError if the server refuses requests, the budget ends, or more than `ask.max_failed` of
    the requests have no answer (a server that is down is no reader that knows nothing). The log stays,
    and the next run asks again what failed.
    """
    answers = read_answers(log)
    wanted = {digest(ask, messages): messages for messages in requests}
    missing = {
        key: messages
        for key, messages in wanted.items()
        if key not in answers or answers[key].status != OK
    }
    if missing:
        try:
            asyncio.run(_Run(ask, log, answers).ask(missing))
        except ExceptionGroup as group:  # of one worker; the others were cancelled
            raise group.exceptions[0] from None
    failed = Counter(answers[key].status for key in wanted if answers[key].status != OK)
    if failed.total() > ask.max_failed * len(wanted):
        raise RunError(
            f"{failed.total():,} of {len(wanted):,} requests have no answer, most of status "
            f"{failed.most_common(1)[0][0]}: the same command asks them again (ask.max_failed="
            f"{ask.max_failed:g} allows a share of them)"
        )
    return answers


def read_answers(log: Path) -> dict[str, Answer]:
    """The answers in a log; a line that a kill cut off is dropped."""
    answers: dict[str, Answer] = {}
    if log.exists():
        for line in log.read_text("utf-8", "replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                answers[row["request"]] = Answer(row["status"], row["text"])
    return answers


class _Spent(Exception):
    """The budget of requests is used."""


class _Run:
    def __init__(self, ask: AskConfig, log: Path, answers: dict[str, Answer]) -> None:
        self.settings, self.log, self.answers = ask, log, answers
        self.sent, self.spent = 0, False

    async def ask(self, missing: dict[str, Sequence[dict[str, str]]]) -> None:
        if not self.settings.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"ask.endpoint={self.settings.endpoint}: expected http:// or https://"
            )
        queue = iter(missing.items())
        key = os.environ.get(self.settings.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = aiohttp.ClientTimeout(total=self.settings.timeout_seconds)
        with self.log.open("a", encoding="utf-8") as file:
            if file.tell():
                file.write("\n")  # ends a line that a kill cut off
            async with (
                aiohttp.ClientSession(headers=headers, timeout=limit) as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(min(self.settings.concurrency, len(missing))):
                    group.create_task(self._work(session, queue, file))
        if self.spent:
            raise RunError(
                f"the budget ask.max_requests={self.settings.max_requests} is used, and answers are "
                f"missing: those that came are in {self.log}; the same command continues"
            )

    async def _work(self, session: aiohttp.ClientSession, queue: Any, file: Any) -> None:
        for key, messages in queue:
            try:
                answer = await self._answer(session, messages)
            except _Spent:  # the other workers' requests are paid for: their answers are kept
                self.spent = True
                return
            self.answers[key] = answer
            row = {"request": key, "status": answer.status, "text": answer.text}
            file.write(json.dumps(row, ensure_ascii=True) + "\n")
            file.flush()

    async def _answer(
        self, session: aiohttp.ClientSession, messages: Sequence[dict[str, str]]
    ) -> Answer:
        status = ""
        for attempt in range(self.settings.retries + 1):
            try:
                return Answer(OK, await self._once(session, messages))
            except _Again as failure:
                status, wait = failure.status, failure.wait
            if attempt < self.settings.retries:
                pause = self.settings.pause_seconds * 2**attempt * random.uniform(0.5, 1)
                await asyncio.sleep(min(max(wait or 0.0, pause), _LONGEST_WAIT))
        return Answer(f"reader:{status}", "")

    async def _once(
        self, session: aiohttp.ClientSession, messages: Sequence[dict[str, str]]
    ) -> str:
        ask = self.settings
        if ask.max_requests is not None and self.sent >= ask.max_requests:
            raise _Spent
        self.sent += 1
        body = {
            "model": ask.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": ask.max_tokens,
        }
        url = f"{ask.endpoint.rstrip('/')}/chat/completions"
        try:
            async with session.post(url, json=body) as reply:
                if reply.status in _REFUSED:
                    raise RunError(
                        f"ask.endpoint={ask.endpoint} answers {reply.status}: check "
                        f"{_REFUSED[reply.status]} (ask.model, ${ask.key_variable})"
                    )
                if reply.status != 200:
                    raise _Again(f"http_{reply.status}", _seconds(reply.headers.get("Retry-After")))
                content = json.loads(await reply.read())
        except TimeoutError:
            raise _Again("timeout") from None
        except aiohttp.ClientError:
            raise _Again("connection") from None
        except ValueError:
            raise _Again("not_json") from None
        try:
            text = content["choices"][0]["message"]["content"].strip()
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Again("no_answer") from None
        if not text:
            raise _Again("empty")
        first: str = text.splitlines()[0].strip()
        return first


def _seconds(header: str | None) -> float | None:
    try:
        return float(header or "")
    except ValueError:
        return None  # a date: the pause between tries serves
