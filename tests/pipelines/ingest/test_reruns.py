"""Reruns of an ingest do only what is missing."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

import jobs.ingest
from pipelines.admin.status import StatusConfig, status_text
from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build
from pipelines.cli.main import main
from pipelines.images.random_access import RowIndex
from pipelines.images.rows import IMAGE_ROW, OK, url_key
from pipelines.images.runs import Run, last_run
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.job import ingest, plan_only
from pipelines.ingest.known_rows import KnownKeys
from pipelines.ingest.plan import chunk_file
from pipelines.ingest.steps import FetchedChunk, WritePart
from pipelines.storage.tables import Table, parquet_files
from pipelines.tiny_world.server import Web, serve
from tests.pipelines.ingest.sites import HEADERS_ALONE
from vlv_model.errors import ConfigError, DataError, RunError

SETTINGS: dict[str, Any] = {
    "download": {"allow_private": True, "retries": 0, "respect_optout": HEADERS_ALONE},
    "image": {"size": 32, "format": "png"},
    "rows_per_chunk": 8,
    "ray": {"address": "in-process"},
}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """Pictures 0.png … 39.png; those above 9 are wide."""
    folder = tmp_path / "web"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (90 if i > 9 else 30, 30), (6 * i, 0, 0)).save(folder / f"{i}.png")
    with serve(folder) as web:
        yield web


def run(tmp_path: Path, urls: list[str], scores: list[float] | None = None, **more: Any) -> Any:
    columns: dict[str, Any] = {"URL": urls}
    if scores:
        columns["aesthetic"] = scores
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    data = {"input": str(tmp_path / "list.parquet"), "output": str(tmp_path / "out")}
    return ingest(build(IngestConfig, {"data": data, **SETTINGS, **more}))


def rows_of(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The table's rows by URL; checks that each occurs once and that key ranges do not overlap."""
    tables = [pq.read_table(file) for file in parquet_files(str(tmp_path / "out"))]
    # Whoever knows nothing of us and takes all Parquet files of the folder has the same.
    assert sum(t.num_rows for t in tables) == pq.read_table(Table(tmp_path / "out").parts).num_rows
    assert len(tables) == len(list((tmp_path / "out").glob("**/*.parquet")))
    rows = pa.concat_tables(tables).to_pylist()
    keys = [row["key"] for row in rows]
    assert keys == sorted(set(keys))
    return {row["url"]: row for row in rows}


def asked_by(web: Web, action: Any) -> tuple[Any, int]:
    before = sum(web.requests.values())
    result = action()
    return result, sum(web.requests.values()) - before


def test_only_new_rows_of_a_list_are_fetched(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(40)]
    run(tmp_path, urls[:25])
    first = rows_of(tmp_path)
    counts, asked = asked_by(web, lambda: run(tmp_path, urls))
    assert (counts, asked) == ({"ok": 40}, 15)
    rows = rows_of(tmp_path)
    assert set(rows) == set(urls)
    for url, row in rows.items():
        assert row["run"] == (1 if url in first else 2)
        assert url not in first or row == first[url]
    # A list of new rows alone leaves the others where they are.
    counts, asked = asked_by(web, lambda: run(tmp_path, [web.url("gone.png")]))
    assert (counts, asked) == ({"ok": 40, "download:http_404": 1}, 1)
    _, asked = asked_by(web, lambda: run(tmp_path, [web.url("gone.png")]))
    assert asked == 0


def test_only_the_named_classes_are_retried(tmp_path: Path, web: Web) -> None:
    urls = [web.url(name) for name in ("0.png", "1.png", "late.png", "text.png")]
    (tmp_path / "web" / "text.png").write_bytes(b"just words, and no picture at all " * 9)
    assert run(tmp_path, urls) == {"ok": 2, "decode:not_an_image": 1, "download:http_404": 1}
    Image.new("RGB", (30, 30), "white").save(tmp_path / "web" / "late.png")
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, retry=["timeout", "http_410"]))
    assert (counts["ok"], asked) == (2, 0)
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, retry=["http_404"]))
    assert (counts, asked) == ({"ok": 3, "decode:not_an_image": 1}, 1)
    assert rows_of(tmp_path)[urls[2]]["error"] is None
    # What failed again may be tried again, by the same command.
    for _ in range(2):
        _, asked = asked_by(web, lambda: run(tmp_path, urls, retry=["decode:not_an_image"]))
        assert asked == 1
    with pytest.raises(ConfigError, match="'http_408': expected some of dns, refused"):
        run(tmp_path, urls, retry=["http_408"])


def test_changed_filters_mark_rows_and_undo_marks(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(20)]
    scores = [float(i) for i in range(20)]
    assert run(tmp_path, urls, scores, filter={"min_aesthetic": 5}) == {"ok": 15}
    images = {url: row["image"] for url, row in rows_of(tmp_path).items()}
    # Stricter: nothing is asked of the web, nothing is lost.
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, scores, filter={"min_aesthetic": 12}))
    assert (counts, asked) == ({"ok": 8, "filtered:aesthetic": 7}, 0)
    assert {url: row["image"] for url, row in rows_of(tmp_path).items()} == images
    # Looser: marked rows are taken back, those that were never fetched are.
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, scores, filter={"min_aesthetic": 3}))
    assert (counts, asked) == ({"ok": 17}, 2)
    # By the image's own size.
    ratio = {"min_aspect_ratio": 2, "optional": ["aspect_ratio"]}
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, scores, filter=ratio))
    assert (counts, asked) == ({"ok": 10, "filtered:aspect_ratio": 10}, 3)
    unseen = [row for row in rows_of(tmp_path).values() if row["image"] is None]
    assert {row["url"] for row in unseen} == set(urls[:3])  # ruled out before they were stored
    counts, asked = asked_by(web, lambda: run(tmp_path, urls, scores))
    assert (counts, asked) == ({"ok": 20}, 3)


def test_marks_and_scores_do_not_rewrite_images(tmp_path: Path, web: Web) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 100, 100, 3), np.uint8)
    for i in range(8):
        Image.fromarray(noise[i]).save(tmp_path / "web" / f"{i}.png")
    urls, stored = [web.url(f"{i}.png") for i in range(8)], {"image": {"size": 96, "format": "png"}}
    run(tmp_path, urls, [0.5 + i for i in range(8)], **stored)
    (part,) = parquet_files(str(tmp_path / "out"))
    before, images = part.read_bytes(), {u: row["image"] for u, row in rows_of(tmp_path).items()}
    scores = [9.5 - i for i in range(8)]
    counts = run(tmp_path, urls, scores, filter={"min_aesthetic": 5}, **stored)
    assert counts == {"ok": 5, "filtered:aesthetic": 3}
    assert part.read_bytes().startswith(before)
    rows = rows_of(tmp_path)
    assert [rows[url]["aesthetic"] for url in urls] == scores
    assert {url: row["image"] for url, row in rows.items()} == images
    assert [rows[url]["status"] for url in urls[4:]] == [OK, *["filtered:aesthetic"] * 3]


def test_a_killed_rerun_continues(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [web.url(f"{i}.png") for i in range(40)]
    run(tmp_path, urls[:20])
    first_commit = (tmp_path / "out/_commits/000001.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end", lambda self, counts: None)  # killed before it
        run(tmp_path, urls)
    second = last_run(Table(tmp_path / "out"))
    assert second is not None
    assert (second.number, second.is_finished) == (2, False)
    # … and in chunk 1 between part and commit.
    (tmp_path / "out/_commits/000001.json").write_bytes(first_commit)
    planned = pq.read_table(chunk_file(second.plan_folder, 1)).num_rows
    assert 0 < planned < 20
    counts, asked = asked_by(web, lambda: run(tmp_path, urls))
    assert (counts, asked) == ({"ok": 40}, planned)
    assert len(rows_of(tmp_path)) == 40
    assert second.is_finished
    assert not second.plan_folder.exists()


def test_an_unfinished_table_accepts_another_list(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(40)]
    run(tmp_path, urls[:24])
    for name in ("000000.json", "000002.json"):
        (tmp_path / "out/_commits" / name).unlink()
    with pytest.raises(DataError, match="not finished"):
        parquet_files(str(tmp_path / "out"))
    run(tmp_path, urls[20:])
    rows = rows_of(tmp_path)
    assert set(urls[20:]) <= set(rows) <= set(urls)
    run(tmp_path, urls)
    assert set(rows_of(tmp_path)) == set(urls)


def test_new_scores_and_texts_of_known_urls_need_no_download(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(9)] + [web.url("gone.png")]
    run(tmp_path, urls)
    first = rows_of(tmp_path)
    assert {row["aesthetic"] for row in first.values()} == {None}
    low = {urls[1], urls[4]}
    scores = [4.0 if url in low else 6.0 for url in urls]
    action = lambda: run(tmp_path, urls, scores, filter={"min_aesthetic": 5})  # noqa: E731
    counts, asked = asked_by(web, action)
    assert (counts, asked) == ({"ok": 7, "filtered:aesthetic": 2, "download:http_404": 1}, 0)
    rows = rows_of(tmp_path)
    for url, row in rows.items():
        state = "filtered:aesthetic" if url in low else first[url]["status"]
        score = 4.0 if url in low else 6.0
        assert row == {**first[url], "aesthetic": score, "status": state}
    # Values that the list lacks are kept; its values replace those of the table.
    table = {"url": urls[:4], "TEXT": ["a", "b", "c", None], "aesthetic": [None, 7.0, 3.0, None]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    data = {"input": str(tmp_path / "list.parquet"), "output": str(tmp_path / "out")}
    more = {"data": data, **SETTINGS, "filter": {"min_aesthetic": 5, "optional": ["aesthetic"]}}
    counts, asked = asked_by(web, lambda: ingest(build(IngestConfig, more)))
    assert (counts, asked) == ({"ok": 7, "filtered:aesthetic": 2, "download:http_404": 1}, 0)
    rows = rows_of(tmp_path)
    found = [
        (rows[url]["alt_text"], rows[url]["aesthetic"], rows[url]["status"]) for url in urls[:5]
    ]
    assert found == [
        ("a", 6.0, "ok"), ("b", 7.0, "ok"), ("c", 3.0, "filtered:aesthetic"), (None, 6.0, "ok"),
        (None, 4.0, "filtered:aesthetic"),
    ]  # fmt: skip
    # The same list again finds nothing to do, also with a run of its own.
    written = [commit.run for commit in Table(tmp_path / "out").commits()]
    ingest(build(IngestConfig, {**more, "duplicates": {"by": "near", "distance": 0}}))
    assert [commit.run for commit in Table(tmp_path / "out").commits()] == written


def test_a_list_without_a_passing_row_marks_its_rows(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(4)]
    run(tmp_path, urls, [6.0] * 4, filter={"min_aesthetic": 5})
    again = [urls[0], urls[1], web.url("9.png")]
    counts, asked = asked_by(
        web, lambda: run(tmp_path, again, [1.0, 2.0, 3.0], filter={"min_aesthetic": 5})
    )
    assert (counts, asked) == ({"ok": 2, "filtered:aesthetic": 2}, 0)
    again = [urls[0], urls[0], urls[1]]  # of several rows of one URL the first that passes
    counts = run(tmp_path, again, [1.5, 8.0, 9.0], filter={"min_aesthetic": 5})
    assert counts == {"ok": 4}
    scores = [rows_of(tmp_path)[url]["aesthetic"] for url in urls]
    assert scores == [8.0, 9.0, 6.0, 6.0]
    with pytest.raises(DataError, match="filter 'aesthetic'"):
        run(tmp_path, urls, filter={"min_aesthetic": 5})
    with pytest.raises(DataError, match="none of the 1 rows of the list is left"):
        run(tmp_path, [web.url("9.png")], [3.0], filter={"min_aesthetic": 5})


def test_a_duplicate_and_a_retried_row_get_the_new_scores(tmp_path: Path, web: Web) -> None:
    (tmp_path / "web/copy.png").write_bytes((tmp_path / "web/0.png").read_bytes())
    urls = [web.url(name) for name in ("0.png", "copy.png", "late.png")]
    assert run(tmp_path, urls, [6.0] * 3) == {"ok": 1, "download:http_404": 1, "duplicate": 1}
    Image.new("RGB", (30, 30), "white").save(tmp_path / "web/late.png")
    run(tmp_path, urls, [7.0] * 3, retry=["http_404"])
    rows = rows_of(tmp_path)
    assert {row["aesthetic"] for row in rows.values()} == {7.0}
    assert sorted(row["status"] for row in rows.values()) == ["duplicate", "ok", "ok"]


def test_known_keys_have_no_false_negatives(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    table = Table(tmp_path / "t")
    table.create("image", {}, 1)
    table.write(0, pa.table({"key": keys[:9000], "status": ["ok"] * 9000}))
    known = KnownKeys(table)
    assert known.may_have(keys[:9000]).all()
    assert known.may_have(keys[9000:]).mean() < 0.001


def test_two_keys_of_one_address_are_duplicates(tmp_path: Path, web: Web) -> None:
    """Also if the server sends different bytes; the row of the first run stays."""
    for i, name in enumerate(("~a.png", "b c.png")):
        Image.new("RGB", (30, 30), (i, 99, 0)).save(tmp_path / "web" / name)
    first = [f"{web.base_url}/{path}" for path in ("%7ea.png", "b c.png", "1.png")]
    run(tmp_path, first)
    for name in ("~a.png", "b c.png"):
        Image.new("RGB", (30, 30), (7, 7, 7)).save(tmp_path / "web" / name)
    again = [f"{web.base_url}/{path}" for path in ("~a.png", "b%20c.png", "2.png")]
    assert run(tmp_path, [*first, *again]) == {"ok": 4, "duplicate": 2}
    states = {url: row["status"] for url, row in rows_of(tmp_path).items()}
    assert states == dict.fromkeys([*first, again[2]], "ok") | dict.fromkeys(again[:2], "duplicate")
    counts = run(tmp_path, [*first, *again], duplicates={"by": "none"})
    assert counts == {"ok": 6}


def test_a_row_keeps_the_key_of_its_url(tmp_path: Path, web: Web) -> None:
    run(tmp_path, [web.url("0.png"), web.url("1.png")])
    for url, row in rows_of(tmp_path).items():
        assert row["key"] == url_key(url)
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (30, 30)


def test_a_duplicate_replaces_a_filtered_row(tmp_path: Path, web: Web) -> None:
    first, other, late = (web.url(name) for name in ("1.png", "2.png", "copy.png"))
    (tmp_path / "web" / "copy.png").write_bytes((tmp_path / "web" / "1.png").read_bytes())
    run(tmp_path, [first, other], [7.0, 9.0])
    assert run(tmp_path, [late], [9.0]) == {"ok": 2, "duplicate": 1}
    rows = rows_of(tmp_path)
    assert rows[late]["status"] == "duplicate"  # the earlier run wins
    assert rows[late]["image"] == rows[first]["image"]
    strict = {"filter": {"min_aesthetic": 8}}
    counts, asked = asked_by(web, lambda: run(tmp_path, [late], [9.0], **strict))
    assert (counts, asked) == ({"ok": 2, "filtered:aesthetic": 1}, 0)
    assert rows_of(tmp_path)[late]["status"] == "ok"
    counts, asked = asked_by(web, lambda: run(tmp_path, [late], [9.0]))
    assert (counts, asked) == ({"ok": 2, "duplicate": 1}, 0)
    counts, asked = asked_by(web, lambda: run(tmp_path, [late], [9.0], duplicates={"by": "none"}))
    assert (counts, asked) == ({"ok": 3}, 0)


def test_a_list_too_long_for_the_tables_chunks_is_refused(tmp_path: Path, web: Web) -> None:
    run(tmp_path, [web.url("0.png")])
    urls = [web.url(f"{i}.png") for i in range(1100)]
    with pytest.raises(DataError, match=r"would now have 1,100 rows \(usual: 34\): choose another"):
        run(tmp_path, urls, rows_per_chunk=None)
    counts, _ = asked_by(web, lambda: run(tmp_path, urls[:40]))
    assert counts == {"ok": 40}


def make_older(tmp_path: Path, without: list[str], setting: str = "") -> None:
    """Remove from a table what an earlier version did not write."""
    table = Table(tmp_path / "out")
    about = table.describe()
    about["identity"].pop(setting, None)
    (table.folder / "_table.json").write_text(json.dumps(about))
    for commit in table.commits():
        rows = pq.read_table(table.part(commit.chunk))
        pq.write_table(rows.drop_columns(without), table.part(commit.chunk))


@pytest.mark.parametrize(
    ("without", "setting", "message"),
    [
        ([], "image.reencode", r"earlier version, without the setting image\.reencode: choose"),
        (["license", "source"], "", "earlier version, without the column license, source: choose"),
        (["license", "source", "run"], "image.reencode", "earlier version, without the setting"),
    ],
)
def test_a_table_of_an_earlier_version_is_refused_and_readable(
    tmp_path: Path, web: Web, without: list[str], setting: str, message: str
) -> None:
    urls = [web.url(f"{i}.png") for i in range(3)]
    run(tmp_path, urls)
    make_older(tmp_path, without, setting)
    for dry_run in (False, True):
        data = {"input": str(tmp_path / "list.parquet"), "output": str(tmp_path / "out")}
        config = build(IngestConfig, {"data": data, "dry_run": dry_run, **SETTINGS})
        with pytest.raises(RunError, match=message):
            plan_only(config) if dry_run else ingest(config)
    out = str(tmp_path / "out")
    assert "ok" in status_text(StatusConfig(table=out))
    assert len(RowIndex.open(parquet_files(out))) == 3  # as training and recaption read it
    removed = take_down(TakedownConfig(table=out, urls=(urls[0],)))
    assert list(removed.values()) == [1]
    assert len(RowIndex.open(parquet_files(out))) == 2


def test_a_dry_run_prints_the_plan_and_changes_nothing(
    tmp_path: Path, web: Web, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [web.url(f"{i}.png") for i in range(20)]
    scores = [float(i) for i in range(20)]
    pq.write_table(pa.table({"URL": urls, "aesthetic": scores}), tmp_path / "list.parquet")
    words = [f"data.input={tmp_path}/list.parquet", f"data.output={tmp_path}/out", "--dry-run"]
    words += ["download.allow_private=true", "image.size=32", "image.format=png"]

    def printed(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["ingest.py", *words, *more])
        assert main(IngestConfig, jobs.ingest.run, "") == 0
        return " ".join(capsys.readouterr().out.split())

    first, asked = asked_by(web, lambda: printed("filter.min_aesthetic=15"))
    assert asked == 0
    assert not (tmp_path / "out").exists()
    for line in (
        "rows read 20 100.0%",
        "- filtered:aesthetic 15 75.0%",
        "left 5 25.0%",
        "fetched 5 ",
    ):
        assert line in first
    assert "assumed" in first
    run(tmp_path, urls, scores, filter={"min_aesthetic": 5})
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = printed("filter.min_aesthetic=12", "retry=timeout,http_404")
    assert "to be fetched 0 " in again
    assert "to be marked 7 (rows of the table)" in again
    assert "measured here" in printed()  # the size of an image, by the table's own parts
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == files


def test_rows_of_the_table_are_no_rows_of_the_list(tmp_path: Path, web: Web) -> None:
    """Counts of the list add up to it, whatever a run fetches again or marks."""
    gone = [web.url(f"gone{i}.png") for i in range(6)]
    run(tmp_path, [*gone, web.url("0.png"), web.url("1.png")], [9.0] * 8)
    # A short list: a new row, a row that its new score drops, and that URL once more.
    listed = [web.url("2.png"), web.url("0.png"), web.url("0.png")]
    more = {"filter": {"min_aesthetic": 5}, "retry": ["http_404"]}
    run(tmp_path, listed, [9.0, 1.0, 1.0], **more)
    about = json.loads((tmp_path / "out/_runs/0002/run.json").read_text())
    assert about["read"] == 3 == about["listed"] + sum(about["dropped"].values())
    assert (about["listed"], about["dropped"]) == (1, {"filtered:aesthetic": 2})
    assert (about["fetched"], about["again"], about["marked"]) == (7, 6, 1)
    runs = (tmp_path / "out/_report.html").read_text().partition('id="runs"')[2]
    numbers = re.findall(r'class="number">([\d–]+)<', runs.partition("</section>")[0])
    # List, new, in the table, again, fetched and marked of each run.
    assert numbers == ["8", "8", "0", "0", "8", "0", *["3", "1", "0", "6", "7", "1"]]


def test_a_run_writes_its_throughput_and_link_rot(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(3)] + [web.url("gone.png"), "http://dead.invalid/x"]
    run(tmp_path, urls)
    folder = tmp_path / "out/_runs/0001"
    told = json.loads((folder / "throughput.jsonl").read_text().splitlines()[-1])
    assert (told["rows"], told["ok"]) == (5, 3)
    assert told["seconds"] > 0
    assert "dead.invalid" in (tmp_path / "out/_report.html").read_text()
    rot = csv.read_csv(folder / "link_rot.csv").to_pylist()
    assert {(row["host"], row["status"]): row["rows"] for row in rot} == {
        ("127.0.0.1", "ok"): 3,
        ("127.0.0.1", "download:http_404"): 1,
        ("dead.invalid", "download:dns"): 1,
    }


def test_few_parts_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many chunks in flight with a row or two each, most wait to be written."""
    writing = threading.Semaphore(2)

    def write(*part: Any, **options: Any) -> None:
        assert writing.acquire(blocking=False)
        time.sleep(0.02)  # long enough for the others to come
        writing.release()

    monkeypatch.setattr(Table, "write", write)
    write_part, rows = WritePart(Table(tmp_path), Run(tmp_path, 1)), IMAGE_ROW.empty_table()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: write_part(FetchedChunk(n, rows, marked=rows)), range(16)))
