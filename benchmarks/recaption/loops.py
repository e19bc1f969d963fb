"""Baselines of benchmarks/recaption/throughput.py: plain loops, the engine and the step without Ray.

A loop is the usual transformers code: open the images of a batch, resize and normalise them on the
CPU with the processor, generate, decode.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

from benchmarks.recaption.captioners import (
    ForcedCaptionImages,
    forced_length,
    is_forced,
    open_captioner,
    spread_length,
    squares_of,
)
from benchmarks.training.reference_step import reference_processor
from pipelines.execution.model import ModelSettings
from pipelines.execution.steps import Chunk
from pipelines.images.rows import OK
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import BeamEngine, Request, local_engine
from vlv_model.caption_tokens import caption_text, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.preprocessing import square_image


@dataclass
class Loop:
    """Settings and results of a plain loop."""

    batch: int
    beams: int
    stop: bool  # at the end-of-text; False: always generate the maximum
    tokens: int = 0
    seconds: float = 0.0
    ids: dict[int, list[int]] = field(default_factory=dict)  # token ids by image key

    def figures(self) -> dict[str, Any]:
        return {"images": len(self.ids), "tokens": self.tokens, "seconds": self.seconds}


class _ForcedEnd(LogitsProcessor):
    """Ends each row of a batch exactly at its `forced_length`."""

    def __init__(self, keys: list[int], beams: int, end_of_text: int, longest: int) -> None:
        lengths = [forced_length(key, longest) for key in keys for _ in range(beams)]
        self.lengths, self.end_of_text = torch.tensor(lengths), end_of_text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        ends = (input_ids.shape[1] + 1 >= self.lengths).to(scores.device)
        scores[:, self.end_of_text] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.end_of_text] = 0.0
        return scores


def run_loop(
    loop: Loop, model: Path, file: Path, images: int, longest: int, device: torch.device
) -> Loop:
    """Caption the first `images` of a Parquet file; the first batch runs once more as warm-up."""
    captioner = open_captioner(model).to(device)
    forced = is_forced(model) and loop.stop
    batches = list(_batches(file, images, loop.batch))
    _one_batch(loop, captioner, *batches[0], longest=longest, forced=forced)
    loop.tokens, loop.ids = 0, {}
    begun = time.perf_counter()
    for keys, content in batches:
        _one_batch(loop, captioner, keys, content, longest=longest, forced=forced)
    loop.seconds = time.perf_counter() - begun
    return loop


def _batches(file: Path, images: int, size: int) -> Iterator[tuple[list[int], list[bytes]]]:
    left = images
    for rows in pq.ParquetFile(file).iter_batches(size, columns=["key", "image"]):
        rows = rows.slice(0, left)
        left -= rows.num_rows
        if rows.num_rows:
            yield rows["key"].to_pylist(), [image["bytes"] for image in rows["image"].to_pylist()]


@torch.no_grad()
def _one_batch(
    loop: Loop,
    captioner: VLVCaptioner,
    keys: list[int],
    content: list[bytes],
    longest: int,
    forced: bool,
) -> None:
    device = captioner.encoder.learnable_queries.device
    side = captioner.encoder.encoder_image_size
    processor = reference_processor(side)
    # As in the reference, the encoder gets the VAE's square, resized once more.
    squares = [_square(image, side // 2) for image in content]
    pixels = processor(squares, return_tensors="pt").pixel_values.to(device)
    prefix = captioner.prefix(pixels)
    end_of_text = end_of_text_id(captioner.tokenizer)
    ends = _ForcedEnd(keys, loop.beams, end_of_text, longest)
    new_ids = captioner.language_model.generate(
        inputs_embeds=prefix,
        attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.int64),
        do_sample=False,
        num_beams=loop.beams,
        max_new_tokens=longest,
        eos_token_id=end_of_text if loop.stop else None,
        pad_token_id=end_of_text,
        logits_processor=[ends] if forced else None,
    )
    for key, ids in zip(keys, new_ids.tolist(), strict=True):
        if loop.stop and end_of_text in ids:
            ids = ids[: ids.index(end_of_text)]
        caption_text(captioner.tokenizer, ids)  # decoding is part of the measured time
        loop.tokens += len(ids)
        loop.ids[key] = ids


def _square(content: bytes, side: int) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return Image.fromarray(square_image(image, side).permute(1, 2, 0).numpy())


def run_bare(
    model: Path,
    file: Path,
    images: int,
    generate: GenerateConfig,
    device: torch.device,
    workers: int,
) -> dict[str, Any]:
    """Run the engine on decoded squares, in as many processes as the job has actors."""
    context = get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    shares = [range(first, images, workers) for first in range(workers)]
    arguments = (model, file, generate, device, workers, barrier, results)
    processes = [context.Process(target=_bare, args=(s, *arguments)) for s in shares]
    for process in processes:
        process.start()
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    seconds, tokens = max(time[0] for time in times), sum(time[1] for time in times)
    return {"images": images, "tokens": tokens, "seconds": seconds}


def _bare(
    rows: range,
    model: Path,
    file: Path,
    generate: GenerateConfig,
    device: torch.device,
    workers: int,
    barrier: Barrier,
    results: Any,
) -> None:
    if workers > 1:
        torch.set_num_threads(1)
    captioner = open_captioner(model).to(device)
    all_keys = pq.read_table(file, columns=["key"])["key"].to_pylist()
    keys = [all_keys[row] for row in rows]
    squares = squares_of(file, set(keys), captioner)
    pixels = torch.stack([squares[key] for key in keys])  # uint8 [n 3 s s]
    engine = local_engine(captioner, generate)
    list(engine.captions(keys[:2], pixels[:2]))
    barrier.wait()
    begun = time.perf_counter()
    tokens = 0
    for outcome in engine.captions(keys, pixels):
        assert outcome.caption is not None
        tokens += outcome.caption.num_tokens
    results.put((time.perf_counter() - begun, tokens))


class _ForcedBeams(BeamEngine):
    """Beam search whose captions have lengths of `spread_length`."""

    def __init__(self, captioner: VLVCaptioner, generate: GenerateConfig) -> None:
        super().__init__(captioner, generate)
        end = end_of_text_id(captioner.tokenizer)
        self.ends = _ForcedEnd([], generate.num_beams, end, generate.max_new_tokens)
        model = captioner.language_model
        model.generate = partial(model.generate, logits_processor=[self.ends])

    def _prefixes(self, batch: dict[int, Request]) -> Tensor:
        longest = self.generate.max_new_tokens
        lengths = [spread_length(request.key, longest) for request in batch.values()]
        self.ends.lengths = torch.tensor(lengths).repeat_interleave(self.generate.num_beams)
        return super()._prefixes(batch)


WAYS = ("drained", "streamed", "beams")


def run_step(
    way: str, model: Path, file: Path, images: int, generate: GenerateConfig, rows: int
) -> dict[str, Any]:
    """Run the job's step on chunks of decoded squares, without Ray, on one CPU thread.

    Captions have lengths of `spread_length`. Drained: each chunk begins when the one before it is
    finished. Streamed: the step takes the next chunk as soon as it wants it. Beams: the same with a
    beam search.
    """
    torch.set_num_threads(1)
    resolved, checkpoint = ModelSettings(path=str(model)).resolve()
    assert checkpoint is not None
    step = ForcedCaptionImages(resolved, checkpoint, generate, "benchmark", False)
    captioner = step.engine.captioner
    if way == "beams":
        beams = generate.model_copy(update={"num_beams": 4})
        step.engine = _ForcedBeams(captioner, beams)
    keys = pq.read_table(file, columns=["key"])["key"].to_pylist()[:images]
    squares = squares_of(file, set(keys), captioner)
    chunks = [
        _chunk(number, keys[first : first + rows], squares)
        for number, first in enumerate(range(0, images, rows))
    ]
    decoder = getattr(step.engine, "decoder", None)
    if decoder is not None:
        decoder.length_of = spread_length
    list(step.process(iter([_chunk(0, keys[:2], squares)])))
    if decoder is not None:
        decoder.steps = decoder.used = 0
    begun, worked = time.perf_counter(), time.process_time()
    done: dict[int, float] = {}
    for source in [[chunk] for chunk in chunks] if way == "drained" else [chunks]:
        for chunk in step.process(iter(source)):
            done[chunk.number] = time.perf_counter() - begun
            lengths = [
                spread_length(k, generate.max_new_tokens) for k in chunk.rows["key"].to_pylist()
            ]
            assert chunk.rows["num_tokens"].to_pylist() == [length - 1 for length in lengths]
    figures: dict[str, Any] = {
        "captions_per_second": round(images / max(done.values()), 1),
        "captions_per_cpu_second": round(images / (time.process_time() - worked), 1),
        "seconds_to_first_chunk": round(min(done.values()), 2),
    }
    if decoder is not None:
        figures["decoder_steps"] = decoder.steps
        figures["slots_used"] = round(decoder.used / (decoder.steps * decoder.slots), 4)
    return figures


def _chunk(number: int, keys: list[int], squares: dict[int, Tensor]) -> Chunk:
    rows = {
        "key": pa.array(keys, pa.int64()),
        "name": pa.array(map(str, keys), pa.string()),
        "pixels": pa.array([squares[key].numpy().tobytes() for key in keys], pa.binary()),
        "status": pa.array([OK] * len(keys), pa.string()),
        "error": pa.nulls(len(keys), pa.string()),
    }
    return Chunk(number, pa.table(rows))
