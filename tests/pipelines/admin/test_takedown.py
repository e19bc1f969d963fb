"""A takedown removes rows from every table, permanently."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.takedown import run, with_tables
from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build, load
from pipelines.cli.main import BAD_INPUT, main
from pipelines.images.blocklist import Blocklist
from pipelines.images.removal import SIDE_BY_SIDE
from pipelines.images.rows import url_key
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.job import ingest
from pipelines.ingest.report import REPORT
from pipelines.storage import tables
from pipelines.storage.tables import Table, parquet_files
from pipelines.tiny_world.server import Web, serve
from tests.pipelines.ingest.sites import HEADERS_ALONE
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
        "download": {"allow_private": True, "respect_optout": HEADERS_ALONE},
        "image": {"size": 32},
        "rows_per_chunk": 4,
        "ray": {"address": "in-process"},
    }
    return ingest(build(IngestConfig, settings))


def urls_of(folder: Path) -> set[str]:
    files = parquet_files(str(folder))
    return set(pa.concat_tables(pq.read_table(f) for f in files)["url"].to_pylist())


def derived_table(folder: Path, images: Path) -> Table:
    """A table with the same keys, split into other parts."""
    rows = pa.concat_tables(
        pq.read_table(f, columns=["key", "url"]) for f in parquet_files(str(images))
    )
    rows = rows.append_column("status", pa.array(["ok"] * rows.num_rows))
    table = Table(folder)
    table.create("caption", {}, 2)
    for chunk in range(2):
        table.write(chunk, rows.slice(7 * chunk, 7))
    return table


def test_rows_are_removed_from_all_tables_and_not_fetched_again(tmp_path: Path, web: Web) -> None:
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


@pytest.mark.parametrize("killed", ["write_parquet", "write_atomically"])  # the part, its commit
def test_a_killed_takedown_leaves_no_trace_of_a_row_and_is_finished(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    urls = [web.url(f"{i}.png") for i in range(3)]
    fetch(tmp_path, urls)
    captions = derived_table(tmp_path / "captions", tmp_path / "out")
    beside = [captions.folder / name for name in ("_report.html", "captions.json", "_health.json")]
    for file in beside:
        file.write_text("of all rows")
    settings = {"table": str(tmp_path / "out"), "urls": urls[:1], "derived": [str(captions.folder)]}
    write = getattr(tables, killed)

    def write_or_die(path: Path, *content: Any, **options: Any) -> None:
        if path.is_relative_to(captions.folder) and "_blocked" not in path.name:
            raise KeyboardInterrupt
        write(path, *content, **options)

    monkeypatch.setattr(tables, killed, write_or_die)
    with pytest.raises(KeyboardInterrupt):
        take_down(build(TakedownConfig, settings))
    assert not any(file.exists() for file in beside)
    monkeypatch.undo()
    take_down(build(TakedownConfig, settings))
    assert urls_of(captions.folder) == set(urls[1:])
    assert captions.counts() == {"ok": 2}


def test_a_domain_is_removed_with_its_subdomains_permanently(tmp_path: Path, web: Web) -> None:
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


BROWSER = {  # as the list has it: as a browser shows it
    "http://127.0.0.1:9/sp ace.jpg": "http://127.0.0.1:9/sp%20ace.jpg#top",
    "http://127.0.0.1:9/été.jpg": "http://127.0.0.1:9/%C3%A9t%C3%A9.jpg",
    "http://bücher.invalid/x.jpg": "http://xn--bcher-kva.invalid/x.jpg",
    "http://a.invalid/%7eme?q=a b": "HTTP://A.invalid:80/~me?q=a%20b",
}


def test_an_address_is_taken_down_in_all_its_spellings(tmp_path: Path) -> None:
    """Given as a browser shows it; a row given by key loses its other spellings too."""
    twice = ["http://b.invalid/%7Ex.jpg", "http://b.invalid/~x.jpg"]
    fetch(tmp_path, [*BROWSER, *twice, "http://c.invalid/x.jpg"])
    captions = derived_table(tmp_path / "captions", tmp_path / "out")
    settings = {
        "table": str(tmp_path / "out"),
        "urls": list(BROWSER.values()),
        "keys": [url_key(twice[0])],
        "derived": [str(captions.folder)],
    }
    assert list(take_down(build(TakedownConfig, settings)).values()) == [6, 6]
    assert urls_of(tmp_path / "out") == {"http://c.invalid/x.jpg"}
    fetch(tmp_path, [*BROWSER, *BROWSER.values(), *twice, "http://c.invalid/y.jpg"])
    assert urls_of(tmp_path / "out") == {f"http://c.invalid/{n}.jpg" for n in "xy"}


def test_names_without_a_match_raise_after_the_others_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["http://a.invalid/1.jpg", "http://b.invalid/2.jpg", "http://c.invalid/3.jpg"]
    fetch(tmp_path, urls)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    words = [
        str(tmp_path / "out"),
        str(tmp_path / "copy"),
        f"urls={urls[0]},http://a.invalid/9.jpg",
    ]
    words += ["keys=5", "domains=B.invalid,nobody.invalid"]
    capsys.readouterr()
    for _ in range(2):  # the same command says the same, though what matched is gone by now
        monkeypatch.setattr(sys, "argv", ["takedown.py", *with_tables(words)])
        assert main(TakedownConfig, run, "", {"": "table"}) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out.count("rows removed from") == 2
        (line,) = captured.err.splitlines()
        named = "keys=5, urls=http://a.invalid/9.jpg, domains=nobody.invalid"
        assert f"no row has {named}: check the spelling" in line
        for table in ("out", "copy"):
            assert urls_of(tmp_path / table) == {urls[2]}
    with pytest.raises(DataError, match="none of the 2 rows"):  # but they are kept out from now on
        fetch(tmp_path, ["http://a.invalid/9.jpg", "http://x.nobody.invalid/"])


def test_a_takedown_file_of_the_first_versions_is_read(tmp_path: Path) -> None:
    fetch(tmp_path, ["http://a.invalid/1.jpg", "http://b.invalid/2.jpg"])
    note = {"keys": [url_key("http://c.invalid/3.jpg")], "domains": ["d.invalid"]}
    (tmp_path / "out" / "_takedown.json").write_text(json.dumps(note))
    named = ["http://c.invalid/3.jpg", "http://a.invalid/1.jpg"]
    fetch(tmp_path, [*named, "http://e.d.invalid/", "http://f.invalid/"])
    settings = {"table": str(tmp_path / "out"), "urls": named, "domains": ["d.invalid"]}
    assert list(take_down(build(TakedownConfig, settings)).values()) == [1]  # nothing is unknown
    assert urls_of(tmp_path / "out") == {"http://b.invalid/2.jpg", "http://f.invalid/"}


@pytest.mark.parametrize(
    ("given", "domain"),
    [
        ("http://bücher.example/", "xn--bcher-kva.example"),
        ("https://A.org", "a.org"),
        ("*.a.org", "a.org"),
        (" a.org./ ", "a.org"),
        ("//a.org:8080", "a.org"),
    ],
)
def test_a_url_for_a_domain_is_understood(given: str, domain: str) -> None:
    config = build(TakedownConfig, {"table": "x", "domains": [given]})
    assert config.domains == (domain,)


@pytest.mark.parametrize("given", ["http://a.org/x.jpg", "a.org/x", "http://", "", "."])
def test_an_invalid_domain_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"domains: '.*': expected a domain"):
        build(TakedownConfig, {"table": "x", "domains": [given]})


def test_bare_words_are_tables() -> None:
    words = ["/a,b", "urls=x", "--config", "y.yaml", "c d", "--print-config"]
    kept = ["urls=x", "--config", "y.yaml", "--print-config"]
    assert with_tables(words) == ['table=["/a,b", "c d"]', *kept]
    assert with_tables(kept) == kept


@pytest.mark.parametrize(
    "words",
    [
        ["/a", "table=/b", "domains=x.org"],
        ["/a", "domains=x.org", "domains=y.org"],
        ["/a", "urls=http://x.org/", "derived=/c", "derived=/d"],
    ],
)
def test_repeated_settings_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise only the last value would count."""
    with pytest.raises(SystemExit) as left:
        with_tables(words)
    assert left.value.code == 2
    assert "is given 2 times: give all in one" in capsys.readouterr().err


def test_commas_within_a_url_are_kept() -> None:
    words = ["table=/a", "urls=http://x.org/a,b.jpg,https://y.org/c?d=1,2"]
    config = load(TakedownConfig, None, words)
    assert config.urls == ("http://x.org/a,b.jpg", "https://y.org/c?d=1,2")
    with pytest.raises(ConfigError, match="expected an address such as"):
        load(TakedownConfig, None, ["table=/a", "urls=b.jpg"])


def test_domains_are_compared_label_by_label() -> None:
    blocked = Blocklist(domains=frozenset(["example.org", "xn--bcher-kva.de", "xn--fa-hia.de"]))
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


def test_impossible_takedowns_give_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give keys, urls or domains"):
        build(TakedownConfig, {"table": str(tmp_path)})
    with pytest.raises(DataError, match="holds no table: nothing was removed"):
        take_down(build(TakedownConfig, {"table": str(tmp_path), "keys": [1]}))
    Table(tmp_path / "c").create("caption", {}, 0)
    with pytest.raises(DataError, match="is not an image table"):
        take_down(build(TakedownConfig, {"table": str(tmp_path / "c"), "keys": [1]}))
