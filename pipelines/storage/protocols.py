"""Which paths are URLs of an object store."""

from pathlib import Path

PROTOCOLS = ("s3", "gs", "hf")
"""Of the URLs that tables and lists may lie at; gs needs gcsfs to be installed."""


def is_url(path: str | Path) -> bool:
    """True for `s3://…` and the like."""
    return "://" in str(path)
