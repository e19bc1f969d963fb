"""Which paths are URLs of an object store."""

from pathlib import Path

PROTOCOLS = ("s3", "gs", "hf")
"""URL schemes at which tables and lists may lie; `gs` needs gcsfs."""


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL (`s3://…`)."""
    return "://" in str(path)
