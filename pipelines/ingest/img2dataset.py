"""What img2dataset writes beside its images: a Parquet file per shard with a row for every URL.

    00012.tar, or the folder 00012/    the images that it got
    00012.parquet                      url, caption, … of all rows; key, status, error_message

Its failures are texts of Python's urllib and of its resizer; they become our statuses, so that a later run
with the list of URLs retries them by class. Source: img2dataset 1.47, downloader.py and resizer.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from pipelines.images.rows import DECODE, DOWNLOAD, FILTERED, status
from pipelines.ingest.web.failures import FailureClass, http_class

COLUMNS = frozenset(["url", "key", "status", "error_message"])
_FAILED = ("failed_to_download", "failed_to_resize")
STATUS_COLUMNS = ["status", "error_message"]

_HTTP = re.compile(r"HTTP Error (\d{3})")
# In this order: a text about TLS may also name a reset connection, or a time-out.
_DOWNLOADS: tuple[tuple[FailureClass, str], ...] = (
    ("opted_out", r"X-Robots-Tag"),
    ("redirects", r"infinite loop|redirection to url"),
    ("tls", r"\bssl\b|certificate|tlsv1|wrong version number|violation of protocol"),
    ("timeout", r"timed out|timeout"),
    (
        "dns",
        r"name or service not known|name resolution|no address associated|getaddrinfo|nodename",
    ),
    (
        "refused",
        r"refused|reset by peer|closed connection|broken pipe|unreachable|no route to host|"
        r"incompleteread|connection aborted|errno 99\b",
    ),
    (
        "bad_url",
        r"unknown url type|no host given|control characters|nonnumeric port|invalid ipv6|invalid port|"
        r"codec can't encode|codec failed|label (?:empty|too long)|netloc|can't be a url",
    ),
    ("protocol", r"badstatusline|\bline longer than|got more than \d+ headers|unknown protocol"),
)
_RESIZES = {
    "image decoding error": status(DECODE, "not_an_image"),
    "image too small": status(FILTERED, "short_side"),
    "image area too large": status(DECODE, "too_large"),
    "aspect ratio too large": status(FILTERED, "aspect_ratio"),
}


def is_metadata(schema: pa.Schema) -> bool:
    """Whether a Parquet file has the columns of img2dataset's metadata."""
    return COLUMNS.issubset(schema.names)


def has_states(schema: pa.Schema) -> bool:
    """Whether rows have a status and an error as img2dataset writes them."""
    return set(schema.names).issuperset(STATUS_COLUMNS)


def status_of(state: str | None, error: str | None) -> str | None:
    """Our status of a row of img2dataset that failed; None for any other row."""
    if state not in _FAILED:
        return None
    text = (error or "").lower()
    if state == "failed_to_resize":
        return _RESIZES.get(text.strip(), status(DECODE, "corrupt"))
    if (code := _HTTP.search(error or "")) and "infinite loop" not in text:
        return status(DOWNLOAD, http_class(int(code[1])))
    for kind, pattern in _DOWNLOADS:
        if re.search(pattern, text, re.IGNORECASE):
            return status(DOWNLOAD, kind)
    return status(DOWNLOAD, "other")


def metadata_beside(images: Path) -> Path:
    """Where the metadata of a shard, or of a folder of image files, lie."""
    return images.with_name(f"{images.name.removesuffix('.tar')}.parquet")
