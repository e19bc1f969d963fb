"""Bands of hashes, by which similar rows meet without comparing all pairs.

A hash is cut into bands. Two hashes that differ in at most d places agree in at least one of d + 1 bands.
So rows are sorted on disk by each of their bands (`add_by_band`), and only rows with an equal band, which
are then neighbours, are compared.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa

from pipelines.storage.sorting import ExternalSort, spread_keys

_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93],
                np.uint64)  # fmt: skip


def bands_of_bits(hashes: np.ndarray, count: int) -> np.ndarray:
    """The bands, uint64 `[n count]`, of hashes of 64 bits `[n]`; `count` is at most 16."""
    edges = np.linspace(0, 64, count + 1).astype(int)
    bands = np.empty((len(hashes), count), np.uint64)
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        bits = hashes.view(np.uint64) >> np.uint64(start)
        bands[:, number] = bits & np.uint64(2 ** int(end - start) - 1)
    return bands


def bands_of_numbers(hashes: np.ndarray, count: int) -> np.ndarray:
    """The bands, uint64 `[n count]`, of hashes of 4 · `count` numbers, uint32 `[n 4·count]`.

    Each is a hash of its four numbers, so different ones may coincide, with a probability of 2**-64.
    """
    mixed = (hashes.reshape(len(hashes), count, 4).astype(np.uint64) * _MIX).sum(axis=2)
    mixed ^= mixed >> np.uint64(29)
    return mixed


def add_by_band(sorter: ExternalSort, bands: np.ndarray, rows: pa.Table) -> None:
    """Add rows `[n]` without a `key` to a sorter, once for each of their bands, uint64 `[n b]`.

    Bands of different numbers do not meet if they have at most 60 bits.
    """
    for number, band in enumerate(bands.T):
        keys = spread_keys(band ^ np.uint64(number << 60))
        sorter.add(rows.add_column(0, "key", pa.array(keys)))


def begins_group(keys: np.ndarray) -> np.ndarray:
    """Mask, bool `[n]`, of sorted rows whose band differs from that of the row before."""
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    return begins
