"""Caption tables written without a model, and recaption jobs on drawn scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.cli.config import load
from pipelines.images.rows import CAPTION_ROW
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.health import health_of
from pipelines.storage.tables import Table

Settings = Callable[..., RecaptionConfig]


@pytest.fixture
def settings(trained_captioner: Path, pair_table: Path, tmp_path: Path) -> Settings:
    """Settings of a cheap recaption of 21 scenes into `captions`; more come as key=value."""

    def made(*more: str) -> RecaptionConfig:
        some = [
            f"data.input={pair_table}",
            f"data.output={tmp_path / 'captions'}",
            "data.limit=21",
            "ray.address=in-process",
        ]
        some += [f"model.path={trained_captioner}", "generate.num_beams=1", "data.rows_per_chunk=8"]
        some += ["generate.max_new_tokens=8", "actors.use_gpu=false", "actors.num_actors=1"]
        return load(RecaptionConfig, None, [*some, *more])

    return made


def caption_table(
    folder: Path,
    chunks: Sequence[Sequence[str | None]],
    names: Sequence[Sequence[str]] | None = None,
) -> Table:
    """A finished caption table with a part per chunk; None: a row with a broken image."""
    table = Table(folder)
    table.create("caption", {"model": "0123456789abcdef"}, len(chunks), checked=True)
    for number, captions in enumerate(chunks):
        rows = []
        for row, text in enumerate(captions):
            row_fields = {"key": number * 1000 + row, "model": "0123456789abcdef"}
            row_fields["name"] = names[number][row] if names else f"{number}/{row}.jpg"
            if text is None:
                rows.append({**row_fields, "status": "decode:corrupt", "error": "broken"})
                continue
            cut = text.endswith("…")  # stands for a caption that ran to its limit
            row_fields |= {"caption": text, "num_tokens": len(text.split()), "status": "ok"}
            row_fields |= {"finish_reason": "length" if cut else "stop"}
            rows.append({**row_fields, **vars(health_of(text, cut))})
        table.write(number, pa.Table.from_pylist(rows, CAPTION_ROW))
    return table
