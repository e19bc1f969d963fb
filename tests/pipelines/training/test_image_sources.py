"""Stage 1 trains from images wherever they lie, and a broken one costs its row only."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.config import build, load
from pipelines.estimate.rows import count_rows
from pipelines.estimate.sample import sample_lines
from pipelines.images.random_access import RowIndex, in_holdout
from pipelines.images.rows import key_of
from pipelines.images.selection import ImageInput
from pipelines.tiny_world import scenes
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import GlobalOrder, keys_digest
from pipelines.training.job import open_run
from pipelines.training.metrics import read_metrics
from pipelines.training.run_captions import captions_of_run
from pipelines.training.run_folder import claim, list_run_images
from pipelines.training.run_rows import save_keys
from pipelines.training.skipped_rows import (
    HELD_OUT,
    SkippedRow,
    SkippedRows,
    skipped_line,
    skipped_rows,
)
from tests.conftest import SMALLEST
from tests.pipelines.foreign import shard
from tests.pipelines.training.worlds import run_worlds, segment
from vlv_model.errors import DataError, RunError

NAMES = [f"{number:09d}" for number in range(24)]
KEYS = np.array([key_of(name) for name in NAMES])
HELD = in_holdout(KEYS, 0.2)
BROKEN = {NAMES[i] for mask in (HELD, ~HELD) for i in np.flatnonzero(mask)[:2]}
STEPS, ROWS, BEGUN = 5, 6, 2  # more than an epoch


def photographs() -> dict[str, bytes]:
    """Image files by name, of which four are broken."""
    files = {}
    for number, (name, scene) in enumerate(
        zip(NAMES, scenes.sample(seed=2, n=len(NAMES)), strict=True)
    ):
        content = io.BytesIO()
        scenes.draw(scene, number).save(content, "PNG")
        files[name] = content.getvalue()[: 60 if name in BROKEN else None]
    return files


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / "some" / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (root / "some" / f"{name}.png").write_bytes(content)
    return root


def as_shards(root: Path, files: dict[str, bytes]) -> Path:
    names = list(files)
    for number in range(2):
        members = {f"{name}.png": files[name] for name in names[number::2]}
        shard(root / f"{number}.tar", {**members, f"{names[0]}.json": b"{}"})
    return root


def as_hugging_face(root: Path, files: dict[str, bytes]) -> Path:
    images = [{"bytes": content, "path": f"{name}.png"} for name, content in files.items()]
    pq.write_table(pa.table({"image": images}), root / "train.parquet", row_group_size=7)
    return root


def as_img2dataset(root: Path, files: dict[str, bytes]) -> Path:
    """Its Parquet output: keys of nine digits, and bytes by the name of the format."""
    rows = {"key": list(files), "jpg": list(files.values()), "status": ["success"] * len(files)}
    pq.write_table(pa.table(rows), root / "00000.parquet")
    return root


def as_arrays(root: Path, files: dict[str, bytes]) -> Path:
    def array(name: str) -> bytes:
        if name in BROKEN:
            return b"1"
        picture = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        return picture.transpose(2, 0, 1).tobytes()

    rows = {"file_name": [f"{name}.bin" for name in files], "image": [array(n) for n in files]}
    rows["caption"] = [f"picture {number}" for number in range(len(files))]
    pq.write_table(pa.table(rows), root / "raw.parquet")
    return root


LAYOUTS: dict[str, tuple[Callable[[Path, dict[str, bytes]], Path], str]] = {
    "folder": (as_folder, "file"),
    "shards": (as_shards, "file"),
    "hugging-face": (as_hugging_face, "file"),
    "img2dataset": (as_img2dataset, "file"),
    "arrays": (as_arrays, "chw"),
}


def config(images: Path, run_dir: Path, *more: str) -> Stage1Config:
    return load(Stage1Config, None, [
        f"data.input={images}", "data.key_column=__key__", f"run_dir={run_dir}",
        f"model.path={SMALLEST}", "train.use_gpu=false", "data.holdout=0.2", f"train.steps={STEPS}",
        f"train.global_batch_size={ROWS}", "train.micro_batch_size=2", "train.learning_rate=0.002",
        "train.eval_every=100", "train.checkpoint_every=1", "train.keep_checkpoints=9",
        "train.num_workers=1", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files, folder = photographs(), tmp_path_factory.mktemp("sources")
    found = {}
    for name, (write, _) in LAYOUTS.items():
        (folder / name).mkdir()
        found[name] = write(folder / name, files)
    return found


@pytest.mark.end_to_end
def test_every_layout_trains_and_resumes_with_the_same_losses(
    sources: dict[str, Path], forked_python: Path, tmp_path: Path
) -> None:
    """Four broken images are left out; a training goes on in mid-epoch with equal losses.

    Arrays beside their captions also train stage 2.
    """
    whole, rest = [], []
    for name, images in sources.items():
        encoding = f"data.image_encoding={LAYOUTS[name][1]}"
        for run, group in ((name, whole), (f"{name}-again", rest)):
            settings = config(images, tmp_path / run, encoding)
            after = tmp_path / name / f"checkpoints/step-{BEGUN:08d}" if group is rest else None
            opened = open_run(settings)
            save_keys(tmp_path / run, opened.keys, str(images))
            group.append(segment(settings, SMALLEST, after, listed=opened.files))
    captions = stage2(sources["arrays"], tmp_path / "captions")
    parent = tmp_path / f"arrays/checkpoints/step-{STEPS:08d}"
    rest.append(segment(captions, SMALLEST, parent=parent, listed=prepared(captions)))
    run_worlds([(1, whole), (1, rest)], tmp_path, forked_python)

    def events(run: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_metrics(tmp_path / run) if event["event"] == kind]

    keys = np.sort(KEYS[~HELD])
    broken = {key_of(name) for name in BROKEN}
    order = GlobalOrder(len(keys), config(tmp_path, tmp_path).train.seed)
    rows = [[int(keys[i]) for _, i in order.take(step * ROWS, ROWS)] for step in range(STEPS)]
    used = [[key for key in step if key not in broken] for step in rows]
    assert [len(step) for step in used] != [ROWS] * STEPS
    expected = [event["loss"] for event in events("folder", "step")]
    for name in sources:
        steps = events(name, "step")
        assert [step["keys"] for step in steps] == [f"{keys_digest(k):016x}" for k in used], name
        assert [step["loss"] for step in steps] == expected, name
        resumed = [step["loss"] for step in events(f"{name}-again", "step")]
        assert resumed == expected[BEGUN:], name
        heldout = [(e["heldout_loss"], e["rows"]) for e in events(name, "eval")]
        assert heldout == [(e["heldout_loss"], e["rows"]) for e in events("folder", "eval")]
        assert heldout[0][1] == HELD.sum() - 2
        skipped = skipped_rows(tmp_path / name)
        assert {row.key for row in skipped} == {k for k in broken if any(k in r for r in rows)} | {
            int(key) for key in KEYS[HELD] if key in broken
        }
        statuses = {row.status for row in skipped}
        assert statuses == {"decode:not_an_image" if name == "arrays" else "decode:corrupt"}

    of_arrays = events("captions", "step")
    assert [step["keys"] for step in of_arrays] == [f"{keys_digest(k):016x}" for k in used]
    assert all(0 < step["loss"] < 20 for step in of_arrays)


def stage2(images: Path, run_dir: Path) -> Stage2Config:
    return load(Stage2Config, None, [
        f"data.input={images}", "data.key_column=__key__", "data.image_encoding=chw",
        f"run_dir={run_dir}", "train.use_gpu=false", "data.holdout=0.2", f"train.steps={STEPS}",
        f"train.global_batch_size={ROWS}", "train.micro_batch_size=2", "train.num_workers=1",
        "train.eval_every=100", "train.checkpoint_every=100",
    ])  # fmt: skip


def prepared(settings: Stage2Config) -> list[Path]:
    """The listing of a run's images; also writes the index of their captions."""
    files, _ = list_run_images(settings, {})
    captions = captions_of_run(settings, files, RowIndex.open(files))
    save_keys(Path(settings.run_dir), captions.index.keys, settings.data.input)
    return files


def test_a_run_keeps_its_listing_and_refuses_other_images(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    images, run_dir = as_folder(tmp_path / "images", photographs()), tmp_path / "run"
    begun = open_run(config(images, run_dir))
    claim(run_dir, begun.identity)
    save_keys(run_dir, begun.keys, str(images))
    assert begun.files[0].is_relative_to(run_dir / "images")
    (images / "another.png").write_bytes(b"")
    assert len(open_run(config(images, run_dir)).keys) == len(NAMES)  # as it was listed
    moved = images.rename(tmp_path / "moved")
    (moved / "another.png").unlink()
    assert open_run(config(moved, run_dir)).identity == begun.identity
    (moved / "another.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"holds another run .*key_column: __key__ there, None here"):
        open_run(config(moved, run_dir, "data.key_column=none"))
    (tmp_path / "shards").mkdir()
    shards = as_shards(tmp_path / "shards", photographs())
    run_dir = tmp_path / "of-shards"
    claim(run_dir, open_run(config(shards, run_dir)).identity)
    (shards / "1.tar").write_bytes((shards / "0.tar").read_bytes() + bytes(512))
    with pytest.raises((RunError, DataError), match=r"holds another run|occurs more than once"):
        open_run(config(shards, run_dir))


def test_a_row_is_left_out_from_its_epoch_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rows").mkdir(parents=True)
    corrupt = SkippedRow(2, 7, "decode:corrupt", "why")
    unreadable = SkippedRow(1, 8, "decode:unreadable", "why")
    held_out = SkippedRow(HELD_OUT, 9, "decode:timeout", "why")
    SkippedRows(run, 0).add([corrupt, held_out], usable=9)
    SkippedRows(run, 1).add([unreadable, unreadable], usable=9)
    with (run / "rows/skipped-1.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3})[:5])  # killed while it wrote
    assert sorted(row.key for row in skipped_rows(run)) == [7, 8, 9]
    rows = SkippedRows(run, 0)
    assert "3 (1 decode:corrupt, 1 decode:timeout, 1 decode:unreadable)" in str(skipped_line(run))
    assert [(epoch, 7) in rows for epoch in range(4)] == [False, False, True, True]
    assert [(epoch, 8) in rows for epoch in range(4)] == [False, True, False, False]
    assert (HELD_OUT, 9) in rows
    assert (2, 6) not in rows


def test_most_images_failing_ends_the_run(tmp_path: Path) -> None:
    rows = SkippedRows(tmp_path, 0)
    rows.add([SkippedRow(0, key, "decode:corrupt", "why") for key in range(40)], usable=60)
    with pytest.raises(DataError, match="why; 61 of the last 121 images could not be used: check"):
        rows.add([SkippedRow(0, key, "decode:corrupt", "why") for key in range(50, 99)], usable=0)


def test_a_dry_run_shows_arrays_as_a_picture(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8) + np.array([250, 0, 0], np.uint8)
    shard(tmp_path / "a.tar", {"a.raw": red.tobytes(), "b.raw": b"1"})
    data = build(ImageInput, {"input": str(tmp_path), "image_encoding": "hwc"})
    assert "are no array of 3·s·s" in sample_lines(data)[0][1]
    shard(tmp_path / "a.tar", {"a.raw": red.tobytes()})
    ((name, line),) = sample_lines(data)
    assert name == "sample"
    assert "shows a.tar/a.raw (8 x 8): false colours" in line
    picture = Path(line.split()[0])
    assert np.asarray(Image.open(picture))[5, 5].tolist() == [250, 0, 0]
    picture.unlink()
    assert sample_lines(data.model_copy(update={"image_encoding": "file"})) == []
    assert count_rows(build(ImageInput, {"input": str(tmp_path / "none")}))[0] is None
