"""What several packages' tests share: folders on either kind of storage, nasty files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.storage.files import as_path
from tests.pipelines.pictures.nasty import make_nasty, real_nasty
from tests.pipelines.report.pages import browse, caption_report, overflowing, parse, proof, report

__all__ = [
    "browse",
    "caption_report",
    "overflowing",
    "parse",
    "proof",
    "report",
]  # fixtures of all reports


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is not there yet, on either kind of storage."""
    if request.param == "disk":
        return as_path(tmp_path / "a" / "b")
    return as_path(request.getfixturevalue("bucket") + "/a/b")


@pytest.fixture(params=["made", "shared"])
def nasty_files(request: pytest.FixtureRequest, tmp_path: Path) -> dict[Path, str | None]:
    """{file: "ok" or the class of its failure, None where that is not known beforehand}."""
    if request.param == "made":
        return make_nasty(tmp_path / "nasty")
    return real_nasty(request.getfixturevalue("shared_dir") / "nasty")
