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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.storage import write_parquet
from pipelines.tiny_world import scenes
from pipelines.tiny_world.server import HOSTILE
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


def write_photos(
    folder: str | Path,
    base_url: str,
    photos: str | Path,
    seed: int = 0,
    num_broken: int = 0,
) -> WorldFiles:
    """The same from a folder of the user's photographs (jpg, png, webp; also in subfolders).

    Captions come from `index.jsonl` beside them (lines of `{"file": …, "captions": [...]}`, the
    first caption counts); a photograph without one is captioned by the words of its file name.
    Raises DataError for a folder without photographs or an index that cannot be read.
    """
    photos, folder = Path(photos), Path(folder)
    found = sorted(p for p in photos.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
    if not found:
        raise DataError(f"{photos} holds no photographs: expected jpg, png or webp files in it")
    known = _read_index(photos / "index.jsonl")
    files, sizes, captions = [], [], []
    for photo in found:
        name = photo.relative_to(photos).as_posix()
        file = f"images/{name.removeprefix('images/')}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, folder / file)
        files.append(file)
        sizes.append(_size(photo))
        captions.append(known.get(name) or " ".join(photo.stem.replace("_", "-").split("-")))
    return _write_tables(folder, base_url, files, sizes, captions, num_broken, seed)


def _read_index(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {line["file"]: line["captions"][0] for line in lines if line["captions"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{file}: expected lines of {{"file": …, "captions": […]}} ({error!r})'
        ) from None


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
    good = [f"{base_url}/{quote(file)}" for file in files]
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
