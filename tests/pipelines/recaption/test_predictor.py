"""Chunks stream through the captioner: its slots stay full, and each chunk is finished by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipelines.execution import telemetry
from pipelines.execution.steps import Chunk
from pipelines.images.rows import CAPTION_ROW
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import SlotEngine, local_engine
from pipelines.recaption.predictor import CaptionImages
from tests.vlv_model.drawings import scenes
from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import RunningSequence, SlotDecoder, decode

SLOTS, ROWS, CHUNKS, LONGEST = 4, 8, 6, 20
GREEDY = {"num_beams": 1}
SAMPLED = {"num_beams": 1, "temperature": 1.5, "top_p": 0.9, "seed": 3}


def length_of(key: int) -> int:
    """Tokens of an image's caption: one in eight is long."""
    return LONGEST if key % 8 == 5 else 2 + key % 5


class SpreadDecoder(SlotDecoder):
    """Ends each caption at `length_of` its key; notes the slots in use at each step."""

    def step(self) -> Any:
        if self._sequences:
            self.used.append(len(self._sequences))
        return super().step()

    def _choose_tokens(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> list[int]:
        logits[:, self.end_of_text] = -torch.inf
        for row, sequence in enumerate(sequences):
            if len(sequence.ids) == length_of(sequence.key):
                logits[row] = -torch.inf
                logits[row, self.end_of_text] = 0
        return super()._choose_tokens(logits, sequences)


class SpreadCaptioner(VLVCaptioner):
    def decoder(self, *arguments: Any, **options: Any) -> SpreadDecoder:
        decoder = super().decoder(*arguments, **options)
        decoder.__class__ = SpreadDecoder
        decoder.used = []
        return decoder


@pytest.fixture(scope="module")
def captioner(tiny_models: Path) -> VLVCaptioner:
    captioner = VLVCaptioner.from_pretrained(tiny_models)
    captioner.__class__ = SpreadCaptioner
    return captioner


@pytest.fixture(scope="module")
def squares() -> Tensor:
    return scenes(ROWS * CHUNKS, seed=0)  # uint8 [n 3 64 64]; the key of an image is its place


def caption_step(captioner: VLVCaptioner, **settings: Any) -> CaptionImages:
    """The step without reading a checkpoint."""
    generate = GenerateConfig(max_new_tokens=64, batch_size=SLOTS, **settings)
    step = CaptionImages.__new__(CaptionImages)
    step.engine, step.image_size, step.fingerprint = local_engine(captioner, generate), 64, "f"
    step.postprocess = generate.postprocessed
    return step


def chunk_of(number: int, squares: Tensor, keys: Sequence[int]) -> Chunk:
    rows = {
        "key": pa.array(keys, pa.int64()),
        "name": pa.array([f"{key}.png" for key in keys], pa.string()),
        "pixels": pa.array([squares[key].numpy().tobytes() for key in keys], pa.binary()),
        "status": pa.array(["ok"] * len(keys), pa.string()),
        "error": pa.nulls(len(keys), pa.string()),
    }
    return Chunk(number, pa.table(rows))


def all_chunks(squares: Tensor) -> list[Chunk]:
    return [
        chunk_of(number, squares, range(number * ROWS, (number + 1) * ROWS))
        for number in range(CHUNKS)
    ]


def share_used(engine: Any) -> float:
    """Of all slots in all steps of the decoder, those with a caption in them."""
    assert isinstance(engine, SlotEngine)
    used = engine.decoder.used
    engine.decoder.used = []
    return sum(used) / (SLOTS * len(used))


def test_slots_stay_full_across_chunks(captioner, squares) -> None:
    step, chunks = caption_step(captioner, **GREEDY), all_chunks(squares)
    by_one = [found for chunk in chunks for found in step.process(iter([chunk]))]
    drained = share_used(step.engine)
    together = list(step.process(iter(chunks)))
    streamed = share_used(step.engine)
    assert drained < 0.55
    assert streamed > 0.85
    assert {c.number: c.rows for c in together} == {c.number: c.rows for c in by_one}


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_captions_are_those_of_a_plain_loop(captioner, squares, settings) -> None:
    step = caption_step(captioner, **settings)
    found: dict[int, str] = {}
    waits = [None] * 9
    for order in (slice(None), slice(None, None, -1)):
        # With gaps, where no chunk has come.
        chunks: list[Chunk | None] = [x for c in all_chunks(squares)[order] for x in (c, *waits)]
        for chunk in step.process(iter(chunks)):
            rows = chunk.rows.select(["key", "caption", "num_tokens"]).to_pylist()
            assert [row["num_tokens"] for row in rows] == [length_of(row["key"]) for row in rows]
            for row in rows:
                assert found.setdefault(row["key"], row["caption"]) == row["caption"]
    keys = range(len(squares))
    with torch.no_grad():
        prefixes = captioner.prefix(squares)
    sampling = step.engine.decoder.sampling
    plain = decode(captioner.decoder(len(keys), 64, sampling), keys, prefixes)
    assert found == {key: captioner.caption_of(plain[key]).text for key in keys}


def test_a_chunk_is_finished_while_later_ones_run(captioner, squares) -> None:
    step = caption_step(captioner, **GREEDY)
    short = [key for key in range(len(squares)) if length_of(key) < LONGEST]
    chunks = [
        chunk_of(0, squares, short[:4]),
        chunk_of(1, squares, [5, *short[4:7]]),  # its first caption is long
        chunk_of(2, squares, short[7:11]),
        chunk_of(3, squares, []),
    ]
    finished = step.process(iter(chunks))
    assert next(finished).number == 0
    assert step.engine.busy
    assert [chunk.number for chunk in finished][-1] == 1


def test_an_empty_chunk_has_the_columns_of_captions(captioner, squares) -> None:
    step = caption_step(captioner, **GREEDY)
    (empty,) = step.process(iter([chunk_of(7, squares, [])]))
    assert (empty.number, empty.rows.num_rows) == (7, 0)
    assert empty.rows.schema.equals(CAPTION_ROW)


def test_a_failing_image_costs_no_other_its_caption(captioner, squares, monkeypatch) -> None:
    expected = {
        chunk.number: chunk.rows
        for chunk in caption_step(captioner, **GREEDY).process(iter(all_chunks(squares)))
    }
    prefix = captioner.prefix

    def failing(pixels: Tensor) -> Tensor:
        if any(torch.equal(square, squares[ROWS + 3]) for square in pixels):
            raise RuntimeError("a bad day")
        return prefix(pixels)

    monkeypatch.setattr(captioner, "prefix", failing)
    step = caption_step(captioner, **GREEDY)
    found = {chunk.number: chunk.rows for chunk in step.process(iter(all_chunks(squares)))}
    failed = found[1].slice(3, 1).to_pylist()[0]
    assert (failed["status"], failed["error"]) == ("caption:failed", "RuntimeError: a bad day")
    assert failed["caption"] is None
    for number, rows in found.items():
        others = [row for row in range(ROWS) if (number, row) != (1, 3)]
        assert rows.take(others) == expected[number].take(others)


def test_a_broken_image_keeps_its_status_and_tokens_are_counted(
    captioner, squares, monkeypatch
) -> None:
    exported: dict[str, float] = {}
    monkeypatch.setattr(
        telemetry.Counter, "add", lambda metric, amount: exported.update({metric.name: amount})
    )
    step = caption_step(captioner, **GREEDY)
    broken = {"key": 11, "name": "b", "pixels": None, "status": "decode:corrupt", "error": "none"}
    chunk = chunk_of(5, squares, [0])
    both = pa.concat_tables([chunk.rows, pa.Table.from_pylist([broken], chunk.rows.schema)])
    (found,) = step.process(iter([Chunk(5, both)]))
    assert found.rows["status"].to_pylist() == ["ok", "decode:corrupt"]
    assert found.rows["error"].to_pylist() == [None, "none"]
    assert found.rows["caption"].is_valid().to_pylist() == [True, False]
    # The end-of-text is a token, too.
    assert exported == {"vlv_recaption_images": 1, "vlv_recaption_tokens": length_of(0) + 1}
    (alone,) = step.process(iter([Chunk(5, both.slice(1))]))
    assert alone.rows.to_pylist() == found.rows.slice(1).to_pylist()


def test_a_step_waits_for_no_chunk_while_captions_run(captioner, squares) -> None:
    step, asked = caption_step(captioner, **GREEDY), 0

    def chunks() -> Iterator[Chunk | None]:
        nonlocal asked
        yield chunk_of(0, squares, [5])
        while step.engine.busy:
            asked += 1
            yield None

    (found,) = step.process(chunks())
    assert found.rows["num_tokens"].to_pylist() == [LONGEST]
    assert asked == LONGEST  # once a token; the first one came with the prefix
