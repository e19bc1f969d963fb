"""The captions of a run by the key of their image, memory-mapped: written once, read by each worker.

    <run_dir>/captions/keys.i64     of each caption's image, ascending
                       sources.u8   of each caption: its position in `data.captions`
                       offsets.i64  where each text begins, and the end of the last
                       texts.utf8
                       removed.npy  keys of images whose captions were taken down; their texts are erased
                       about.json   counts and sources (run_captions); written last

Captions of an image are in the order of `data.captions`, then of the files. Numbers are little-endian.
A process holds what it reads in the page cache only.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.storage.files import raise_if_full, write_atomically
from pipelines.storage.folders import remove_folder
from pipelines.storage.sorting import ExternalSort, SortFactory
from pipelines.storage.tables import read_json_object
from pipelines.training.caption_join import ImageJoin, isin_sorted
from vlv_model.errors import RunError
from vlv_model.seeds import mix

FOLDER, ABOUT = "captions", "about.json"
_KEYS, _SOURCES, _OFFSETS, _TEXTS = "keys.i64", "sources.u8", "offsets.i64", "texts.utf8"
_REMOVED = "removed.npy"
_ROW = pa.schema([("key", pa.int64()), ("source", pa.uint8()), ("caption", pa.string())])
_LOOKUPS = 1 << 20  # keys looked up at a time


@dataclass(frozen=True)
class CaptionIndex:
    """The captions of a run's images; see the module docstring."""

    folder: Path
    keys: np.ndarray  # int64 [n], ascending
    sources: np.ndarray  # uint8 [n]
    offsets: np.ndarray  # int64 [n + 1]
    texts: np.ndarray  # uint8 [bytes]
    removed: np.ndarray  # int64, ascending

    @classmethod
    def open(cls, folder: Path) -> CaptionIndex:
        """The index in a folder. Raises RunError if it is not complete."""
        if not (folder / ABOUT).is_file():
            raise RunError(f"{folder} holds no captions: run the job again from its start")
        kinds = {_KEYS: "<i8", _SOURCES: "u1", _OFFSETS: "<i8", _TEXTS: "u1"}
        # As plain arrays: each operation on a memmap takes microseconds more.
        arrays = [np.asarray(np.memmap(folder / name, k, "r")) for name, k in kinds.items()]
        removed = folder / _REMOVED
        arrays.append(np.load(removed) if removed.is_file() else np.zeros(0, np.int64))
        return cls(folder, *arrays)

    def about(self) -> dict[str, Any]:
        """The notes that `write` made."""
        return read_json_object(self.folder / ABOUT)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Mask bool `[n]` of the images, by their keys int64 `[n]`, that have a caption."""
        return isin_sorted(keys, self.keys) & ~isin_sorted(keys, self.removed)

    def without(self, keys: np.ndarray) -> np.ndarray:
        """Keys, int64 `[m]`, of this index that are not among `keys`, int64 `[n]` ascending."""
        found = []
        for start in range(0, len(self.keys), _LOOKUPS):
            piece = np.unique(self.keys[start : start + _LOOKUPS])
            found.append(piece[~isin_sorted(piece, keys)])
        return np.unique(np.concatenate(found))

    def draw(
        self, keys: Sequence[int], epochs: Sequence[int], seed: int, weights: Sequence[float]
    ) -> list[str]:
        """One caption of each image, drawn by (`seed`, its epoch, its key); in epoch -1 the first.

        The source is drawn by `weights` (of each source) among those that have captions of the image,
        then one of its captions, each as likely.
        """
        wanted = np.array(keys, np.int64)
        firsts, lasts = (np.searchsorted(self.keys, wanted, side) for side in ("left", "right"))
        if len(missing := wanted[firsts == lasts]):
            raise RunError(f"{self.folder} has no caption of key {missing[0]}")
        places = zip(firsts.tolist(), lasts.tolist(), strict=True)
        return [
            self._text(first + self._drawn(first, last, key, epoch, seed, weights))
            for (first, last), key, epoch in zip(places, keys, epochs, strict=True)
        ]

    def first(self, keys: Sequence[int]) -> list[str]:
        """The first caption of each image, which evaluation and samples use."""
        return self.draw(keys, [-1] * len(keys), 0, ())

    def _drawn(
        self, first: int, last: int, key: int, epoch: int, seed: int, weights: Sequence[float]
    ) -> int:
        """The position, from `first`, of the caption that is drawn of those from `first` to `last`."""
        if epoch < 0 or last == first + 1:
            return 0
        high, low = divmod(mix(seed, epoch, key), 2**32)
        sources = self.sources[first:last]
        if sources[0] == sources[-1]:
            return low * len(sources) >> 32
        present = np.unique(sources)
        ends = np.cumsum(np.array(weights, np.float64)[present])
        source = present[np.searchsorted(ends, high / 2**32 * ends[-1], "right")]
        begin, end = (int(np.searchsorted(sources, source, side)) for side in ("left", "right"))
        return begin + (low * (end - begin) >> 32)

    def _text(self, position: int) -> str:
        start, stop = self.offsets[position : position + 2]
        return self.texts[start:stop].tobytes().decode()

    def remove(self, keys: np.ndarray) -> CaptionIndex:
        """Remove the captions of some images, int64 `[n]`, and erase their texts; returns the index.

        May be called again where it was killed.
        """
        keys = np.intersect1d(keys, self.keys)
        if not len(np.setdiff1d(keys, self.removed)):
            return self
        content = io.BytesIO()
        np.save(content, np.union1d(self.removed, keys))
        texts = np.memmap(self.folder / _TEXTS, "u1", "r+")
        first, last = (np.searchsorted(self.keys, keys, side) for side in ("left", "right"))
        for start, stop in zip(self.offsets[first], self.offsets[last], strict=True):
            texts[start:stop] = ord(" ")
        texts.flush()
        write_atomically(self.folder / _REMOVED, content.getvalue())
        return CaptionIndex.open(self.folder)


Captions = tuple[ImageJoin, Callable[[Counter[str]], Iterable[pa.Table]]]
"""A source: how its values find images, and its batches (`captions.CaptionSource.batches`)."""


def write_index(
    folder: Path,
    sources: Sequence[Captions],
    input_bytes: int,
    notes: Callable[[Counter[str]], dict[str, Any]],
    sorting: SortFactory = ExternalSort,
) -> CaptionIndex:
    """Write the captions of `sources` that have an image, and last the `notes` of the counts.

    `notes` may raise an error instead. The counts are `captions`, `images` with a caption, of these
    `images_with_several_captions`, `captions_without_image`, `ambiguous_names`, `blank_captions`,
    `captions_cleaned` and `captions_cut`. `input_bytes`, the size of the sources, divides the work.
    """
    remove_folder(folder)
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    rows = sorting(_ROW, input_bytes)
    for number, (join, batches) in enumerate(sources):
        for batch in batches(counts):
            positions, keys, ambiguous = join.find(batch["value"])
            matched = len(np.unique(positions))
            counts["captions_without_image"] += len(batch) - matched - ambiguous
            counts["ambiguous_names"] += ambiguous
            texts = batch["caption"].take(pa.array(positions))
            source = np.full(len(keys), number, np.uint8)
            rows.add(pa.table([pa.array(keys), pa.array(source), texts], schema=_ROW))
    try:
        with ExitStack() as stack:
            names = (_KEYS, _SOURCES, _OFFSETS, _TEXTS)
            files = [stack.enter_context((folder / name).open("wb")) for name in names]
            keys_file, sources_file, offsets_file, texts_file = files
            written = 0
            offsets_file.write(np.zeros(1, "<i8").tobytes())
            for bucket in rows.sorted():
                keys = bucket["key"].to_numpy()
                firsts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else keys
                counts["captions"] += len(keys)
                counts["images"] += len(firsts)
                several = np.diff(np.r_[firsts, len(keys)]) > 1
                counts["images_with_several_captions"] += int(several.sum())
                keys_file.write(keys.astype("<i8").tobytes())
                sources_file.write(bucket["source"].to_numpy().tobytes())
                for texts in bucket["caption"].chunks:
                    ends, content = _packed(texts)
                    offsets_file.write((ends + written).astype("<i8").tobytes())
                    texts_file.write(content)
                    written += len(content)
    except OSError as error:
        raise_if_full(error, folder)
        raise
    finally:
        rows.remove()
    write_atomically(folder / ABOUT, json.dumps(notes(counts), indent=1))
    return CaptionIndex.open(folder)


def _packed(texts: pa.Array) -> tuple[np.ndarray, bytes]:
    """Where each text ends, int64 `[n]`, in the bytes of all of them."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    if not len(texts) or content is None:
        return np.zeros(len(texts), np.int64), b""
    packed = content.slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes()
    return ends[1:].astype(np.int64) - int(ends[0]), packed
