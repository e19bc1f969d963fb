"""What the tests of files and of locks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.places import place


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is not there yet, on either kind of storage."""
    if request.param == "disk":
        return place(tmp_path / "a" / "b")
    return place(request.getfixturevalue("bucket") + "/a/b")
