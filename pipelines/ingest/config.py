"""Settings of ingest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from pipelines.cli.config import InputPathOrUrl, OutputPathOrUrl, dump
from pipelines.execution.connection import RayConfig
from pipelines.images.rows import DECODE, DOWNLOAD, status
from pipelines.ingest.duplicates import DuplicateConfig
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.failures import FAILURE_CLASSES, TRANSIENT
from pipelines.ingest.web.optout import recorded_rules
from pipelines.lists.filters import FilterConfig
from pipelines.pictures import decode
from pipelines.pictures.encode import ImageConfig
from pipelines.pictures.formats import Encoding
from vlv_model.config import Config

READ_FAILURES = ("shard", "unreadable", "no_image", "outside")
"""Failures of images that are there (pipelines.images.external), after `decode:`."""

RULES_SETTING = "download.respect_optout"

_DECODE_CLASSES = (*decode.FAILURE_CLASSES, *READ_FAILURES)

RETRY_STATUSES = {
    **{name: [status(DOWNLOAD, name)] for name in FAILURE_CLASSES},
    **{f"{DECODE}:{name}": [status(DECODE, name)] for name in _DECODE_CLASSES},
    "transient": sorted(status(DOWNLOAD, name) for name in TRANSIENT),
    "all": [
        *(status(DOWNLOAD, name) for name in FAILURE_CLASSES),
        *(status(DECODE, name) for name in _DECODE_CLASSES),
    ],
}
"""The names that `retry` accepts, and the statuses that each stands for."""


class IngestData(Config):
    """The list of URLs, or the images, and the image table."""

    input: InputPathOrUrl = Field(
        description="list of URLs: a Parquet, CSV, TSV, JSONL or JSON file, a folder of them, or a glob; or "
        "images, which are read without the network: a folder of image files, .tar shards (WebDataset, "
        "img2dataset), Parquet with an image column (bytes, or Hugging Face's struct)"
    )
    image_column: str | None = Field(
        None, description="image column of Parquet; default: the only possible one"
    )
    image_encoding: Encoding = Field(
        "file",
        description="of images that are there. file: JPEG, PNG and other image files; chw, hwc: raw uint8 "
        "arrays of 3·s·s or s·s·3 bytes; npy: NumPy files",
    )
    output: OutputPathOrUrl = Field(description="folder of the image table")
    columns: dict[str, str | None] = Field(
        {},
        description="columns with other names: {name in the list: name in the table}; "
        "{name in the list: none} drops a column",
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
        description="failure classes whose rows are retried, such as timeout,http_5xx; transient: "
        "all classes for which a retry may succeed; all: every class",
    )
    dry_run: bool = Field(
        False,
        description="only print how many rows would be dropped, fetched and marked, and an estimate "
        "of disk and time",
    )
    rows_per_chunk: int | None = Field(
        None,
        ge=1,
        description="rows committed together, as one file; default: files of 64 MB, smaller for a "
        "short list",
    )
    ray: RayConfig = RayConfig()

    @field_validator("retry")
    @classmethod
    def _known_classes(cls, retry: tuple[str, ...]) -> tuple[str, ...]:
        for name in retry:
            if name not in RETRY_STATUSES:
                raise ValueError(f"'{name}': expected some of {', '.join(RETRY_STATUSES)}")
        return retry

    def identity(self) -> dict[str, Any]:
        """The settings that all runs of a table share: how images are stored."""
        return {f"image.{name}": value for name, value in dump(self.image).items()}

    def run_settings(self, fingerprint: Mapping[str, str]) -> dict[str, Any]:
        """The settings that make a new run of an input with this fingerprint; those of speed do not."""
        values = dump(self)
        # Runs of earlier versions did not record these.
        given = {name: values["data"][name] for name in ("image_column", "image_encoding")}
        of_images = {
            f"data.{name}": value for name, value in given.items() if value not in (None, "file")
        }
        return {
            "data.input": dict(fingerprint),
            **of_images,
            "data.columns": values["data"]["columns"],
            "retry": values["retry"],
            **{f"filter.{name}": value for name, value in values["filter"].items()},
            **{f"duplicates.{name}": value for name, value in values["duplicates"].items()},
            "download.max_bytes": self.download.max_bytes,
            RULES_SETTING: list(self.download.rules),
        }

    def with_rules_of(self, settings: Mapping[str, Any]) -> IngestConfig:
        """These settings with the refusals that `settings` of a table's last run recorded, unless these
        name them.
        """
        if self.download.respect_optout is not True or RULES_SETTING not in settings:
            return self
        rules = recorded_rules(settings[RULES_SETTING])
        download = self.download.model_copy(update={"respect_optout": rules})
        return self.model_copy(update={"download": download})

    def retried(self) -> frozenset[str]:
        """The statuses of `retry`."""
        return frozenset(state for name in self.retry for state in RETRY_STATUSES[name])
