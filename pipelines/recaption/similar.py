"""Captions that say nearly the same of different images, found in bounded memory.

A caption's signature are 16 minimal hashes of its pairs of neighbouring words (MinHash, Broder
1997): the share of them in which two signatures agree estimates the share of pairs that the two
captions have in common. Captions that agree in one of four bands of the signature are sorted to
one another on disk, and count as similar where they agree in 13 of 16 (about four fifths of their
pairs). That finds 88 % of captions with four fifths in common and 99 % of those with nine tenths.
Groups are of one whole signature: equal captions and hardly different ones, and none is in two.
"""

from __future__ import annotations

import heapq
import zlib
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines.recaption.health import words
from pipelines.storage.sorting import ExternalSort

HASHES, BANDS = 16, 4
AGREEING = 13  # hashes of two similar captions
_SHOWN = 20  # groups that are remembered
_DRAWN = np.random.default_rng(20260101)
_FACTORS = _DRAWN.integers(1, 2**63, (HASHES, 1), np.uint64) | np.uint64(1)
_SHIFTS = _DRAWN.integers(0, 2**63, (HASHES, 1), np.uint64)
_WHOLE = _DRAWN.integers(0, 2**63, HASHES // 2, np.uint64) | np.uint64(1)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93],
                np.uint64)  # fmt: skip

_ROW = pa.schema([("key", pa.int64()), ("row", pa.int64()), ("signature", pa.binary(4 * HASHES))])
"""`key` is a band's hash, `row` the number of the caption."""
_ROW_BYTES = 8 + 8 + 4 * HASHES


def signature(caption: str) -> np.ndarray:
    """The signature uint32 `[16]` of a caption that has a word."""
    said = words(caption)
    pairs = [f"{a} {b}" for a, b in pairwise(said)] or said
    hashes = np.array([zlib.crc32(pair.encode()) for pair in pairs], np.uint64)
    return ((hashes * _FACTORS + _SHIFTS) >> np.uint64(32)).min(axis=1).astype(np.uint32)


class SimilarCaptions:
    """Takes signatures in, tells how many captions are similar to an earlier one."""

    def __init__(self, captions: int) -> None:
        """`captions`, about how many there will be, sets what is sorted at a time."""
        self._buckets = ExternalSort(_ROW, captions * BANDS * _ROW_BYTES)

    def add(self, rows: np.ndarray, signatures: np.ndarray) -> None:
        """Take in captions by their numbers int64 `[n]` and signatures uint32 `[n 16]`."""
        if not len(rows):
            return
        numbers = pa.array(rows, pa.int64())
        stored = pa.FixedSizeBinaryArray.from_buffers(
            _ROW.field("signature").type,
            len(rows),
            [None, pa.py_buffer(np.ascontiguousarray(signatures, np.uint32))],
        )
        for number, band in enumerate(np.split(signatures.astype(np.uint64), BANDS, axis=1)):
            mixed = (band * _MIX).sum(axis=1) + np.uint64(number)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[1]
            self._buckets.add(pa.table([mixed.view(np.int64), numbers, stored], schema=_ROW))

    def count(self, rows: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Mask bool `[rows]` of captions that are similar to one of a smaller number, and (how many,
        number of the first) of the largest groups of one signature. All numbers are below `rows`.
        Ends adding, and deletes what lay on disk.
        """
        is_later = np.zeros(rows, bool)
        groups: dict[int, int] = {}
        for bucket in self._buckets.sorted():
            band, numbers, signatures = _sorted(bucket)
            is_later[numbers[_later(band, signatures)]] = True
            # Equal ones share every band: each band of theirs tells their number anew.
            same = (signatures.view(np.uint64) * _WHOLE).sum(axis=1) ^ band.view(np.uint64)
            _, first, sizes = np.unique(same, return_index=True, return_counts=True)
            several = sizes > 1
            groups.update(
                zip(numbers[first[several]].tolist(), sizes[several].tolist(), strict=True)
            )
            groups = dict(heapq.nsmallest(_SHOWN, groups.items(), key=_largest_first))
        self._buckets.remove()
        largest = sorted(groups.items(), key=_largest_first)
        return is_later, [(size, of) for of, size in largest]


def _largest_first(group: tuple[int, int]) -> tuple[int, int]:
    of, size = group
    return -size, of


def _sorted(bucket: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bands, numbers and signatures of captions, by band and number."""
    count = bucket.num_rows
    band, number = bucket["key"].to_numpy(), bucket["row"].to_numpy()
    stored = b"".join(bucket["signature"].to_pylist())
    order = np.lexsort((number, band))
    return (
        band[order],
        number[order],
        np.frombuffer(stored, np.uint32).reshape(count, HASHES)[order],
    )


def _later(band: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """Whether captions are similar to the first one of their band or to the one before."""
    count = len(band)
    begins = np.ones(count, bool)
    begins[1:] = band[1:] != band[:-1]
    places = np.arange(count)
    first = np.maximum.accumulate(np.where(begins, places, 0))
    before = np.where(begins, places, places - 1)
    agreeing = [(signatures == signatures[other]).sum(axis=1) for other in (first, before)]
    similar: np.ndarray = (np.maximum(*agreeing) >= AGREEING) & ~begins
    return similar
