"""The tiny world as a user's data: image files, LAION-like metadata, and a teacher's captions.

    world/
      images/scene-000000.png …      what a server serves
      metadata.parquet               URL TEXT WIDTH HEIGHT similarity hash pwatermark punsafe aesthetic
      teacher.parquet                url, caption

TEXT is as vague as the web's alt texts are and never the caption: only the teacher's table, which
stage 2 joins, holds captions. The scores are synthetic.
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

ALT_TEXTS = ("photo", "untitled", "image", "Click to enlarge", "", "thumbnail", "IMG_{:04d}")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class WorldFiles:
    """Where a written world lies, and how many URLs of each sort its metadata list."""

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
    """Draw `num_scenes` scenes of a split into `folder`, as a web server at `base_url` shows them.

    `base_url` is the URL of `folder` itself, which may be below the server's root: the worlds of
    several splits, each in a folder of its own, can share one server. `num_broken` URLs of the
    server's `HOSTILE` answers are mixed in, in turn. The same arguments write the same files,
    byte by byte, so a rerun of a job finds its input unchanged.
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
    """Seed of the drawing of the `index`-th sampled scene; apart for every split and seed."""
    words = np.random.SeedSequence([seed, scenes.SPLITS.index(split), index]).generate_state(2)
    return int(words[0]) << 32 | int(words[1])


def find_photos(folder: str | Path) -> list[Path]:
    """The user's photographs in a folder and those below it: jpg, png and webp files, sorted.

    Raises DataError where there is no such folder, or no photograph in it.
    """
    if not os.path.isdir(folder):  # False for names that no file can have, where Path raises
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
    """The same from a folder of the user's photographs, see `find_photos`.

    They keep their paths, below `images/`. Captions come from `index.jsonl` beside them (lines of
    `{"file": …, "captions": [...]}`, the first caption counts); a photograph without one is
    captioned by the words of its file name. Raises DataError for a folder without photographs, a
    photograph that cannot be copied, and an index that cannot be read.
    """
    photos, folder = Path(photos), Path(folder)
    found = find_photos(photos)
    known = _read_index(photos / "index.jsonl")
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
        captions.append(known.get(name) or _words(photo.stem))
    return _write_tables(folder, base_url, files, sizes, captions, num_broken, seed)


def _words(stem: str) -> str:
    """What the name of a photograph says; bytes of it that are not UTF-8 become U+FFFD."""
    return " ".join(os.fsencode(stem).decode(errors="replace").replace("_", "-").split("-"))


def _read_index(file: Path) -> dict[str, str]:
    """The first caption of each photograph that the index names, by its path in the folder."""
    if not file.exists():
        return {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    known = {}
    for number, line in enumerate(lines, 1):
        try:
            match json.loads(line or "null"):
                case {"file": str(name), "captions": [str(caption), *_]}:
                    caption.encode()  # raises for a lone surrogate, which is no text
                    known[name] = caption
                case None | {"file": str(), "captions": []}:
                    pass
                case _:
                    raise ValueError("a path and a list of texts are expected")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f'{file} line {number} is not {{"file": …, "captions": […]}}: {str(error)[:120]}'
            ) from None
    return known


def _size(photo: Path) -> tuple[int, int]:
    """Width and height by the header; 0x0 where it has none: the web's metadata err too."""
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
    # The query keeps hostile URLs apart: repeated ones would count once.
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
