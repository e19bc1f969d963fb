"""Writes the tiny world as image files, LAION-like metadata, and a teacher's captions.

    world/
      images/scene-000000.png …      files of the web server
      metadata.parquet               URL TEXT WIDTH HEIGHT similarity hash pwatermark punsafe aesthetic
      teacher.parquet                url, caption

TEXT is as vague as alt texts on the web and never the caption: only the teacher's table, which stage 2
joins, has captions. The scores are synthetic.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.storage.parquet import write_parquet
from pipelines.tiny_world import scenes
from pipelines.tiny_world.server import HOSTILE, quote_path
from vlv_model.errors import DataError
from vlv_model.seeds import mix

ALT_TEXTS = ("photo", "untitled", "image", "Click to enlarge", "", "thumbnail", "IMG_{:04d}")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class WorldFiles:
    """Paths of a written world, and the numbers of good and broken URLs in its metadata."""

    images: Path
    metadata: Path
    teacher: Path
    num_images: int
    num_broken: int


def write_world(
    folder: str | Path,
    base_url: str,
    num_scenes: int,
    seed: int = 0,
    split: scenes.Split = "train",
    num_broken: int = 0,
) -> WorldFiles:
    """Draw `num_scenes` scenes of a split into `folder`, for a web server.

    `base_url` is the URL of `folder`, which may be below the server's root, so several worlds can share a
    server. `num_broken` URLs of the server's `HOSTILE` answers are added. The same arguments write
    byte-identical files, so a rerun of a job finds its input unchanged.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files, captions = [], []
    for i, scene in enumerate(scenes.sample(seed, num_scenes, split)):
        file = f"images/scene-{split}-{seed}-{i:06d}.png"
        scenes.draw(scene, drawing_seed(seed, split, i)).save(folder / file)
        files.append(file)
        captions.append(scenes.caption(scene))
    sizes = [(scenes.SIDE, scenes.SIDE)] * num_scenes
    return _write_tables(folder, base_url, files, sizes, captions, num_broken, seed)


def drawing_seed(seed: int, split: scenes.Split, index: int) -> int:
    """Seed of the drawing of the `index`-th sampled scene, different for every split and seed."""
    mixed = mix(seed, scenes.SPLITS.index(split), index)
    return (mixed % 2**32) << 32 | mixed >> 32


def find_photos(folder: str | Path) -> list[Path]:
    """The photographs in a folder and its subfolders: jpg, png and webp files, sorted.

    Raises DataError if the folder does not exist or has no photographs.
    """
    if not os.path.isdir(folder):  # False for invalid names, for which Path raises
        is_file = os.path.exists(folder)
        raise DataError(
            f"photos={str(folder)[:200]} {'is a file' if is_file else 'does not exist'}: "
            "expected a folder of jpg, png or webp files"
        )
    found = (p for p in Path(folder).rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
    if not (photos := sorted(p for p in found if p.is_file())):
        raise DataError(f"photos={folder} holds no photographs: expected jpg, png or webp files")
    return photos


def write_photos(
    folder: str | Path,
    base_url: str,
    photos: str | Path,
    seed: int = 0,
    num_broken: int = 0,
) -> WorldFiles:
    """Write a world from a folder of photographs (`find_photos`).

    Photographs keep their paths below `images/`. Captions come from `index.jsonl` in the folder, lines of
    `{"file": …, "captions": [...]}` of which the first caption is used; otherwise from the words of the
    file name. Raises DataError for a folder without photographs, a photograph that cannot be copied, and
    an index that cannot be read.
    """
    photos, folder = Path(photos), Path(folder)
    found = find_photos(photos)
    indexed = _read_index(photos / "index.jsonl")
    files, sizes, captions = [], [], []
    for photo in found:
        name = photo.relative_to(photos).as_posix()
        file = f"images/{name}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(photo, folder / file)
        except OSError as error:
            raise DataError(f"{photo} cannot be copied: {error.strerror}") from None
        files.append(file)
        sizes.append(_size(photo))
        captions.append(indexed.get(name) or _words(photo.stem))
    return _write_tables(folder, base_url, files, sizes, captions, num_broken, seed)


def _words(stem: str) -> str:
    """The words of a file name; bytes that are not UTF-8 become U+FFFD."""
    return " ".join(os.fsencode(stem).decode(errors="replace").replace("_", "-").split("-"))


def _read_index(file: Path) -> dict[str, str]:
    """The first caption of each photograph in the index, by its path in the folder."""
    if not file.exists():
        return {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    captions = {}
    for number, line in enumerate(lines, 1):
        try:
            match json.loads(line or "null"):
                case {"file": str(name), "captions": [str(caption), *_]}:
                    caption.encode()  # raises for a lone surrogate, which is not valid text
                    captions[name] = caption
                case None | {"file": str(), "captions": []}:
                    pass
                case _:
                    raise ValueError("expected a path and a list of texts")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f'{file} line {number} is not {{"file": …, "captions": […]}}: {str(error)[:120]}'
            ) from None
    return captions


def _size(photo: Path) -> tuple[int, int]:
    """Width and height from the header; 0x0 if unreadable, like wrong metadata on the web."""
    try:
        with Image.open(photo) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0, 0


def _write_tables(
    folder: Path,
    base_url: str,
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    captions: Sequence[str],
    num_broken: int,
    seed: int,
) -> WorldFiles:
    rng = np.random.default_rng([seed, 1])
    names = list(HOSTILE)
    # The query makes hostile URLs unique: repeated URLs would count once.
    root = urljoin(base_url, "/hostile/")
    broken = [f"{root}{names[i % len(names)]}?{i}" for i in range(num_broken)]
    good = [f"{base_url}/{quote_path(file)}" for file in files]
    urls = [*good, *broken]
    wide, high = zip(*sizes, *([(scenes.SIDE, scenes.SIDE)] * num_broken), strict=True)
    n = len(urls)
    order = pa.array(rng.permutation(n))
    metadata = pa.table(
        {
            "URL": urls,
            "TEXT": [ALT_TEXTS[k].format(i) for i, k in enumerate(rng.integers(7, size=n))],
            "WIDTH": pa.array(wide, pa.int32()),
            "HEIGHT": pa.array(high, pa.int32()),
            "similarity": rng.uniform(0.28, 0.4, n),
            "hash": rng.integers(-(2**63), 2**63 - 1, size=n),
            "pwatermark": pa.array(rng.uniform(0, 0.4, n), pa.float32()),
            "punsafe": pa.array(rng.uniform(0, 0.2, n), pa.float32()),
            "aesthetic": pa.array(rng.uniform(6, 8, n), pa.float32()),
        }
    ).take(order)
    write_parquet(folder / "metadata.parquet", metadata)
    write_parquet(folder / "teacher.parquet", pa.table({"url": good, "caption": list(captions)}))
    return WorldFiles(
        folder / "images",
        folder / "metadata.parquet",
        folder / "teacher.parquet",
        len(good),
        num_broken,
    )
