"""Images that lie elsewhere than in a table of ours, and the rows that a job reads of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.cli.config import build
from pipelines.execution.read_images import ReadImages
from pipelines.execution.steps import Chunk
from pipelines.images.selection import Selection
from tests.pipelines.image_jobs import open_table
from vlv_model.squares import Square


def png(colour: str, size: int = 24) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def read(images: str | Path, output: str | Path, **more: Any) -> list[dict[str, Any]]:
    """The rows of all chunks of a job over the images."""
    selection = build(Selection, {"input": str(images), "output": str(output), **more})
    table = open_table("caption", selection, {})
    step = ReadImages(table, Square(8))
    blocks = [step(Chunk(chunk)).rows for chunk in table.pending()]
    return sorted((row for b in blocks for row in b.to_pylist()), key=lambda row: row["name"])


def colour_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(np.frombuffer(row["pixels"], np.uint8).reshape(3, 64)[:, 0].tolist())


def write_folder(root: Path) -> Path:
    """Image files in a folder, and files that are none."""
    for inside, colour in (("a", "red"), ("b", "blue")):
        (root / inside).mkdir(parents=True)
        (root / inside / "photo.png").write_bytes(png(colour))
    (root / "_DSC1.JPG").write_bytes(png("white"))  # what a file is, its bytes say
    (root / "broken.jpg").write_bytes(b"\xff\xd8 not much")
    (root / "empty.webp").touch()
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(png("red"))
    return root


def shard(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in names.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path
