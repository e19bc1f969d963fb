"""Training for real: Ray Train, DeepSpeed over gloo with two workers, W&B offline."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.cli.config import load
from pipelines.execution.model import finished_checkpoints, is_finished, latest_checkpoint
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import Batch
from pipelines.training.job import train
from pipelines.training.metrics import heldout_losses, read_metrics
from pipelines.training.run_rows import split
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.errors import CheckpointError, DataError, RunError
from vlv_model.squares import Square

pytestmark = pytest.mark.end_to_end

COMMON = [
    "data.holdout=0.2", "train.use_gpu=false", "train.global_batch_size=8", "train.eval_rows=16",
    "train.micro_batch_size=2", "train.learning_rate=0.002", "train.pretrained_rate=0.01", "train.samples=0",
]  # fmt: skip
STEPS = 8


def stage1_config(table: Path, models: Path, run_dir: Path, *more: str) -> Stage1Config:
    paths = [f"data.input={table}", f"model.path={models}", f"run_dir={run_dir}"]
    run = [f"train.steps={STEPS}", "train.num_workers=2", "train.checkpoint_every=3"]
    return load(Stage1Config, None, [*paths, *COMMON, *run, "train.eval_every=4", *more])


@pytest.fixture(scope="module")
def unbroken(
    ray_local: None, pair_table: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted stage-1 run with two workers."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(stage1_config(pair_table, tiny_models, run_dir, "train.samples=3"))
    return run_dir


def steps_of(run_dir: Path, figure: str) -> list[Any]:
    return [event[figure] for event in read_metrics(run_dir) if event["event"] == "step"]


def losses(run_dir: Path) -> list[float]:
    return steps_of(run_dir, "loss")


def test_heldout_loss_falls_and_every_step_is_logged_once(unbroken: Path) -> None:
    result = json.loads((unbroken / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    assert result["rows_seen"] == STEPS * 8
    assert steps_of(unbroken, "step") == list(range(1, STEPS + 1))
    assert list(heldout_losses(unbroken)) == [0, 4, 8]


def test_checkpoints_hold_trainable_weights_only_and_are_pruned(unbroken: Path) -> None:
    kept = list(finished_checkpoints(unbroken))
    assert [folder.name for folder in kept] == ["step-00000008", "step-00000006"]
    with safe_open(kept[0] / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    frozen = ("vision_tower", "shared", "embed_tokens", "text_encoder", "unet", "vae")
    assert "encoder.learnable_queries" in names
    assert not [name for name in names if any(part in name for part in frozen)]
    description = json.loads((kept[0] / "checkpoint.json").read_text())
    assert (description["stage"], description["step"], description["rows_seen"]) == (
        "stage1",
        STEPS,
        64,
    )
    assert description["config"]["train"]["steps"] == STEPS
    weights_size = (kept[0] / "model.safetensors").stat().st_size
    whole = sum(file.stat().st_size for file in kept[0].iterdir())
    assert whole < 3.1 * weights_size  # two moments of each; the frozen ones are ten times as large


def test_pretrained_weights_have_their_own_learning_rate(unbroken: Path, tiny_models: Path) -> None:
    start = VLVAutoEncoder.from_pretrained(tiny_models).state_dict()
    end = load_file(next(iter(finished_checkpoints(unbroken))) / "model.safetensors")
    moved = {name: (weight - start[name]).abs().mean().item() for name, weight in end.items()}
    projector = moved["encoder.caption_projector.0.weight"]
    for name, distance in moved.items():
        if "fc1.weight" in name:
            assert 0 < distance < projector / 10, name


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte header, then LevelDB's log format in 32 KiB blocks."""
    content, whole = file.read_bytes(), b""
    assert content.startswith(b":W&B")
    position, block = 7, 32 * 1024
    while position + 7 <= len(content):
        if block - position % block < 7:  # a header never crosses a block's end
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        whole += content[position : position + length]
        position += length
        if kind in (1, 4):  # full, or last
            yield whole
            whole = b""


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_run(file: Path) -> Any:
    """The run record of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = map(Record.FromString, wandb_records(file))
    return next(r.run for r in records if r.WhichOneof("record_type") == "run")


def test_wandb_wrote_the_run_offline(unbroken: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = wandb_files(unbroken)
    logged: dict[str, list[float]] = {}
    for data in wandb_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                logged.setdefault(name, []).append(json.loads(item.value_json))
    assert logged["stage1/loss"] == pytest.approx(losses(unbroken))
    assert logged["stage1/heldout_loss"] == pytest.approx(list(heldout_losses(unbroken).values()))
    assert logged["stage1/samples/captions"][-1] == ["original", "reconstruction"] * 3


def pictures_of(page: Path) -> list[bytes]:
    """The images of the samples in order."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", page.read_text())
    return [base64.b64decode(content) for content in found]


def test_samples_show_held_out_images(unbroken: Path, stage2_run: Path, pair_table: Path) -> None:
    index = RowIndex.open(sorted(pair_table.glob("*.parquet")), ["caption"])
    reader = RowReader(split(index, 0.2)[1], ["caption"])
    last = unbroken / "samples" / "step-00000008.html"
    assert (
        last in (unbroken / "samples").iterdir()
    )  # others where a CPU was free beside the workers
    words = re.sub(r"<[^>]*>", " ", last.read_text().partition("<main>")[2]).split()
    assert set(words) >= {"original", "reconstruction", "key"}
    assert not {"generated", "None", "none"} & set(words)
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in pictures_of(last)]
    checkpoint = latest_checkpoint(unbroken)
    assert checkpoint is not None
    autoencoder = VLVAutoEncoder.from_pretrained(checkpoint)
    squares = [torch.from_numpy(reader.square(row, Square(64))) for row in range(3)]
    seeds = [torch.Generator().manual_seed(int(key) & (2**63 - 1)) for key in reader.index.keys[:3]]
    drawn = autoencoder.reconstruct(torch.stack(squares), seeds, num_steps=20, scheduler="ddim")
    for square, expected, original, made in zip(
        squares, drawn, pictures[::2], pictures[1::2], strict=True
    ):
        assert (original == square.permute(1, 2, 0).numpy()).all()
        assert abs(expected.permute(1, 2, 0).numpy().astype(int) - made).max() <= 1  # rounding
    page = (stage2_run / "samples" / "step-00000006.html").read_text()
    assert page.count("generated caption") == 2
    assert "no reconstruction" not in page
    for row in range(2):
        assert reader.row(row)["caption"] in page


def test_a_finished_run_is_not_trained_again(
    unbroken: Path, pair_table: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (unbroken / "metrics.jsonl").read_text()
    result = train(stage1_config(pair_table, tiny_models, unbroken))
    assert result == json.loads((unbroken / "result.json").read_text())
    assert (unbroken / "metrics.jsonl").read_text() == before
    assert "finished" in capsys.readouterr().out


def test_another_run_in_the_folder_is_refused(
    unbroken: Path, pair_table: Path, tiny_models: Path
) -> None:
    changed = stage1_config(pair_table, tiny_models, unbroken, "train.learning_rate=0.1")
    with pytest.raises(RunError, match=r"train\.learning_rate: 0\.002 there, 0\.1 here"):
        train(changed)


def kill_a_worker_after(run_dir: Path, step: int, killed: list[int]) -> None:
    """SIGKILL one training process of this test's Ray once `step` has been reached."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if any(e["event"] == "checkpoint" and e["step"] >= step for e in read_metrics(run_dir)):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # those of samples come and go
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
        time.sleep(0.02)


def test_a_killed_worker_changes_no_loss(
    unbroken: Path, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(run_dir, 3, killed))
    killer.start()
    train(stage1_config(pair_table, tiny_models, run_dir))
    killer.join()
    assert killed
    assert steps_of(run_dir, "step") == steps_of(unbroken, "step")  # each once
    assert steps_of(run_dir, "keys") == steps_of(unbroken, "keys")
    assert losses(run_dir) == pytest.approx(losses(unbroken), rel=1e-6)
    assert heldout_losses(run_dir) == pytest.approx(heldout_losses(unbroken), rel=1e-6)


@pytest.mark.faults
def test_a_preempted_machine_changes_no_loss(
    unbroken: Path, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """A checkpoint is saved on notice, and the other machine continues from it alone."""
    run_dir = tmp_path / "preempted"
    config = ["data.input", pair_table, "model.path", tiny_models, "run_dir", run_dir]
    given = [f"{name}={value}" for name, value in zip(config[::2], config[1::2], strict=True)]
    given += [*COMMON, f"train.steps={STEPS}", "train.num_workers=[1,2]", "train.eval_every=4"]
    command = [sys.executable, "-m", "tests.pipelines.training.lost_node", *given]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    step = int(ended.stdout.splitlines()[-1])
    assert 1 <= step < STEPS  # no other was due before the end
    assert steps_of(run_dir, "step") == steps_of(unbroken, "step")
    assert steps_of(run_dir, "keys") == steps_of(unbroken, "keys")
    assert losses(run_dir) == pytest.approx(losses(unbroken), rel=1e-5)


def test_a_killed_job_continues_from_the_last_complete_checkpoint(
    unbroken: Path, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """A killed driver leaves no result, a truncated line, and an incomplete checkpoint."""
    run_dir = tmp_path / "torn"
    shutil.copytree(unbroken, run_dir)
    (run_dir / "result.json").unlink()
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    (newest / "optimizer.safetensors").unlink()
    (run_dir / "samples" / "step-00000008.html").unlink()
    assert not is_finished(newest)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    # What only shows may be another: which images samples are made of, and W&B's names.
    named = tmp_path / "named"
    named.mkdir()
    for n in (1, 2):
        Image.new("RGB", (70, 64), (0, 90 * n, 0)).save(named / f"{n}.png")
    (named / "broken.png").write_bytes(b"\x89PNG")  # costs its own sample
    shows = [f"data.validation={named}", "train.samples=9"]
    shows += ["train.wandb_project=ours"]
    train(stage1_config(pair_table, tiny_models, run_dir, *shows))
    assert losses(run_dir) == pytest.approx(losses(unbroken), rel=1e-6)
    assert heldout_losses(run_dir) == pytest.approx(heldout_losses(unbroken), rel=1e-6)
    pictures = pictures_of(run_dir / "samples" / "step-00000008.html")
    originals = [np.asarray(Image.open(io.BytesIO(content))) for content in pictures[::2]]
    assert sorted(picture[0, 0].tolist() for picture in originals) == [[0, 90, 0], [0, 180, 0]]
    names = [(run.project, run.display_name) for run in map(wandb_run, wandb_files(run_dir))]
    assert sorted(names) == [("ours", f"stage1-{run_dir.name}"), ("vlv", "stage1-unbroken")]


def stage2_config(table: Path, stage1: Path, run_dir: Path, *more: str) -> Stage2Config:
    paths = [f"data.input={table}", f"model.path={stage1}", f"run_dir={run_dir}"]
    run = ["train.steps=6", "train.eval_every=6", "train.checkpoint_every=6"]
    run += ["train.num_workers=2"]
    return load(Stage2Config, None, [*paths, *COMMON, *run, *more])


@pytest.fixture(scope="module")
def stage2_run(unbroken: Path, pair_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "stage2"
    train(stage2_config(pair_table, unbroken, run_dir, "train.samples=2"))
    return run_dir


def test_stage2_trains_on_from_stage1(stage2_run: Path) -> None:
    result: dict[str, Any] = json.loads((stage2_run / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    checkpoint = latest_checkpoint(stage2_run)
    assert checkpoint is not None
    description = json.loads((checkpoint / "checkpoint.json").read_text())
    assert description["parent"]["path"] == "../../parent"
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any(name.startswith("language_projector") for name in names)
    assert any(name.startswith("language_model") for name in names)
    assert "encoder.learnable_queries" not in names  # frozen in stage 2: the parent's


def test_a_run_folder_can_be_moved(stage2_run: Path, tmp_path: Path) -> None:
    from vlv_model import VLVCaptioner

    moved = tmp_path / "elsewhere"
    shutil.copytree(stage2_run, moved)
    checkpoint = latest_checkpoint(moved)
    assert checkpoint is not None
    VLVCaptioner.from_pretrained(checkpoint)


def test_the_loss_is_a_mean_over_all_workers_label_tokens(
    stage2_run: Path, unbroken: Path, pair_table: Path
) -> None:
    """Before the first step, against one pass over the same rows in one process."""
    from vlv_model import VLVCaptioner

    stage1 = latest_checkpoint(unbroken)
    assert stage1 is not None
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    index = RowIndex.open(sorted(pair_table.glob("*.parquet")), ["caption"])
    _, held = split(index, 0.2)
    reader = RowReader(held, ["caption"])
    batch = Batch.read(reader, [(-1, row) for row in range(min(16, len(held)))], square=Square(64))
    tokens = captioner.tokenize([reader.row(row)["caption"] for row in range(len(batch.keys))])
    with torch.no_grad():
        expected = captioner.loss(batch.pixel_values, **tokens).item()
    assert heldout_losses(stage2_run)[0] == pytest.approx(expected, rel=1e-5)


def test_recaption_and_reconstruct_write_one_row_per_image(
    stage2_run: Path, unbroken: Path, pair_table: Path, tmp_path: Path
) -> None:
    from pipelines.recaption.config import RecaptionConfig
    from pipelines.recaption.job import recaption
    from pipelines.reconstruct.config import ReconstructConfig
    from pipelines.reconstruct.job import reconstruct
    from pipelines.storage.parquet import read_rows
    from pipelines.storage.tables import parquet_files

    select = [f"data.input={pair_table}", "data.rows_per_chunk=7", "actors.use_gpu=false"]
    select.append("ray.address=in-process")
    captions = tmp_path / "captions"
    config = load(RecaptionConfig, None, [
        *select, f"data.output={captions}", f"model.path={stage2_run}", "generate.num_beams=1",
        "generate.max_new_tokens=4", "data.split=holdout", "data.holdout=0.2",
    ])  # fmt: skip
    counts = recaption(config)
    columns = ["key", "caption", "num_tokens", "finish_reason", "model", "status"]
    rows = list(read_rows(parquet_files(str(captions)), columns))
    keys = [row["key"] for row in rows]
    assert counts == {"ok": len(keys)}
    assert 10 < len(keys) == len(set(keys)) < 50
    assert all(
        row["num_tokens"] <= 4 and row["finish_reason"] in ("stop", "length") for row in rows
    )
    assert len({row["model"] for row in rows}) == 1
    # Lost work is done again, finished work is not.
    parts = sorted(captions.glob("data/part-*.parquet"))
    written = {part: part.stat().st_mtime_ns for part in parts[1:]}
    (captions / "_commits/000000.json").unlink()
    assert recaption(config) == counts
    assert list(read_rows(parquet_files(str(captions)), columns)) == rows
    assert {part: part.stat().st_mtime_ns for part in parts[1:]} == written

    config = load(ReconstructConfig, None, [
        *select, f"data.output={tmp_path / 'pictures'}", f"model.path={unbroken}", "data.limit=3",
        "diffusion.num_steps=2",
    ])  # fmt: skip
    assert reconstruct(config) == {"ok": 3}
    pictures = list(read_rows(parquet_files(str(tmp_path / "pictures")), ["image"]))
    assert all(row["image"]["bytes"].startswith(b"\x89PNG") for row in pictures)


def test_recaption_refuses_an_untrained_captioner(
    unbroken: Path, pair_table: Path, tmp_path: Path
) -> None:
    from pipelines.recaption.config import RecaptionConfig
    from pipelines.recaption.job import recaption

    paths = [f"data.input={pair_table}", f"data.output={tmp_path / 'c'}", f"model.path={unbroken}"]
    with pytest.raises(CheckpointError, match="stage-2"):
        recaption(load(RecaptionConfig, None, paths))


def test_a_table_with_nothing_to_hold_out_is_refused(
    pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    config = stage1_config(pair_table, tiny_models, tmp_path / "r", "data.holdout=0.000001")
    with pytest.raises(DataError, match="none is a held-out row"):
        train(config)
