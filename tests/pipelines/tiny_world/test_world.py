"""The tiny world's files and web server, the input of ingest and stage 2."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.tiny_world import scenes
from pipelines.tiny_world.dataset import drawing_seed, find_photos, write_photos, write_world
from pipelines.tiny_world.server import HOSTILE, PORT_FILE, serve
from vlv_model.errors import DataError, RunError


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read()


def test_served_pictures_are_the_scenes_of_the_teacher(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        files = write_world(tmp_path, web.base_url, 6, seed=3, split="test", num_broken=9)
        teacher = pq.read_table(files.teacher).to_pylist()
        assert len(teacher) == files.num_images == 6
        for i, row in enumerate(teacher):
            scene = scenes.parse(row["caption"])
            assert scene is not None
            shown = np.asarray(Image.open(BytesIO(_get(row["url"]))))
            drawn = np.asarray(scenes.draw(scene, drawing_seed(3, "test", i)))
            assert (shown == drawn).all()
        metadata = pq.read_table(files.metadata)
        assert set(metadata["URL"].to_pylist()) > {row["url"] for row in teacher}
        assert metadata.num_rows == len(set(metadata["URL"].to_pylist())) == 6 + 9
        assert not set(metadata["TEXT"].to_pylist()) & {row["caption"] for row in teacher}


def test_writing_again_changes_no_byte(tmp_path: Path) -> None:
    first = write_world(tmp_path, "http://127.0.0.1:1", 4, num_broken=2)
    before = first.metadata.read_bytes(), first.teacher.read_bytes()
    again = write_world(tmp_path, "http://127.0.0.1:1", 4, num_broken=2)
    assert (again.metadata.read_bytes(), again.teacher.read_bytes()) == before


def test_worlds_in_subfolders_share_a_server(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        files = write_world(tmp_path / "train", f"{web.base_url}/train", 2, num_broken=2)
        for url in pq.read_table(files.teacher)["url"].to_pylist():
            assert _get(url)
        broken = [u for u in pq.read_table(files.metadata)["URL"].to_pylist() if "hostile" in u]
        assert all(u.startswith(f"{web.base_url}/hostile/") for u in broken)


def test_the_port_is_reused_unless_taken(tmp_path: Path) -> None:
    with serve(tmp_path) as first:
        with serve(tmp_path) as other:  # taken: another one
            assert other.base_url != first.base_url
        last = other.base_url
    with serve(tmp_path) as again:
        assert again.base_url == last


def test_keep_port_reuses_the_port_or_raises(tmp_path: Path) -> None:
    with serve(tmp_path) as first:
        port = first.base_url.rpartition(":")[2]
        with pytest.raises(RunError, match=f"port {port} of the earlier attempt is in use"):
            serve(tmp_path, keep_port=True).__enter__()
        assert (tmp_path / PORT_FILE).read_text() == port
    with serve(tmp_path, keep_port=True) as again:
        assert again.base_url == first.base_url


@pytest.mark.parametrize("memory", [None, "", "no port", "99999", "-1"])
def test_keep_port_without_a_saved_port_raises(tmp_path: Path, memory: str | None) -> None:
    if memory is not None:
        (tmp_path / PORT_FILE).write_text(memory)
    with pytest.raises(RunError, match="has no valid port"):
        serve(tmp_path, keep_port=True).__enter__()
    with serve(tmp_path) as web:  # any free one
        assert web.base_url


def test_nothing_outside_the_folder_is_served(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as web:
        for path in ("/../secret", "/%2e%2e/secret", "/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                _get(web.base_url + path)
            assert refused.value.code == 404


def test_hostile_answers_are_known_by_name(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        with pytest.raises(urllib.error.HTTPError) as gone:
            _get(web.hostile("gone"))
        assert gone.value.code == 410
        with pytest.raises(OSError, match=r"(?i)truncated"):
            Image.open(BytesIO(_get(web.hostile("truncated")))).load()
        with pytest.raises(KeyError, match=next(iter(HOSTILE))):
            web.hostile("polite")


def test_photographs_are_captioned_by_index_or_by_name(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "trip").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(photos / "trip" / "old red_bridge.jpg")
    Image.new("RGB", (20, 10)).save(photos / "b.PNG")
    (photos / "index.jsonl").write_text('{"file": "b.PNG", "captions": ["a black flag", "x"]}\n')
    with serve(tmp_path) as web:
        files = write_photos(tmp_path, web.base_url, photos)
        teacher = {row["caption"]: row["url"] for row in pq.read_table(files.teacher).to_pylist()}
        assert set(teacher) == {"a black flag", "old red bridge"}
        assert Image.open(BytesIO(_get(teacher["old red bridge"]))).size == (40, 30)
    sizes = pq.read_table(files.metadata, columns=["WIDTH", "HEIGHT"]).to_pylist()
    assert {(row["WIDTH"], row["HEIGHT"]) for row in sizes} == {(40, 30), (20, 10)}


def photograph(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file


def test_photographs_with_the_same_name_are_kept(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name, colour in (("a.png", "red"), ("images/a.png", "lime"), ("b/a.png", "blue")):
        photograph(photos / name, colour)
    with serve(tmp_path) as web:
        files = write_photos(tmp_path, web.base_url, photos)
        urls = pq.read_table(files.teacher)["url"].to_pylist()
        shown = {Image.open(BytesIO(_get(url))).getpixel((0, 0)) for url in urls}
    assert shown == {(255, 0, 0), (0, 255, 0), (0, 0, 255)}


def test_other_files_are_skipped(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    good = photograph(photos / "good.png")
    (photos / "folder.jpg").mkdir()
    (photos / "dangling.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    os.mkfifo(photos / "pipe.png")
    assert find_photos(photos) == [good]
    files = write_photos(tmp_path, "http://127.0.0.1:1", photos)
    assert files.num_images == 1


def test_names_that_are_not_utf8_are_served(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 100%.png")
    try:
        photograph(tmp_path / "photos" / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with serve(tmp_path) as web:
        files = write_photos(tmp_path, web.base_url, tmp_path / "photos")
        (row,) = pq.read_table(files.teacher).to_pylist()
        assert row["url"].endswith("/images/caf%E9%20100%25.png")
        assert row["caption"] == "caf\N{REPLACEMENT CHARACTER} 100%"
        assert _get(row["url"]) == _get(web.url(f"images/{name}"))


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    for photos, message in [
        (tmp_path, "holds no photographs"),
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / ("x" * 300), "does not exist"),
    ]:
        for refuse in (find_photos, lambda p: write_photos(tmp_path / "w", "http://a", p)):
            with pytest.raises(DataError, match=f"photos=.* {message}"):
                refuse(photos)


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "a.png", "captions": [5]}',
        '{"file": "a.png", "captions": "red"}',
        '{"file": "a.png", "captions": [null, "red"]}',
        '{"file": "a.png", "captions": ["\\ud800"]}',
        '{"file": 5, "captions": ["red"]}',
        '{"file": "a.png"}',
        '["file", "captions"]',
        "red",
        "[" * 100_000,
    ],
)
def test_a_bad_index_line_gives_a_one_line_error(tmp_path: Path, line: str) -> None:
    photograph(tmp_path / "photos/a.png")
    (tmp_path / "photos/index.jsonl").write_text('{"file": "x", "captions": []}\n\n' + line)
    with pytest.raises(DataError, match=r"index\.jsonl line 3 is not \{") as raised:
        write_photos(tmp_path, "http://127.0.0.1:1", tmp_path / "photos")
    assert len(str(raised.value)) < 400


def test_an_index_that_is_not_text_gives_a_one_line_error(tmp_path: Path) -> None:
    index = photograph(tmp_path / "photos/a.png").with_name("index.jsonl")
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"index\.jsonl cannot be read"):
        write_photos(tmp_path, "http://127.0.0.1:1", tmp_path / "photos")
    index.unlink()
    index.mkdir()
    with pytest.raises(DataError, match=r"index\.jsonl cannot be read"):
        write_photos(tmp_path, "http://127.0.0.1:1", tmp_path / "photos")


def test_an_index_may_have_a_mark_and_line_separators_in_captions(tmp_path: Path) -> None:
    index = photograph(tmp_path / "photos/a.png").with_name("index.jsonl")
    text = '{"file": "a.png", "captions": ["red\u2028and blue"]}\r\n'
    index.write_text(text, encoding="utf-8-sig", newline="")
    files = write_photos(tmp_path, "http://127.0.0.1:1", tmp_path / "photos")
    assert pq.read_table(files.teacher)["caption"].to_pylist() == ["red\u2028and blue"]


def made_photographs(folder: Path) -> Path:
    """Three drawings, and an index with several captions each and fields that are ignored."""
    entries: list[dict[str, object]] = []
    for number, scene in enumerate(scenes.sample(seed=5, n=3)):
        file = folder / f"images/{number:012d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = scenes.draw(scene, number)
        picture.save(file, "JPEG")
        captions = [f"Drawing {number} of a scene.", scenes.caption(scene)]
        about = {"width": picture.width, "height": picture.height, "mode": picture.mode}
        entries.append({"file": f"images/{file.name}", "captions": captions, **about})
    (folder / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder


@pytest.mark.parametrize(
    ("source", "count", "caption"),
    [
        ("made", 3, "Drawing 1 of a scene."),
        ("shared", 150, "A big burly grizzly bear is show with grass in the background."),
    ],
)
def test_photographs_of_an_index_have_its_first_captions(
    source: str, count: int, caption: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if source == "made":
        photos = made_photographs(tmp_path / "photos")
    else:
        photos = request.getfixturevalue("shared_dir") / "photos"
    files = write_photos(tmp_path / "web", "http://127.0.0.1:1", photos)
    captions = pq.read_table(files.teacher)["caption"].to_pylist()
    assert len(captions) == count
    assert caption in captions
