"""The tiny world as files and as a web: what ingest and stage 2 are given."""

from __future__ import annotations

import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.tiny_world import scenes
from pipelines.tiny_world.dataset import drawing_seed, write_photos, write_world
from pipelines.tiny_world.server import HOSTILE, serve
from vlv_model.errors import DataError


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


def test_the_port_is_remembered_and_given_up_when_taken(tmp_path: Path) -> None:
    with serve(tmp_path) as first:
        with serve(tmp_path) as other:  # taken: another one
            assert other.base_url != first.base_url
        last = other.base_url
    with serve(tmp_path) as again:
        assert again.base_url == last


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


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no photographs"):
        write_photos(tmp_path / "world", "http://127.0.0.1:1", tmp_path)


def test_shared_photographs_have_human_captions(tmp_path: Path, shared_dir: Path) -> None:
    files = write_photos(tmp_path, "http://127.0.0.1:1", shared_dir / "photos")
    captions = pq.read_table(files.teacher)["caption"].to_pylist()
    assert len(captions) == 150
    assert "A big burly grizzly bear is show with grass in the background." in captions
