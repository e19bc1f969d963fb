"""The actor of a step that takes a stream of chunks, without a Ray: calls come from several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from pipelines.execution.cluster import InProcess, _ModelActor
from pipelines.execution.steps import Chunk, ChunkByChunk, ModelDiedError, PlacedStep
from vlv_model.errors import ModelError, RunError


class LastFirst(ChunkByChunk):
    """Finishes chunks in pairs, the later one first."""

    failed = "pair:failed"
    closed = threading.Event()

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        held: list[Chunk] = []
        for chunk in chunks:
            if chunk is not None:
                held.append(replace(chunk, rows=pa.table({"held": [len(held)]})))
            if len(held) == 2:
                yield held.pop()
                yield held.pop()
        yield from held

    def close(self) -> None:
        self.closed.set()


class Failing(ChunkByChunk):
    """Raises an error at its chunk number 1."""

    failed = "fails:failed"

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __call__(self, chunk: Chunk) -> Chunk:
        if chunk.number == 1:
            raise self.error("no more")
        return chunk


class Refusing(ChunkByChunk):
    def __init__(self) -> None:
        raise ModelError("the model is not there")


def blocks(*numbers: int) -> list[pa.Table]:
    return [Chunk(number).to_block() for number in numbers]


def test_calls_wait_for_their_own_chunk_while_others_are_done() -> None:
    LastFirst.closed.clear()
    actor = _ModelActor(PlacedStep(LastFirst))
    with ThreadPoolExecutor(3) as threads:
        done = [threads.submit(actor, block) for block in blocks(1, 2, 3)]
        found = [Chunk.of_block(call.result()) for call in done[:2]]
        assert [chunk.number for chunk in found] == [1, 2]
        assert sorted(held for chunk in found for held in chunk.rows["held"].to_pylist()) == [0, 1]
        assert not done[2].done()  # nothing came that would finish it
        fourth = Chunk.of_block(threads.submit(actor, blocks(4)[0]).result())
        assert fourth.number == 4
    assert Chunk.of_block(done[2].result()).number == 3
    del actor  # as Ray does at the end of an actor
    assert LastFirst.closed.wait(60)


@pytest.mark.parametrize(
    ("placed", "error"),
    [
        (PlacedStep(Failing, (ModelError,)), ModelError),
        (PlacedStep(Failing, (ZeroDivisionError,)), ZeroDivisionError),
        (PlacedStep(Refusing), ModelError),
    ],
)
def test_an_error_reaches_every_call(placed: PlacedStep, error: type[Exception]) -> None:
    actor = _ModelActor(placed)
    for block in blocks(1, 2, 3):
        with pytest.raises(error):
            actor(block)


def numbered(chunk: Chunk) -> Chunk:
    return replace(chunk, rows=pa.table({"number": [chunk.number]}))


def test_in_process_a_step_gets_the_same_stream() -> None:
    steps = [PlacedStep(numbered), PlacedStep(LastFirst, then=numbered)]
    passed: Any = InProcess().pass_chunks([1, 2, 3], steps)
    assert [chunk.number for chunk in passed] == [2, 1, 3]
    assert LastFirst.closed.is_set()
    with pytest.raises(RunError, match="no more"):
        list(InProcess().pass_chunks([0, 1], [PlacedStep(Failing, (ModelDiedError,))]))
