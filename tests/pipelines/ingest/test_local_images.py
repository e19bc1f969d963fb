"""Ingest of images that are there: the same rows as by their URLs, and no request."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.config import build
from pipelines.images.rows import key_of, url_key
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.estimate import places_line
from pipelines.ingest.find_images import find_images
from pipelines.ingest.img2dataset import status_of
from pipelines.ingest.job import ingest, plan_only
from pipelines.ingest.steps import WritePart
from pipelines.storage.files import as_path
from pipelines.storage.tables import parquet_files
from pipelines.tiny_world.server import Web, serve
from tests.pipelines.foreign import png, shard
from tests.pipelines.ingest import peer
from tests.pipelines.ingest.sites import HEADERS_ALONE
from vlv_model.errors import DataError

SETTINGS: dict[str, Any] = {
    "download": {"allow_private": True, "retries": 0, "respect_optout": HEADERS_ALONE},
    "image": {"size": 32, "format": "png"},
    "rows_per_chunk": 4,
    "ray": {"address": "in-process", "num_cpus": 1},  # one decoder
}
KINDS = ["files", "webdataset", "parquet"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that this process connects to, or asks a name server for."""
    asked: list[Any] = []

    def refuse(*args: Any, **options: Any) -> Any:
        asked.append(args)
        raise OSError("a test is offline")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def config_of(images: str | Path, output: Path, **more: Any) -> IngestConfig:
    data = {"input": str(images), "output": str(output), **more.pop("data", {})}
    return build(IngestConfig, {"data": data, **SETTINGS, **more})


def run(images: str | Path, output: Path, **more: Any) -> dict[str, dict[str, Any]]:
    """The rows of the table by URL or name."""
    ingest(config_of(images, output, **more))
    return rows_of(output)


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    tables = [pq.read_table(file) for file in parquet_files(str(output))]
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["key"] for row in rows] == sorted({row["key"] for row in rows})
    return {row["url"]: row for row in rows}


def states(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["status"] for name, row in rows.items()}


# --------------------------------------------------------------------------- img2dataset's output


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    for i in range(9):
        Image.new("RGB", (60 + i, 40), (20 * i, 9, 0)).save(folder / f"{i}.jpg")
    (folder / "page.jpg").write_text("<html>not found</html>")
    with serve(folder) as web:
        yield web


@pytest.fixture(scope="module")
def listed(web: Web) -> dict[str, list[Any]]:
    """Nine pictures, a dead link, a page and a server's error; the last shard has no image."""
    urls = [*(web.url(f"{i}.jpg") for i in range(9)), web.url("page.jpg")]
    urls += [web.url("gone.jpg"), web.url("gone-too.jpg")]
    return {
        "url": urls,
        "caption": [f"picture {i} «é»\nline" for i in range(12)],
        "similarity": [i / 16 for i in range(12)],
        "punsafe": [0.25] * 12,
    }


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory, listed: dict[str, list[Any]]) -> Path:
    """What img2dataset writes in each format, in folders; and the list of URLs."""
    folder = tmp_path_factory.mktemp("peers")
    for kind in KINDS:
        peer.download(folder / kind, listed, kind, shard_rows=5)
    pq.write_table(pa.table(listed), folder / "list.parquet")
    return folder


@pytest.fixture(scope="module")
def downloaded(peers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run(peers / "list.parquet", tmp_path_factory.mktemp("downloaded") / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_output_of_img2dataset_gives_the_rows_of_its_list(
    kind: str,
    peers: Path,
    downloaded: dict[str, dict[str, Any]],
    tmp_path: Path,
    offline: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Killed in the middle, and continued with the chunks that are missing.
    write, calls = WritePart.__call__, []

    def killed(self: WritePart, chunk: Any) -> None:
        calls.append(chunk.number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, chunk)

    monkeypatch.setattr(WritePart, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run(peers / kind, tmp_path / "out")
    monkeypatch.setattr(WritePart, "__call__", write)
    rows = run(peers / kind, tmp_path / "out")
    assert rows.keys() == downloaded.keys()
    for url, row in rows.items():
        expected = {**downloaded[url]}
        if row["status"] != "ok":  # the same class, in the words of each
            row.pop("error"), expected.pop("error")
        assert row == expected
    assert len(states(rows)) == 12
    assert not offline


def test_failed_rows_of_img2dataset_are_fetched_by_a_later_run(
    peers: Path, web: Web, tmp_path: Path
) -> None:
    rows = run(peers / "webdataset", tmp_path / "out")
    assert states(rows)[web.url("gone.jpg")] == "download:http_404"
    stored = rows[web.url("3.jpg")]
    web.requests.clear()
    shutil.copy(web.folder / "3.jpg", web.folder / "gone.jpg")
    try:
        again = run(peers / "list.parquet", tmp_path / "out", retry=("http_404",))
    finally:
        (web.folder / "gone.jpg").unlink()
    assert sorted(web.requests) == ["/gone-too.jpg", "/gone.jpg"]
    assert again[web.url("gone.jpg")]["status"] == "duplicate"  # of 3.jpg, which it was copied from
    assert again[web.url("3.jpg")] == stored
    # The output is read again without a request, also with a retry of what it lacks.
    web.requests.clear()
    assert run(peers / "webdataset", tmp_path / "out", retry=("http_404",)) == again
    assert not web.requests


def test_an_output_in_an_object_store(peers: Path, bucket: str, tmp_path: Path) -> None:
    expected = states(run(peers / "webdataset", tmp_path / "here"))
    for file in (peers / "webdataset").iterdir():
        (as_path(bucket) / "in" / file.name).write_bytes(file.read_bytes())
    assert states(run(f"{bucket}/in", tmp_path / "out")) == expected


def test_filters_read_the_metadata_and_the_pictures(peers: Path, tmp_path: Path) -> None:
    filters = {"max_punsafe": 0.5, "min_short_side": 30}
    config = config_of(peers / "webdataset", tmp_path / "out", filter=filters, dry_run=True)
    plan = plan_only(config)
    assert (plan.read, plan.listed, plan.fetched) == (12, 12, 12)
    assert plan.places is not None
    assert (plan.places.images, plan.places.lost, plan.places.files) == (10, 2, 2)
    assert "10 images in 2 files" in places_line(plan.places)
    rows = run(peers / "webdataset", tmp_path / "out", filter={"max_aspect_ratio": 1.6})
    assert sorted(states(rows).values()).count("filtered:aspect_ratio") == 4
    with pytest.raises(DataError, match=r"aesthetic.*similarity"):
        run(peers / "webdataset", tmp_path / "more", filter={"min_aesthetic": 5})


def test_parts_of_an_output_may_be_missing(peers: Path, web: Web, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "webdataset", tmp_path / "in")
    (folder / "00000.tar").unlink()  # its metadata are there
    (folder / "00001.parquet").write_bytes(b"PAR1 of a killed job")  # its .json are there
    (folder / "00002.tar").write_bytes(b"")
    rows = run(folder, tmp_path / "out")
    expected = {web.url(f"{i}.jpg"): "decode:no_image" if i < 5 else "ok" for i in range(9)}
    expected |= {web.url(name): "download:http_404" for name in ("gone.jpg", "gone-too.jpg")}
    expected[web.url("page.jpg")] = "decode:not_an_image"
    assert {url: state for url, state in states(rows).items() if "//" in url} == expected
    assert rows[web.url("0.jpg")]["error"] == "not in 00000.tar"
    assert rows[web.url("7.jpg")]["alt_text"] == "picture 7 «é»\nline"
    assert rows[web.url("7.jpg")]["similarity"] == 7 / 16


TEXTS = {
    "HTTP Error 404: Not Found": "download:http_404",
    "HTTP Error 429: Too Many Requests": "download:http_429",
    "HTTP Error 503: Service Unavailable": "download:http_5xx",
    "HTTP Error 403: Forbidden": "download:http_4xx",
    "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\n"
    "The last 30x error message was:\nFound": "download:redirects",
    "<urlopen error timed out>": "download:timeout",
    "The read operation timed out": "download:timeout",
    "<urlopen error [Errno -2] Name or service not known>": "download:dns",
    "<urlopen error [Errno -3] Temporary failure in name resolution>": "download:dns",
    "<urlopen error [Errno 111] Connection refused>": "download:refused",
    "Remote end closed connection without response": "download:refused",
    "IncompleteRead(3 bytes read, 5 more expected)": "download:refused",
    "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:992)>": "download:tls",
    "Use of image disallowed by X-Robots-Tag directive": "download:opted_out",
    "unknown url type: 'example.org/a.jpg'": "download:bad_url",
    "'ascii' codec can't encode characters in position 5-6: ordinal not in range(128)": "download:bad_url",
    "hash mismatch": "download:other",
    "something of another version": "download:other",
}


@pytest.mark.parametrize("error", TEXTS)
def test_errors_of_img2dataset_become_our_classes(error: str) -> None:
    assert status_of("failed_to_download", error) == TEXTS[error]
    assert status_of("success", None) is None
    assert status_of("failed_to_resize", "image too small") == "filtered:short_side"
    assert status_of("failed_to_resize", "Image decoding error") == "decode:not_an_image"


def test_the_page_has_every_option_of_img2dataset() -> None:
    main = pytest.importorskip("img2dataset.main")
    page = (Path(__file__).parents[3] / "docs/img2dataset.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    first = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    options = set(inspect.signature(main.download).parameters)
    assert options <= first


# -------------------------------------------------------------------------------- other sources


def test_a_folder_with_texts_beside_its_images(tmp_path: Path, offline: list[Any]) -> None:
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "a/red.png").write_bytes(png("red"))
    (folder / "a/red.txt").write_text("a red square\n")
    (folder / "blue.png").write_bytes(png("blue"))
    about = {"url": "HTTP://h.org/blue.png", "aesthetic": 6.5, "caption": None, "license": 7}
    (folder / "blue.json").write_text(json.dumps(about))
    (folder / "blue.caption").write_text("a blue one")
    (folder / "green.png").write_bytes(png("green"))
    (folder / "green.json").write_text("{damaged")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not much")
    (folder / "empty.webp").touch()
    invalid = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(invalid)).write_bytes(png("white"))
    rows = run(folder, tmp_path / "out")
    assert states(rows) == {
        "a/red.png": "ok",
        "http://h.org/blue.png": "ok",
        "green.png": "ok",
        "broken.jpg": "decode:not_an_image",
        "empty.webp": "decode:no_image",
        "caf\\udce9.png": "decode:unreadable",
    }
    assert rows["a/red.png"]["alt_text"] == "a red square"
    assert rows["a/red.png"]["key"] == key_of("a/red.png")
    blue = rows["http://h.org/blue.png"]
    assert (blue["key"], blue["alt_text"]) == (url_key("http://h.org/blue.png"), "a blue one")
    assert (blue["aesthetic"], blue["license"]) == (6.5, "7")
    # A rerun sees new files and texts, and reads what is new.
    (folder / "new.png").write_bytes(png("yellow"))
    (folder / "a/red.txt").write_text("another text")
    again = run(folder, tmp_path / "out")
    assert (again["new.png"]["run"], again["a/red.png"]["run"]) == (2, 1)
    assert again["a/red.png"]["alt_text"] == "another text"
    assert not offline


def test_parquet_of_hugging_face(tmp_path: Path, offline: list[Any]) -> None:
    """Names are not unique in it; the rows are."""
    pictures = [{"bytes": png(c), "path": "image.png"} for c in ("red", "blue", "red")]
    columns = {"image": [*pictures, None], "text": ["r", "b", "r again", "none"]}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", row_group_size=2)
    ingest(config_of(tmp_path / "0.parquet", tmp_path / "out"))
    tables = [pq.read_table(file) for file in parquet_files(str(tmp_path / "out"))]
    rows = pa.concat_tables(tables).to_pylist()
    texts = {row["alt_text"]: row["status"] for row in rows}
    copies = sorted([texts.pop("r"), texts.pop("r again")])
    assert (texts, copies) == ({"b": "ok", "none": "decode:no_image"}, ["duplicate", "ok"])
    assert {row["key"] for row in rows} == {key_of(f"0.parquet#{i}") for i in range(4)}
    assert not offline


def test_raw_arrays_are_encoded(tmp_path: Path) -> None:
    red = np.zeros((3, 8, 8), np.uint8)
    red[0] = 255
    columns = {"pixels": [red.tobytes(), b"seven b"], "url": ["http://h.org/0", "http://h.org/1"]}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    rows = run(tmp_path / "0.parquet", tmp_path / "out", data={"image_encoding": "chw"})
    assert states(rows) == {"http://h.org/0": "ok", "http://h.org/1": "decode:not_an_image"}
    picture = Image.open(io.BytesIO(rows["http://h.org/0"]["image"]["bytes"]))
    assert picture.getpixel((4, 4)) == (255, 0, 0)


def test_shards_with_damages(tmp_path: Path) -> None:
    members = {"0.jpg": png("red"), "0.json": b"{", "0.txt": b"\xff red", "1.png": b"junk"}
    members |= {
        "2.png": png("blue"),
        "2.json": b'{"url": "http://h.org/2"}',
        "2.seg.png": png("green"),
    }
    file = shard(tmp_path / "0.tar", members)
    shard(tmp_path / "1.tar", {})
    with tarfile.open(file) as tar:
        os.truncate(file, tar.getmembers()[-1].offset_data + 9)
    rows = run(tmp_path, tmp_path / "out")
    found = states(rows)
    assert {name: found[name] for name in ("0.tar/0.jpg", "0.tar/1.png", "http://h.org/2")} == {
        "0.tar/0.jpg": "ok",
        "0.tar/1.png": "decode:not_an_image",
        "http://h.org/2": "ok",
    }
    assert "decode:shard" in found.values()
    assert rows["0.tar/0.jpg"]["alt_text"] == "\ufffd red"


def test_an_image_table_is_read_as_it_is(tmp_path: Path, offline: list[Any]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    (folder / "b.png").write_bytes(b"junk")
    first = run(folder, tmp_path / "first")
    second = run(tmp_path / "first", tmp_path / "second", image={"size": 16, "format": "png"})
    assert states(second) == states(first)
    picture = Image.open(io.BytesIO(second["a.png"]["image"]["bytes"]))
    assert picture.size == (16, 16)
    assert not offline


def test_a_mixture_of_images_and_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "urls.csv").write_text("url,caption\nhttp://h.org/a,text\n")
    with pytest.raises(DataError, match=r"images and a list of URLs \(urls.csv\)"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "urls.csv").write_text("file_name,label\na.png,1\n")  # notes
    assert find_images(str(tmp_path), None, {}) is not None
    (tmp_path / "urls.csv").rename(tmp_path / "0.tfrecord")
    with pytest.raises(DataError, match=r"tfrecord.*\.tar"):
        run(tmp_path, tmp_path / "out")


def test_lists_behind_a_link_and_beside_an_archive_are_lists(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/urls.csv").write_text("url\nhttp://h.org/a\n")
    (tmp_path / "there/0.tar.gz").write_bytes(b"")
    assert find_images(str(tmp_path / "there"), None, {}) is None
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "there")
    assert find_images(str(tmp_path / "in"), None, {}) is None
    (tmp_path / "there/urls.csv").unlink()
    with pytest.raises(DataError, match="links to folders are not followed"):
        find_images(str(tmp_path / "in"), None, {})
    with pytest.raises(DataError, match=r"contains \.gz files: decompress"):
        find_images(str(tmp_path / "there"), None, {})


def test_a_list_with_bytes_is_a_list(web: Web, tmp_path: Path) -> None:
    """URLs may be stored as bytes, and beside them other bytes."""
    columns = {
        "url": pa.array([web.url("1.jpg").encode()]),
        "digest": pa.array([b"\x00\xff"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert states(run(tmp_path / "list.parquet", tmp_path / "out")) == {web.url("1.jpg"): "ok"}
