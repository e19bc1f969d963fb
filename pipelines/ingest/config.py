"""Settings of ingest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipelines.cli.config import InputPathOrUrl, OutputPathOrUrl, dump
from pipelines.execution.connection import RayConfig
from pipelines.images.rows import DECODE, DOWNLOAD, status
from pipelines.ingest.duplicates import DuplicateConfig
from pipelines.ingest.web.answers import FAILURE_CLASSES, TRANSIENT
from pipelines.ingest.web.config import DownloadConfig
from pipelines.lists.filters import FilterConfig
from pipelines.pictures import decode
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.fingerprints import content_fingerprint
from vlv_model.config import Config

# What may be retried, by the name that a user gives, and the statuses that it stands for.
_RETRIED = {
    **{name: [status(DOWNLOAD, name)] for name in FAILURE_CLASSES},
    **{f"{DECODE}:{name}": [status(DECODE, name)] for name in decode.FAILURE_CLASSES},
    "transient": sorted(status(DOWNLOAD, name) for name in TRANSIENT),
}


class IngestData(Config):
    """What is read, and where the table goes."""

    input: InputPathOrUrl = Field(
        description="list of URLs: a Parquet, CSV, TSV, JSONL or JSON file, a folder of them, or a glob"
    )
    output: OutputPathOrUrl = Field(description="folder of the image table")
    columns: dict[str, str | None] = Field(
        {},
        description="spellings of columns that are not known: {their name: our name}; "
        "{their name: none} leaves a column out",
    )


class IngestConfig(Config):
    """All settings of the ingest job."""

    data: IngestData
    filter: FilterConfig = FilterConfig()
    download: DownloadConfig = DownloadConfig()
    image: ImageConfig = ImageConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    retry: tuple[str, ...] = Field(
        (),
        description="classes of failed rows of the table that are tried again, such as "
        "timeout,http_5xx; transient: those that another attempt may mend",
    )
    dry_run: bool = Field(
        False, description="only say what would be dropped, fetched and marked, and what it takes"
    )
    rows_per_chunk: int | None = Field(
        None,
        ge=1,
        description="rows that are committed together, as one file; default: files of 64 MB, of a "
        "short list smaller ones",
    )
    ray: RayConfig = RayConfig()

    @field_validator("retry")
    @classmethod
    def _known_classes(cls, retry: tuple[str, ...]) -> tuple[str, ...]:
        for name in retry:
            if name not in _RETRIED:
                raise ValueError(f"'{name}': expected some of {', '.join(_RETRIED)}")
        return retry

    def identity(self) -> dict[str, Any]:
        """The settings that every run of a table shares: how an image is stored."""
        values = dump(self)["image"]
        return {f"image.{name}": v for name, v in values.items() if name != "decode_timeout"}

    def run_settings(self, files: list[Path]) -> dict[str, Any]:
        """The settings that tell one run of the list `files` from the next; how fast it is done is
        no part of them."""
        values = dump(self)
        return {
            "data.input": content_fingerprint(files),
            "data.columns": values["data"]["columns"],
            "retry": values["retry"],
            **{f"filter.{name}": value for name, value in values["filter"].items()},
            **{f"duplicates.{name}": value for name, value in values["duplicates"].items()},
            "download.max_bytes": self.download.max_bytes,
            "download.respect_optout": self.download.respect_optout,
        }

    def retried(self) -> frozenset[str]:
        """The statuses behind `retry`."""
        return frozenset(state for name in self.retry for state in _RETRIED[name])
