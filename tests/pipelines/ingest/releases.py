"""Lists in the spellings of published releases: their columns are genuine, their rows made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ALIKE = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"]

SCHEMAS: dict[str, list[str]] = {
    "improved_aesthetics": [*_ALIKE, "AESTHETIC_SCORE", "__index_level_0__"],
    "laion-art": [*_ALIKE, "LANGUAGE", "aesthetic"],
    "laion2B-en-aesthetic": [*_ALIKE, "aesthetic"],
}
"""Columns of releases that have every score."""

_TALL = {"WIDTH": 640, "HEIGHT": 960}
_SMALL = {"width": 384, "height": 256, "original_width": 440, "original_height": 293}
_SCORES = {"similarity": 0.33125, "punsafe": 8.5e-06, "pwatermark": 0.0625}
_FETCHED = {"key": "000000042", "status": "success", "error_message": None, "exif": "{}"}
_OLD = {"NSFW": "UNLIKELY", "LICENSE": "?", "similarity": 0.33125}


def _url(number: int) -> str:
    return f"https://pictures.example.org/{number}/boat.jpg?w=640"


ROWS: list[dict[str, Any]] = [
    # improved_aesthetics: sizes are floats
    {"URL": _url(0), "TEXT": "A boat", "WIDTH": 640.0, "HEIGHT": 960.0, **_SCORES}
    | {"AESTHETIC_SCORE": 5.25, "hash": 2**62 + 1, "__index_level_0__": 7},
    # laion-art
    {"URL": _url(1), "TEXT": "Ein Boot", **_TALL, **_SCORES}
    | {"LANGUAGE": "nolang", "hash": -(2**62) - 1, "aesthetic": 8.125},
    # laion2B-multi as copied with columns in lower case: ids as floats, no scores of beauty
    {"sample_id": 1000000000042.0, "url": _url(2), "text": "Лодка", "width": 204, "height": 114}
    | {**_SCORES, "hash": -(2**63) + 1, "image_suffix": "jpg", "license": "?"}
    | {"nsfw": "UNLIKELY", "aesthetic_score": None, "language": "ru"},
    # what img2dataset writes beside each picture, with the sizes before and after
    {**_SCORES, "hash": 2**63 - 1, "aesthetic": 7.5, "caption": "A boat", "url": _url(3)}
    | {**_FETCHED, **_SMALL, "sha256": "00" * 32},
    {**_SCORES, "hash": 1, "caption": "Two boats", "url": _url(4)}
    | {**_FETCHED, **_SMALL, "md5": "00" * 16},
    # LAION-400M and its time: no scores but similarity
    {"image_path": "000000042", "caption": "A boat", **_OLD, "url": _url(5)}
    | {**_FETCHED, **_SMALL, "md5": "00" * 16},
    {"SAMPLE_ID": 1000000000042, "URL": _url(6), "TEXT": "배", **_TALL, "LANGUAGE": "ko", **_OLD},
    {**_OLD, "caption": "A boat", **_FETCHED, **_SMALL, "url": _url(7), "md5": "00" * 16},
]


def write_large_list(file: Path) -> Path:
    """10,000 rows, some of which repeat a URL or have none, with the index that pandas adds."""
    urls = [_url(number % 9_990) if number % 1_000 else None for number in range(10_000)]
    texts = [f"Boat {number}" for number in range(10_000)]
    columns = {"URL": urls, "TEXT": texts, "__index_level_0__": list(range(10_000))}
    pq.write_table(pa.table(columns), file)
    return file
