"""Rows that are taken down are gone from every table, and stay away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import build
from pipelines.ingest.blocked import Blocked
from pipelines.ingest.dataset import IngestConfig, ingest
from pipelines.ingest.report import REPORT
from pipelines.reconstruct.side_by_side import FOLDER as SIDE_BY_SIDE
from pipelines.schemas import url_key
from pipelines.storage import Table, parquet_files
from pipelines.takedown import TakedownConfig, take_down
from pipelines.tiny_world.server import Web, serve
from vlv_model.errors import ConfigError, DataError


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    for i in range(12):
        Image.new("RGB", (30, 30), (20 * i, 0, 0)).save(tmp_path / "web" / f"{i}.png")
    with serve(tmp_path / "web") as web:
        yield web


def fetch(tmp_path: Path, urls: list[str]) -> dict[str, int]:
    pq.write_table(pa.table({"URL": urls}), tmp_path / "list.parquet")
    data = {"input": str(tmp_path / "list.parquet"), "output": str(tmp_path / "out")}
    settings: dict[str, Any] = {
        "data": data,
        "download": {"allow_private": True},
        "image": {"size": 32},
        "rows_per_chunk": 4,
        "ray": {"address": "in-process"},
    }
    return ingest(build(IngestConfig, settings))


def urls_of(folder: Path) -> set[str]:
    files = parquet_files(str(folder))
    return set(pa.concat_tables(pq.read_table(f) for f in files)["url"].to_pylist())


def derived_table(folder: Path, images: Path) -> Table:
    """A table of the same keys, in parts of another cut."""
    rows = pa.concat_tables(
        pq.read_table(f, columns=["key", "url"]) for f in parquet_files(str(images))
    )
    rows = rows.append_column("status", pa.array(["ok"] * rows.num_rows))
    table = Table(folder)
    table.create("caption", {}, 2)
    for chunk in range(2):
        table.write(chunk, rows.slice(7 * chunk, 7))
    return table


def test_rows_go_from_all_tables_and_are_not_fetched_again(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(12)]
    fetch(tmp_path, urls)
    captions = derived_table(tmp_path / "captions", tmp_path / "out")
    beside = tmp_path / "captions" / SIDE_BY_SIDE
    beside.mkdir()
    for url in urls:
        (beside / f"{url_key(url)}.png").touch()
    gone = {urls[0], urls[5], urls[9]}
    settings = {
        "table": str(tmp_path / "out"),
        "keys": [url_key(urls[0])],
        "urls": [urls[5].replace("http://", "HTTP://") + "#top", urls[9]],
        "derived": [str(tmp_path / "captions")],
    }
    report = tmp_path / "out" / REPORT
    assert all(url in report.read_text() for url in urls)
    removed = take_down(build(TakedownConfig, settings))
    assert list(removed.values()) == [3, 3]
    assert {url for url in urls if url in report.read_text()} == set(urls) - gone
    assert urls_of(tmp_path / "out") == urls_of(tmp_path / "captions") == set(urls) - gone
    assert Table(tmp_path / "out").counts() == {"ok": 9}
    assert captions.counts() == {"ok": 9}
    left = {f"{url_key(url)}.png" for url in set(urls) - gone}
    assert {file.name for file in beside.iterdir()} == left
    assert list(take_down(build(TakedownConfig, settings)).values()) == [0, 0]
    asked = sum(web.requests.values())
    fetch(tmp_path, [*urls, web.url("new.png")])
    assert sum(web.requests.values()) == asked + 1  # the new one alone
    assert urls_of(tmp_path / "out") == {*set(urls) - gone, web.url("new.png")}


def test_a_domain_goes_with_its_subdomains_and_stays_away(tmp_path: Path, web: Web) -> None:
    urls = [web.url(f"{i}.png") for i in range(4)]
    others = [
        f"http://{name}:1/x.png" for name in ("a.example.org", "example.org", "notexample.org")
    ]
    fetch(tmp_path, [*urls, *others])
    settings = {"table": str(tmp_path / "out"), "domains": ["Example.ORG."]}
    assert "a.example.org" in (tmp_path / "out" / REPORT).read_text()
    assert list(take_down(build(TakedownConfig, settings)).values()) == [2]
    report = (tmp_path / "out" / REPORT).read_text()
    assert "notexample.org" in report
    assert not re.search(r"[^t]example\.org", report)
    assert urls_of(tmp_path / "out") == {*urls, others[2]}
    fetch(tmp_path, [*others, "http://b.example.org:1/y.png"])
    assert urls_of(tmp_path / "out") == {*urls, others[2]}


def test_domains_are_compared_label_by_label() -> None:
    blocked = Blocked(domains=frozenset(["example.org", "xn--bcher-kva.de", "xn--fa-hia.de"]))
    urls = [
        "http://example.org/",
        "http://www.EXAMPLE.org./",
        "http://bücher.de/",
        "http://example.org。/",
        "http://faß.de/",
        "http://ample.org/",
    ]
    urls += ["http://example.org.evil.net/", "not a url", "http://[::1]/", ""]
    mask = blocked.mask(pa.chunked_array([[0] * len(urls)]), pa.chunked_array([urls]))
    assert mask.tolist() == [True] * 5 + [False] * 5


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give keys, urls or domains"):
        build(TakedownConfig, {"table": str(tmp_path)})
    with pytest.raises(DataError, match="holds no table of ours: nothing was removed"):
        take_down(build(TakedownConfig, {"table": str(tmp_path), "keys": [1]}))
    Table(tmp_path / "c").create("caption", {}, 0)
    with pytest.raises(DataError, match="is no image table"):
        take_down(build(TakedownConfig, {"table": str(tmp_path / "c"), "keys": [1]}))
