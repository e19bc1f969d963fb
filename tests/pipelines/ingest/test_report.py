"""The report of an image table: statuses with samples, runs, dead links; written again by each run."""

from __future__ import annotations

import io
import re
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.config import load
from pipelines.images.rows import IMAGE_ROW, with_image_feature
from pipelines.images.runs import next_run
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.job import ingest
from pipelines.ingest.report import REPORT, write_report
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table

LINK_ROT = (
    "host,status,rows\nrotten.example,download:dns,30\nrotten.example,ok,10\nfine.example,ok,5\n"
)


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "PNG")
    return file.getvalue()


def row(key: int, state: str, image: bytes | None = None, **more: Any) -> dict[str, Any]:
    given = {"key": key, "url": f"http://h.org/{key}", "status": state, "run": 1, **more}
    if image:
        given |= {"image": {"bytes": image, "path": None}, "original_width": 40}
        given |= {"original_height": 30, "aesthetic": 6.25}
    return given


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """40 parts with ok, marked and failed rows; a finished run."""
    table = Table(tmp_path / "out")
    run = next_run(table)
    run.begin({}, list(range(40)), fetched=240, marked=40, dropped={"filtered:punsafe": 17})
    table.create("image", {}, 40)
    for chunk in range(40):
        first = 10 * chunk
        rows = [
            row(first + i, "ok", png("green"), alt_text="<b>green</b> & calm") for i in range(3)
        ]
        rows += [row(first + 3, "filtered:aesthetic", png("red"))]
        rows += [row(first + 4, "filtered:short_side", original_width=9, original_height=8)]
        rows += [row(first + 5, "download:dns", error="no such <host>")]
        schema = with_image_feature(IMAGE_ROW)
        table.write(chunk, pa.Table.from_pylist(rows, schema), row_group_size=IMAGE_ROW_GROUP)
    write_atomically(run.folder / "link_rot.csv", LINK_ROT)
    run.end(table.counts())
    return table


def words_of(table: Table) -> str:
    page = (table.folder / REPORT).read_text()
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page.partition("</style>")[2])).split())


def test_every_status_has_samples_from_many_parts(table: Table) -> None:
    write_report(table)
    page, words = (table.folder / REPORT).read_text(), words_of(table)
    assert page.count("data:image/png") == 12 + 6  # kept, and those that a filter ruled out later
    for words_of_it in (
        "120 50.0 % of 240 rows",
        "filtered:aesthetic",
        "40×30, aesthetic 6.2",
        "9×8",
        "no such <host>",
        "<b>green</b> & calm",
        "filtered:punsafe 17",
        "rotten.example 30 40 75.0 % download:dns",
    ):
        assert words_of_it in words.replace("\u00a0", " "), words_of_it
    assert "fine.example" not in words
    kept = re.findall(r"The image of http://h.org/(\d+)", page)
    assert len({int(key) // 10 for key in kept}) >= 10  # parts
    assert max(int(key) for key in kept) >= 390  # to the last one


def test_a_table_of_one_part_has_its_samples(tmp_path: Path) -> None:
    table = Table(tmp_path / "out")
    run = next_run(table)
    run.begin({}, [0], fetched=2, marked=0, dropped={})
    table.create("image", {}, 1)
    table.write(
        0, pa.Table.from_pylist([row(1, "ok", png("red")), row(2, "ok", b"no image")], IMAGE_ROW)
    )
    write_atomically(run.folder / "link_rot.csv", "host,status,rows\nh.org,ok,2\n")
    run.end(table.counts())
    write_report(table)
    assert "No fetch failed." in words_of(table)
    assert "not readable" in words_of(table)


def test_the_speed_is_for_the_time_of_work(table: Table) -> None:
    """Not for the time between a kill and the continuation."""
    noted = table.folder / "_runs/0001/throughput.jsonl"
    noted.write_text(
        '{"seconds": 30.0, "rows": 90, "ok": 5}\n{"seconds": 60.0, "rows": 180, "ok": 9}\n'
    )
    write_report(table)
    assert "3 / s" in words_of(table).replace("\u00a0", " ")
    assert "over 1 min 00 s of work" in words_of(table).replace("\u00a0", " ")


def test_the_numbers_of_every_run_add_up(tmp_path: Path, parse: Any) -> None:
    """Over reruns with other filters, repeated URLs, retries and rows without a URL."""
    urls = [f"http://127.0.0.1:9/{i}.png" for i in range(12)] + ["http://127.0.0.1:9/1.png", ""]
    scores = [float(i) for i in range(14)]
    pq.write_table(pa.table({"URL": urls, "aesthetic": scores}), tmp_path / "list.parquet")
    given = [f"data.input={tmp_path}/list.parquet", f"data.output={tmp_path}/out"]
    given.append("ray.address=in-process")
    for more in (["filter.min_aesthetic=3"], ["filter.min_aesthetic=6"], [],
                 ["retry=all", "filter.min_aesthetic=1.5"]):  # fmt: skip
        ingest(load(IngestConfig, None, [*given, *more]))
    table = Table(tmp_path / "out")
    document = parse((table.folder / REPORT).read_text())
    (runs,) = (s for s in document.all("section") if s.attributes["id"] == "runs")
    assert [head.text for head in runs.all("th") if head.attributes["scope"] == "col"][3:] == [
        "list", "new", "in the table", "dropped", "again", "fetched", "marked"
    ]  # fmt: skip
    shown = []
    for line in runs.all("tbody")[0].all("tr"):
        texts = [cell.text for cell in line.all("td")][2:]
        dropped = sum(int(number) for number in re.findall(r"\s(\d+)", texts[3]))
        read, new, known, again, fetched, _ = (int(texts[i]) for i in (0, 1, 2, 4, 5, 6))
        assert read == new + known + dropped == 14, texts
        assert fetched == new + again, texts
        shown.append((new, known, again))
    # The URL of row 1 is listed again with a score that passes.
    assert shown == [(10, 0, 0), (0, 7, 0), (2, 10, 0), (0, 11, 11)]
    (rows,) = (s for s in document.all("section") if s.attributes["id"] == "rows")
    assert sum(table.counts().values()) == 12 == int(rows.all("tfoot")[0].all("td")[0].text)


def test_an_unfinished_run_has_no_page(table: Table) -> None:
    write_report(table)
    next_run(table).begin({}, [0], fetched=1, marked=0, dropped={})
    write_report(table)
    assert not (table.folder / REPORT).exists()
