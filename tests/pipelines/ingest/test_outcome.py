"""The end of an ingest says what to retry, and why there is no image."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.ingest
from pipelines.cli.config import settings
from pipelines.cli.main import BAD_INPUT, main
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.outcome import CAUSES, cause_of_nothing, retry_line


def test_all_settings_that_a_cause_names_exist() -> None:
    named = {name for cause in CAUSES.values() for name in re.findall(r"\b[a-z]+\.[a-z_]+", cause)}
    assert len(named) > 8
    assert named <= {setting.key for setting in settings(IngestConfig)}


def test_retry_is_offered_with_the_rows_it_would_try() -> None:
    assert retry_line({"ok": 3, "filtered:aesthetic": 2}) == ""
    assert retry_line({"ok": 3, "download:http_404": 1_200, "decode:corrupt": 2}) == (
        "1,202 rows failed: retry=http_404 tries 1,200 of them again, "
        "retry=decode:corrupt tries 2 of them again, retry=all tries all"
    )
    line = retry_line({"download:timeout": 5, "download:http_5xx": 2, "download:dns": 1})
    assert "retry=transient tries 7 of them again" in line


@pytest.mark.parametrize(
    ("statuses", "dropped", "cause"),
    [
        ({"ok": 1, "download:dns": 9}, {}, None),
        ({}, {}, "the list has no rows"),
        ({}, {"filtered:aesthetic": 9, "duplicate_url": 1}, r"9 of 10 .*filter\.min_aesthetic"),
        ({"download:dns": 9, "download:timeout": 1}, {}, r"9 of 10 are download:dns: .*proxy"),
        ({"decode:crashed": 2}, {}, "2 of 2 are decode:crashed: the column error"),
    ],
)
def test_the_cause_of_a_table_without_an_image(
    statuses: dict[str, int], dropped: dict[str, int], cause: str | None
) -> None:
    found = cause_of_nothing(statuses, dropped)
    if cause is None:
        assert found is None
    else:
        assert re.search(cause, found or "")
        assert "\n" not in (found or "")


def test_an_ingest_without_an_image_fails_and_a_complete_table_offers_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [f"http://127.0.0.1:9/{i}.png" for i in range(3)]
    pq.write_table(pa.table({"URL": urls}), tmp_path / "list.parquet")
    words = [f"data.input={tmp_path}/list.parquet", f"data.output={tmp_path}/out"]
    offer = "retry=blocked_address tries 3 of them again"
    for more in (["ray.address=in-process"], ["ray.address=in-process"]):  # then it is complete
        monkeypatch.setattr("sys.argv", ["ingest.py", *words, *more])
        assert main(IngestConfig, jobs.ingest.run, "") == BAD_INPUT
        ended = capsys.readouterr()
        assert "3 of 3 are download:blocked_address: " in ended.err.splitlines()[-1]
        assert "download.allow_private=true" in ended.err.splitlines()[-1]
        assert offer in ended.out
    assert "already complete" in ended.out
    monkeypatch.setattr("sys.argv", ["ingest.py", *words, "--dry-run"])
    assert main(IngestConfig, jobs.ingest.run, "") == 0
    assert offer in capsys.readouterr().out
