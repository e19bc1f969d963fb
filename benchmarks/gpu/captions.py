"""Captions of our decoder against transformers' generate, at equal settings on both sides.

Random weights seldom end a caption, so both sides write the same number of tokens. What our decoder gains
when captions end at different lengths is measured by benchmarks/recaption/throughput.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu.setting import Setting
from benchmarks.training import models
from benchmarks.training.reference_step import reference_processor
from pipelines.estimate.flops import synchronize
from vlv_model.caption_tokens import decode_captions, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.config import Precision
from vlv_model.precision import cast

_ROWS = {"tiny": 8, "small": 8, "full": 32}
_TOKENS = {"tiny": 24, "small": 32, "full": 100}


def greedy(setting: Setting) -> dict[str, Any]:
    """One beam, in float32 and bfloat16."""
    return {name: _compare(setting, 1, name) for name in ("float32", "bfloat16")}


def beams(setting: Setting) -> dict[str, Any]:
    """Four beams with the published precision, float32."""
    return {"float32": _compare(setting, 4, "float32")}


def _compare(setting: Setting, num_beams: int, precision: Precision) -> dict[str, Any]:
    captioner = cast(models.captioner(setting.size, setting.device), precision).eval()
    rows, tokens = _ROWS[setting.size_name], _TOKENS[setting.size_name]
    if num_beams > 1:
        rows //= 4
    side = setting.size.image_size
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(rows, 3, 24, 24, generator=generator)
    squares = torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")
    squares = (squares * 255).round().to(torch.uint8)  # [n 3 s s], on the CPU as images are

    def ours() -> list[str]:
        written = captioner.generate(squares.to(setting.device), num_beams, tokens)
        return [caption.text for caption in written]

    def plain() -> list[str]:
        return _plain(captioner, squares, num_beams, tokens)

    (our_texts, our_seconds), (their_texts, their_seconds) = (
        _timed(setting, write) for write in (ours, plain)
    )
    equal = sum(one == other for one, other in zip(our_texts, their_texts, strict=True))
    return {
        "captions": rows,
        "tokens_each": tokens,
        "ours_captions_per_second": round(rows / our_seconds, 3),
        "plain_captions_per_second": round(rows / their_seconds, 3),
        "ratio": round(their_seconds / our_seconds, 3),
        "equal_captions": equal / rows,
    }


@torch.no_grad()
def _plain(captioner: VLVCaptioner, squares: Tensor, num_beams: int, tokens: int) -> list[str]:
    """As the reference does: the processor on the CPU, then one generate for the batch."""
    device = captioner.encoder.learnable_queries.device
    processor = reference_processor(captioner.encoder.encoder_image_size)
    pictures = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]
    pixels = processor(pictures, return_tensors="pt").pixel_values.to(device)
    prefix = captioner.prefix(pixels)
    end = end_of_text_id(captioner.tokenizer)
    ids = captioner.language_model.generate(
        inputs_embeds=prefix,
        attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.int64),
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [caption.text for caption in decode_captions(captioner.tokenizer, ids)]


def _timed(setting: Setting, write: Callable[[], list[str]]) -> tuple[list[str], float]:
    """The captions, and the seconds of the second run; the first one warms up."""
    write()
    synchronize(setting.device)
    begun = time.perf_counter()
    texts = write()
    synchronize(setting.device)
    return texts, time.perf_counter() - begun
