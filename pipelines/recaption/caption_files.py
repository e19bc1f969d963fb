"""Captions image files without Ray: what `jobs/caption.py` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipelines.cli.waiting import waiting
from pipelines.execution.connection import has_gpu, quiet_libraries
from pipelines.images.external import MAX_IMAGE_BYTES
from pipelines.pictures.decode import DecodeError
from pipelines.pictures.squares import isolated_squares
from pipelines.recaption.config import CaptionConfig
from pipelines.recaption.find_files import NamedFile, escaped, find_files
from pipelines.recaption.identity import caption_identity, check_length
from pipelines.storage.files import read_bytes
from vlv_model.config import ModelConfig
from vlv_model.errors import ConfigError, DataError, RunError
from vlv_model.squares import Square

if TYPE_CHECKING:
    import numpy as np

    from pipelines.recaption.engine import Engine

_CPU_BATCH = (
    8  # images: on a CPU larger batches are hardly faster, and nothing is printed meanwhile
)


def caption_files(config: CaptionConfig) -> None:
    """Print the caption of each image, as soon as it is there; errors go to standard error, a line each.

    One image file: its caption. Otherwise `file<TAB>caption` lines, in which tabs, newlines and
    backslashes are escaped, or with `format=json` one object `{"file": "caption"}`. Raises DataError
    at the end if an image has no caption, CheckpointError without a trained captioner.
    """
    if sys.stdout is None:
        raise ConfigError("standard output is closed: it is where captions are printed")
    if not config.image:
        raise ConfigError("give image files, folders or globs, such as photo.jpg or 'photos/*.jpg'")
    if config.model.path is None:
        raise ConfigError(
            "setting 'model.path' is required: give model.path=FOLDER, a stage-2 run or an exported captioner"
        )
    if config.use_gpu and not has_gpu():
        raise ConfigError("use_gpu=true, but this machine has no CUDA GPU: leave it out")
    model, checkpoint = config.model.resolve(stage="stage2")
    caption_identity(model, checkpoint, config.generate)  # raises for an untrained captioner
    check_length(model, config.generate)
    open_engine = partial(_open_engine, config, model, checkpoint)
    files, problems = find_files(config.image)
    words = list(config.image)
    if problems and len(words) == 1:
        raise DataError(f"{escaped(words[0])} {problems[words[0]]}")
    for word, reason in problems.items():
        print(f"{escaped(word)} {reason}", file=sys.stderr)
    one = len(words) == 1 and [file.path for file in files] == words
    output = _Output(config.format, alone=one)
    failed = len(problems)
    # Lines on the terminal are progress enough.
    shows_bar = not one and not sys.stdout.isatty() and sys.stderr.isatty()
    bar: tqdm | None = None
    for done, (file, caption, error) in enumerate(
        _captions(config, files, Square.of(model), open_engine), 1
    ):
        if bar is not None:
            bar.update()
        elif shows_bar:  # from the first image on: the model's start is none of its time
            bar = tqdm(total=len(files), initial=done, desc="caption", unit="image")
        if caption is not None:
            output.add(file.path, caption)
            continue
        failed += 1
        line = f"{escaped(file.path)} {error}"
        if one:
            raise DataError(line)
        tqdm.write(line, file=sys.stderr)
    if bar is not None:
        bar.close()
    output.end()
    if failed:
        total = len(files) + len(problems)
        raise DataError(f"{failed:,} of {total:,} have no caption: the lines above say why")


def _captions(
    config: CaptionConfig,
    files: Sequence[NamedFile],
    square: Square,
    open_engine: Callable[[], Engine],
) -> Iterator[tuple[NamedFile, str | None, str]]:
    """Each file, in order, with its caption, or None and the reason.

    The model is loaded when the first image has been decoded.
    """
    engine: Engine | None = None
    remaining, size = iter(files), 1
    try:
        while batch := list(islice(remaining, size)):
            pixels, reasons = _decoded(batch, square)
            captions: dict[int, str] = {}
            if pixels:
                if engine is None:
                    with waiting("loading the model"):
                        engine = open_engine()
                for position, caption, error in _caption(engine, batch, pixels):
                    if caption is not None:
                        captions[position] = config.generate.postprocessed(caption)
                    reasons[position] = f"cannot be captioned: {error}"
                # The first caption soon, then larger batches. They grow by the same steps each time:
                # the batch affects rounding.
                on_cpu = engine.device.type == "cpu"
                most = min(config.generate.batch_size, _CPU_BATCH if on_cpu else sys.maxsize)
                size = min(2 * size, most)
            for position, file in enumerate(batch):
                yield file, captions.get(position), reasons.get(position, "")
    finally:
        if engine is not None:
            engine.close()


def _decoded(
    files: Sequence[NamedFile], square: Square
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """The squares uint8 `[3 s s]` of files, and why others have none, by position."""
    pixels, reasons = {}, {}
    for position, file in enumerate(files):
        try:
            content = read_bytes(Path(file.path), most=MAX_IMAGE_BYTES)
            pixels[position] = isolated_squares(square)(content, square)
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            reasons[position] = f"cannot be read as an image: {reason}"
    return pixels, reasons


def _caption(
    engine: Engine, files: Sequence[NamedFile], pixels: dict[int, np.ndarray]
) -> Iterator[tuple[int, str | None, str | None]]:
    import numpy as np
    import torch

    from pipelines.recaption.engine import ModelDiedError

    positions = list(pixels)
    keys = [files[position].key for position in positions]
    images = torch.from_numpy(np.stack([pixels[position] for position in positions]))
    try:
        for outcome in engine.captions(keys, images):  # uint8 [n 3 s s]
            text = outcome.caption.text if outcome.caption else None
            yield positions[outcome.id], text, outcome.error
    except ModelDiedError as error:
        raise RunError(str(error)) from error


def _open_engine(config: CaptionConfig, model: ModelConfig, checkpoint: Path | None) -> Engine:
    quiet_libraries()
    import torch

    from pipelines.recaption.predictor import open_engine

    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    device = torch.device("cuda" if use_gpu else "cpu")
    return open_engine(model, checkpoint, config.generate, device)


class _Output:
    """Writes captions to standard output, each as soon as it is there."""

    def __init__(self, format: str, alone: bool) -> None:
        self.is_json, self.alone, self.count = format == "json", alone, 0

    def add(self, path: str, caption: str) -> None:
        if self.is_json:
            pair = f"{_json(path)}: {_json(caption)}"
            self._write(f"{',' if self.count else '{'}\n{pair}")
        else:
            line = caption if self.alone else f"{escaped(path)}\t{escaped(caption)}"
            self._write(line + "\n")
        self.count += 1

    def end(self) -> None:
        if self.is_json:
            self._write("\n}\n" if self.count else "{}\n")

    def _write(self, text: str) -> None:
        # A name that is not UTF-8 is written as the bytes that it is.
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()


def _json(text: str) -> str:
    # Escapes only where a name is not UTF-8, which no JSON file may hold as it is.
    is_utf8 = text == text.encode("utf-8", "replace").decode()
    return json.dumps(text, ensure_ascii=not is_utf8)
