import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.config import build
from pipelines.execution import image_job as selection_module
from pipelines.execution.cluster import InProcess
from pipelines.execution.connection import RayConfig, check_resources
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.read_images import ReadImages
from pipelines.execution.steps import Chunk
from pipelines.images.plans import make_plan, read_plan
from pipelines.images.rows import IMAGE_ROW
from pipelines.images.selection import Selection, _kth_smallest
from pipelines.storage.tables import Table
from tests.pipelines.image_jobs import open_table
from tests.pipelines.pictures.files import encoded, photo, png
from vlv_model.errors import DataError, RunError
from vlv_model.squares import Square


def selection(table: Path, output: Path, **more: object) -> Selection:
    values = {"input": str(table), "output": str(output), "rows_per_chunk": 50, **more}
    return build(Selection, values)


def test_chunks_hold_every_selected_row_once(pair_table: Path, tmp_path: Path) -> None:
    table = open_table("caption", selection(pair_table, tmp_path / "t"), {})
    assert table.describe()["planned_rows"] == 120
    read = ReadImages(table, square=Square(64))
    blocks = [read(Chunk(number)).rows for number in table.pending()]
    assert [block.num_rows for block in blocks] == [50, 50, 20]
    keys = [key for block in blocks for key in block["key"].to_pylist()]
    assert len(set(keys)) == 120
    assert {s for b in blocks for s in b["status"].to_pylist()} == {"ok"}
    assert all(len(p) == 3 * 64 * 64 for b in blocks for p in b["pixels"].to_pylist())


def test_reading_images_needs_no_torch(pair_table: Path, tmp_path: Path) -> None:
    """Each of Ray's workers that reads would import it: seconds and 200 MB."""
    table = open_table("caption", selection(pair_table, tmp_path / "t"), {})
    program = (
        "import sys; from pipelines.execution.image_job import ReadImages, Square, Table; "
        "from pipelines.execution.steps import Chunk; "
        f"from pathlib import Path; read = ReadImages(Table(Path({str(table.folder)!r})), Square(64)); "
        "print(read(Chunk(0)).rows['status'][0], 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.split() == ["ok", "False"], ended.stderr


def planned_keys(select: Selection) -> list[int]:
    table = open_table("caption", select, {})
    plans = [read_plan(table.folder, number) for number in table.pending()]
    return [key for plan in plans for key in plan["key"].to_pylist()]


def test_splits_part_the_table(pair_table: Path, tmp_path: Path) -> None:
    chosen = {
        split: set(planned_keys(selection(pair_table, tmp_path / split, split=split, holdout=0.3)))
        for split in ("all", "train", "holdout")
    }
    assert chosen["train"] | chosen["holdout"] == chosen["all"]
    assert not chosen["train"] & chosen["holdout"]
    smallest = sorted(chosen["train"])[:7]
    select = selection(pair_table, tmp_path / "limit", split="train", holdout=0.3, limit=7)
    assert sorted(planned_keys(select)) == smallest


def test_nothing_selected_is_one_line(pair_table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="selects no image"):
        planned_keys(selection(pair_table, tmp_path / "t", split="holdout", holdout=1e-9))


def write_keys(folder: Path, *files: list[int]) -> list[Path]:
    folder.mkdir()
    for number, keys in enumerate(files):
        rows = [{"key": key, "image": {"bytes": b"x"}, "status": "ok"} for key in keys]
        pq.write_table(pa.Table.from_pylist(rows, IMAGE_ROW), folder / f"{number}.parquet")
    return sorted(folder.iterdir())


@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_key_that_occurs_twice_is_found_in_any_order(
    keys: list[list[int]], ordered: bool
) -> None:
    """Keys in order pass by; others are sorted on disk."""
    every = [key for some in keys for key in some]
    if ordered:
        every.sort()
        ends = np.cumsum([len(some) for some in keys]).tolist()
        keys = [every[end - len(some) : end] for some, end in zip(keys, ends, strict=True)]
    with tempfile.TemporaryDirectory() as place:
        files = write_keys(Path(place, "t"), *keys)
        if len(set(every)) == len(every) and every:
            assert make_plan(files, lambda keys: keys != every[0]).rows == len(every) - 1
            return
        with pytest.raises(DataError) as refused:
            make_plan(files, lambda keys: keys == keys)
        if every:
            (key,) = re.findall(r"key (-?\d+) occurs more than once", str(refused.value))
            assert every.count(int(key)) > 1
        else:
            assert "no row of status 'ok'" in str(refused.value)


@pytest.mark.parametrize("waiting", [0, 5, 1000])
def test_a_limit_is_that_of_the_sorted_keys(waiting: int) -> None:
    keys = np.random.default_rng(0).permutation(50)
    for count in (1, 7, 50, 60):
        assert _kth_smallest(count, np.array_split(keys, 6), waiting) == min(count, 50) - 1


def test_a_rewritten_table_is_another_run(pair_table: Path, tmp_path: Path) -> None:
    """The same keys in other places: a plan of the old places would caption the wrong images."""
    images = tmp_path / "images"
    shutil.copytree(pair_table, images)
    open_table("caption", selection(images, tmp_path / "t"), {})
    file = images / "0.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.take(list(reversed(range(len(rows))))), file, row_group_size=16)
    with pytest.raises(RunError, match="layout"):
        open_table("caption", selection(images, tmp_path / "t"), {})


def test_one_broken_image_is_one_row(tmp_path: Path, pair_table: Path) -> None:
    good = pq.read_table(pair_table / "0.parquet").to_pylist()[0]
    bad = {"key": 1, "image": {"bytes": b"\x89PNG broken", "path": None}, "status": "ok"}
    table = pa.Table.from_pylist([good, bad], schema=IMAGE_ROW)
    pq.write_table(table, tmp_path / "t.parquet")
    planned = open_table("caption", selection(tmp_path / "t.parquet", tmp_path / "out"), {})
    block = ReadImages(planned, Square(64))(Chunk(0)).rows.to_pylist()
    assert sorted(row["status"] for row in block) == ["decode:not_an_image", "ok"]
    assert "key 1" in next(row["error"] for row in block if row["status"] != "ok")


def test_images_from_elsewhere_are_opened_by_the_rules_of_ingest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow by itself starts Ghostscript for a PostScript file, and fills half a JPEG with grey."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    whole = encoded(photo(300, 200), "JPEG")
    files = {
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "bomb.png": png((60_000, 60_000, 8, 2), b""),
        "half.jpg": whole[: len(whole) // 2] + b"\xff\xd9",
        "whole.jpg": whole,
    }
    (tmp_path / "images").mkdir()
    for name, data in files.items():
        (tmp_path / "images" / name).write_bytes(data)
    planned = open_table("caption", selection(tmp_path / "images", tmp_path / "out"), {})
    block = ReadImages(planned, Square(64))(Chunk(0)).rows.to_pylist()
    assert {row["name"]: row["status"] for row in block} == {
        "postscript.jpg": "decode:not_an_image",
        "bomb.png": "decode:too_large",
        "half.jpg": "decode:corrupt",
        "whole.jpg": "ok",
    }
    assert not started.exists()


def test_a_table_that_is_gone_is_no_broken_image(tmp_path: Path, pair_table: Path) -> None:
    """A fault of the storage must not become rows that say that images are broken."""
    shutil.copytree(pair_table, tmp_path / "images")
    planned = open_table("caption", selection(tmp_path / "images", tmp_path / "out"), {})
    read = ReadImages(planned, Square(64))
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match="no longer exists"):
        read(Chunk(0))


@pytest.mark.parametrize(
    ("settings", "there", "count"),
    [
        ({"use_gpu": True}, {"GPU": 3.0, "CPU": 32.0}, (3, 3)),
        ({"use_gpu": True}, {"CPU": 32.0}, (1, 1)),  # the cluster may be asleep
        ({"use_gpu": False}, {"CPU": 1000.0}, (os.cpu_count(),) * 2),
        ({"use_gpu": False}, {"CPU": 1.0}, (1, 1)),
        ({"use_gpu": False, "num_actors": 5}, {"CPU": 1.0}, (5, 5)),
        ({"use_gpu": True, "num_actors": (2, 9)}, {"GPU": 3.0}, (2, 9)),
    ],
)
def test_as_many_actors_as_can_work_at_once(monkeypatch, settings, there, count):
    class There(InProcess):
        def resources(self):
            return there

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ActorConfig(**settings).count(RayConfig(), There()) == count


def test_going_on_reads_no_key_again(pair_table: Path, tmp_path: Path, monkeypatch) -> None:
    """While the input is as it was; else its rows are compared, as they are here."""
    shutil.copytree(pair_table, tmp_path / "images")
    select = selection(tmp_path / "images", tmp_path / "t", rows_per_chunk=3)
    made = open_table("caption", select, {}).describe()
    monkeypatch.setattr(selection_module, "make_plan", lambda *_: pytest.fail("keys are read"))
    assert open_table("caption", select, {}).describe() == made
    with pytest.raises(RunError, match=r"data\.limit: None there, 5 here"):
        open_table("caption", selection(tmp_path / "images", tmp_path / "t", limit=5), {})
    # Nor is anything listed for it, though an input of which rows are taken has a listing.
    with pytest.raises(
        RunError, match=r"\(data\.where: None there, key > 1 here, data\.input \(files\): None"
    ):
        open_table("caption", selection(tmp_path / "images", tmp_path / "t", where="key > 1"), {})
    monkeypatch.undo()
    os.utime(tmp_path / "images/0.parquet", (1, 1))  # copied, and the same
    assert open_table("caption", select, {}).describe() == made
    assert ReadImages(Table(tmp_path / "t"), Square(64))(Chunk(39)).rows.num_rows == 3


def test_a_task_reads_no_more_of_a_larger_plan(tmp_path: Path) -> None:
    keys = pa.array(range(0, 35_000, 7), pa.int64())
    images = pa.nulls(5000, IMAGE_ROW.field("image").type)
    pq.write_table(pa.table({"key": keys, "image": images}), tmp_path / "x", row_group_size=16)
    assert make_plan([tmp_path / "x"], lambda keys: keys >= 0, (tmp_path, 2)).rows == 5000
    assert len(list((tmp_path / "_plan").iterdir())) == 3
    for number in (0, 1023, 1024, 2499):
        rows = read_plan(tmp_path, number).to_pylist()
        assert [row["key"] for row in rows] == [number * 14, number * 14 + 7]
        assert rows[0] == {
            "key": number * 14, "file": 0, "group": number // 8, "row": number * 2 % 16,
        }  # fmt: skip


def test_use_gpu_defaults_to_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    here, cluster = RayConfig(), RayConfig(address="10.0.0.1:6379")
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert ActorConfig().on(here).use_gpu is has_gpu
        assert ActorConfig().on(RayConfig(address="in-process")).use_gpu is has_gpu
        assert ActorConfig().on(cluster).use_gpu is True  # it may start machines with GPUs
        for given_value in (True, False):
            assert ActorConfig(use_gpu=given_value).on(cluster).use_gpu is given_value
        assert ActorConfig(use_gpu=False).on(here).use_gpu is False
        if has_gpu:
            assert ActorConfig(use_gpu=True).on(here).use_gpu is True
            continue
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with pytest.raises(
            RunError, match=r"^actors\.use_gpu=true: this machine has no GPU .* set "
        ):
            ActorConfig(use_gpu=True).on(here)
        monkeypatch.setattr("ray.is_initialized", lambda: True)  # it knows its GPUs
        assert ActorConfig(use_gpu=True).on(here).use_gpu is True


@pytest.mark.parametrize("asked", ["actors.num_actors=2", "train.num_workers=2"])
def test_a_missing_gpu_names_the_setting_in_full(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = f"{asked.partition('.')[0]}.use_gpu=false"
    with pytest.raises(RunError, match=f"^{asked}: 2 GPUs are needed, 0 are there: set {setting} "):
        check_resources(RayConfig(), InProcess(), {"GPU": 2}, asked)
    check_resources(RayConfig(address="10.0.0.1:6379"), InProcess(), {"GPU": 2}, asked)
    line = capsys.readouterr().out
    assert f"waiting for the cluster to start nodes ({setting} runs on CPUs)" in line
