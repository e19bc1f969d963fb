"""Lists in the spellings of published releases: their columns are genuine, their rows made up."""

from __future__ import annotations

import json
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


SCORES = {"similarity": 0.25, "pwatermark": 0.125, "punsafe": 0.0625, "aesthetic": 5.5}
SIZE = {"width": 640.0, "height": 480.0}

OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # By release: the format of its files, an invented row, and the values read from it besides url and text.
    "Re-LAION": (
        "parquet",
        {"URL": _url(0), "TEXT": "A boat", "WIDTH": 640, "HEIGHT": 480, **SCORES}
        | {"hash": 7, "key": "000000042", "md5": "00" * 16, "LANGUAGE": "en"},
        {"hash": 7, **SCORES, **SIZE},
    ),
    "COYO": (
        "parquet",
        {"id": 841814333321, "url": _url(0), "text": "A boat", "width": 640, "height": 480}
        | {"image_phash": "d7c3e1a0f18b3c1e", "text_length": 6, "word_count": 2}
        | {"num_tokens_bert": 2, "num_tokens_gpt": 2, "num_faces": 0}
        | {"clip_similarity_vitb32": 0.25, "clip_similarity_vitl14": 0.5}
        | {"nsfw_score_opennsfw2": 0.0625, "nsfw_score_gantman": 0.75}
        | {"watermark_score": 0.125, "aesthetic_score_laion_v2": 5.5},
        SCORES | SIZE,
    ),
    "DataComp": (
        "parquet",
        {"uid": "0" * 32, "url": _url(0), "text": "A boat", "original_width": 640}
        | {"original_height": 480, "clip_b32_similarity_score": 0.25}
        | {"clip_l14_similarity_score": 0.5, "face_bboxes": [[0.1, 0.2, 0.3, 0.4]]}
        | {"sha256": "00" * 32},
        {"similarity": 0.25, **SIZE},
    ),
    "WIT": (
        "tsv",
        {"language": "en", "page_url": "https://en.example.org/wiki/Boat", "image_url": _url(0)}
        | {"page_title": "Boat", "section_title": "", "hierarchical_section_title": "Boat"}
        | {
            "caption_reference_description": "A boat",
            "caption_attribution_description": "English: b",
        }
        | {"caption_alt_text_description": "boat", "mime_type": "image/jpeg"}
        | {"original_height": 480, "original_width": 640, "is_main_image": "true"}
        | {"attribution_passes_lang_id": "true", "page_changed_recently": "false"}
        | {
            "context_page_description": "Boats are",
            "context_section_description": '"Boats\n""are"""',
        },
        SIZE,
    ),
    "RedCaps": (
        "json",
        {"image_id": "abc12", "author": "someone", "url": _url(0), "raw_caption": "A Boat!!"}
        | {"caption": "A boat", "subreddit": "boats", "score": 31, "created_utc": 1483228800}
        | {"permalink": "/r/boats/comments/abc12/a_boat/", "crosspost_parents": None},
        {},
    ),
    "CC3M": ("tsv", {"A boat": _url(0)}, {}),
    "CC12M": ("tsv", {_url(0): "A boat"}, {}),
    "CC12M with names": ("csv", {"image_url": _url(0), "caption": "A boat"}, {}),
}

YFCC = (
    *(
        "line",
        "photoid",
        "photohash",
        "uid",
        "unickname",
        "datetaken",
        "dateuploaded",
        "capturedevice",
    ),
    *("title", "description", "usertags", "machinetags", "longitude", "latitude", "accuracy"),
    *("pageurl", "url", "licensename", "license_url", "serverid", "farmid", "secret"),
    *("secretoriginal", "ext", "marker"),
)
"""The columns of YFCC100M's own files, which have no line with names."""


def write_release(folder: Path, name: str) -> Path:
    """A list of one row as the release `name` is published."""
    kind, row, _ = OTHERS[name]
    file = folder / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    elif kind == "json":
        info = {"description": "made up", "version": "v1.0"}
        file.write_text(json.dumps({"info": info, "annotations": [row]}))
    else:
        between = "\t" if kind == "tsv" else ","
        without_names = name in ("CC3M", "CC12M")
        lines = [[*row], [*row.values()]] if not without_names else [[*row, *row.values()]]
        file.write_text("".join(between.join(map(str, line)) + "\n" for line in lines))
    return file


def write_large_list(file: Path) -> Path:
    """10,000 rows, some of which repeat a URL or have none, with the index that pandas adds."""
    urls = [_url(number % 9_990) if number % 1_000 else None for number in range(10_000)]
    texts = [f"Boat {number}" for number in range(10_000)]
    columns = {"URL": urls, "TEXT": texts, "__index_level_0__": list(range(10_000))}
    pq.write_table(pa.table(columns), file)
    return file
