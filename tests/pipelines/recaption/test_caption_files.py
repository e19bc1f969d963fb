"""`jobs/caption.py` takes what a shell gives it: files, folders, globs, and names of any kind."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.main import main
from pipelines.images.listing import list_images
from pipelines.recaption.caption_files import caption_files
from pipelines.recaption.config import CaptionConfig
from pipelines.recaption.find_files import escaped, find_files
from tests.jobs.conftest import ROOT, Job, job  # noqa: F401
from tests.vlv_model.drawings import scenes

TAB, LATIN = "tab\tnew\nline.png", os.fsdecode(b"latin\xe9.png")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = scenes(number + 1, seed=1)[number].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with three good images, a broken one, and files that are no images."""
    monkeypatch.chdir(tmp_path)
    Path("photos/deep").mkdir(parents=True)
    Path("photos/.hidden").mkdir()
    Path("empty").mkdir()
    for number, name in enumerate(("a.png", f"deep/{TAB}", f"deep/{LATIN}")):
        Path("photos", name).write_bytes(picture(number))
    Path("photos/.hidden/x.png").write_bytes(picture(0))
    Path("photos/broken.png").write_bytes(picture(0)[:-60])
    Path("photos/notes.txt").write_text("milk")
    return tmp_path / "photos"


def names(*words: str) -> list[str]:
    return [file.path for file in find_files(words)[0]]


def test_files_folders_and_globs_are_found_once_in_the_order_given(photos: Path) -> None:
    deep = [f"photos/deep/{LATIN}", f"photos/deep/{TAB}"]
    assert sorted(names("photos")) == sorted(["photos/a.png", "photos/broken.png", *deep])
    assert names("photos/notes.txt", "photos/a.png", "photos/notes.txt") == [
        "photos/notes.txt",
        "photos/a.png",
    ]
    assert names("photos/*.png") == ["photos/a.png", "photos/broken.png"]
    assert sorted(names("photos/**/*.png")) == sorted(names("photos"))
    assert names("nowhere.png") == ["nowhere.png"]  # fails when it is read


def test_words_without_an_image_are_named_with_the_reason(photos: Path) -> None:
    (photos / "_table.json").write_text("{}")
    files, problems = find_files(["empty", "photos/*.gif", "s3://bucket/x.png", "photos"])
    assert not files
    for word, reason in {
        "empty": "without an image file",
        "photos/*.gif": "matches no file",
        "s3://bucket/x.png": "is a URL",
        "photos": "jobs/recaption.py data.input=photos",
    }.items():
        assert reason in problems[word]


def test_keys_are_those_of_recaption(photos: Path, tmp_path: Path) -> None:
    """So that a sampled caption is the same one."""
    (listing,), _ = list_images(tmp_path / "table", str(photos))
    assert {file.key for file in find_files(["photos"])[0]} == set(
        pq.read_table(listing)["key"].to_pylist()
    )


def captions(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> tuple[int, bytes, bytes]:
    monkeypatch.setattr(sys, "argv", ["jobs/caption.py", *arguments])
    status = main(CaptionConfig, caption_files, "", {"": "image", "--format": "format"})
    ended = capsysbinary.readouterr()
    return status, ended.out, ended.err


def test_good_files_are_captioned_and_bad_ones_named(
    photos: Path,
    trained_captioner: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    settings = ["--model", str(trained_captioner), "generate.max_new_tokens=4"]
    words = ["photos", "photos/notes.txt", "nowhere.png", "empty", *settings]
    status, out, err = captions(words, monkeypatch, capsysbinary)
    assert status == 2
    table = dict(line.split(b"\t") for line in out.splitlines())
    good = ["photos/a.png", f"photos/deep/{TAB}", f"photos/deep/{LATIN}"]
    assert set(table) == {os.fsencode(escaped(name)) for name in good}
    bad = err.decode().splitlines()
    assert [line.split()[0] for line in bad[:-1]] == [
        "empty", "photos/broken.png", "photos/notes.txt", "nowhere.png",
    ]  # fmt: skip
    assert bad[-1] == "error: 4 of 7 have no caption: the lines above say why"

    status, out, _ = captions(["photos", *settings, "--format", "json"], monkeypatch, capsysbinary)
    assert status == 2
    answer = json.loads(out.decode())
    assert {os.fsencode(escaped(k)): escaped(v).encode() for k, v in answer.items()} == table

    status, out, err = captions(["photos/a.png", *settings], monkeypatch, capsysbinary)
    assert (status, err) == (0, b"")
    assert escaped(out.decode().removesuffix("\n")).encode() == table[b"photos/a.png"]


def test_one_line_says_what_is_missing(job: Job, photos: Path, trained_captioner: Path) -> None:  # noqa: F811
    for words, line in (
        ([], "give image files, folders or globs"),
        (["photos/a.png"], "setting 'model.path' is required"),
        (["empty", "--model", trained_captioner], "empty is a folder without an image file"),
        (["photos/broken.png", "--model", trained_captioner], "photos/broken.png cannot be read"),
    ):
        ended = job("caption", *words)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.count("\n") == 1
        assert line in ended.err


def test_input_is_checked_before_torch_is_imported(photos: Path, trained_captioner: Path) -> None:
    program = (
        "import sys; from pipelines.cli.main import main; from pipelines.recaption import caption_files;"
        "from pipelines.recaption.config import CaptionConfig;"
        "main(CaptionConfig, caption_files.caption_files, '', {'': 'image'});"
        "print('torch' in sys.modules)"
    )
    words = ["photos/notes.txt", f"model.path={trained_captioner}"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.stdout == "False\n"
    assert "photos/notes.txt cannot be read as an image" in ended.stderr
