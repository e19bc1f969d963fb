"""Bad input ends a job with a one-line error, no traceback and exit status 2."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.images.rows import IMAGE_ROW
from tests.jobs.conftest import ROOT, Ended, Job

JOBS = [
    "ingest",
    "precompute",
    "stage1",
    "stage2",
    "recaption",
    "reconstruct",
    "caption",
    "publish",
    "export",
    "demo",
]
OUTPUT = {"stage1": "run_dir", "stage2": "run_dir"}  # the others: data.output


def refused(ended: Ended, *words: str) -> None:
    assert ended.status == 2, ended.err
    assert ended.last_line.startswith("error: "), ended.err
    assert "Traceback" not in ended.err
    assert all(word in ended.last_line for word in words), ended.last_line


@pytest.mark.parametrize("name", JOBS)
def test_help_names_settings_and_meaning(job: Job, name: str) -> None:
    ended = job(name, "--help")
    assert ended.status == 0
    assert f"usage: python jobs/{name}.py" in ended.out
    assert "settings: key (type, default): meaning" in ended.out


@pytest.mark.parametrize("name", JOBS)
def test_unknown_setting(job: Job, name: str) -> None:
    refused(job(name, "quite.wrong=1"), "quite.wrong")


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("ingest", "filter.min_astetic", "filter.min_aesthetic"),
        ("stage1", "train.lerning_rate", "train.learning_rate"),
        ("stage2", "train.trainabel", "train.trainable"),
        ("recaption", "generate.num_beam", "generate.num_beams"),
        ("reconstruct", "diffusion.steps", "diffusion.num_steps"),
        ("caption", "model.pth", "model.path"),
        ("demo", "scene", "scenes"),
    ],
)
def test_misspelt_setting_gets_the_nearest_right_one(
    job: Job, name: str, wrong: str, right: str
) -> None:
    refused(job(name, f"{wrong}=1"), wrong, f"'{right}'")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("ingest", "image.quality=101"),
        ("stage1", "train.learning_rate=0"),
        ("stage2", "data.holdout=1.5"),
        ("recaption", "generate.num_beams=0"),
        ("reconstruct", "diffusion.num_steps=-3"),
        ("demo", "scenes=1"),
    ],
)
def test_value_out_of_range(job: Job, tmp_path: Path, name: str, setting: str) -> None:
    paths = [] if name == "demo" else ["data.input=x", f"{OUTPUT.get(name, 'data.output')}=y"]
    refused(job(name, *paths, setting), setting.split("=")[0])


Models = Callable[[str], Path]


@pytest.fixture
def models_for(tiny_models: Path, trained_captioner: Path) -> Models:
    """A valid model.path for each job."""

    def model_path(name: str) -> Path:
        if name in ("precompute", "stage1"):
            return tiny_models
        return trained_captioner if name == "recaption" else trained_captioner.parent / "stage1"

    return model_path


@pytest.mark.parametrize(
    "name", ["ingest", "precompute", "stage1", "stage2", "recaption", "reconstruct"]
)
@pytest.mark.parametrize("make", ["missing", "empty"])
def test_missing_or_empty_dataset(
    job: Job, tmp_path: Path, models_for: Models, name: str, make: str
) -> None:
    source = tmp_path / "table"
    if make == "empty":
        source.mkdir()
    model = [] if name == "ingest" else [f"model.path={models_for(name)}"]
    output = f"{OUTPUT.get(name, 'data.output')}={tmp_path / 'out'}"
    refused(job(name, f"data.input={source}", output, *model), "data.input", str(source))


@pytest.mark.parametrize("name", ["stage1", "stage2", "recaption", "reconstruct"])
def test_table_without_the_needed_column(
    job: Job, tmp_path: Path, models_for: Models, name: str
) -> None:
    pq.write_table(pa.table({"key": [1], "picture": [3]}), tmp_path / "t.parquet")
    model = f"model.path={models_for(name)}"
    output = f"{OUTPUT.get(name, 'data.output')}={tmp_path / 'out'}"
    ended = job(name, f"data.input={tmp_path / 't.parquet'}", output, model)
    refused(ended, "image", "key", "picture")


def test_pairs_without_captions(job: Job, tmp_path: Path, trained_captioner: Path) -> None:
    row = {"key": 1, "image": {"bytes": b"x", "path": None}, "status": "ok"}
    pq.write_table(pa.Table.from_pylist([row], IMAGE_ROW), tmp_path / "t.parquet")
    paths = [f"data.input={tmp_path / 't.parquet'}", f"run_dir={tmp_path / 'r'}"]
    model = trained_captioner.parent / "stage1"
    refused(job("stage2", *paths, f"model.path={model}"), "'caption'", "alt_text")


def test_stage2_without_stage1(
    job: Job, tmp_path: Path, tiny_models: Path, pair_table: Path
) -> None:
    """Stage 2 would freeze random queries."""
    paths = [f"data.input={pair_table}", f"run_dir={tmp_path / 'r'}", "data.holdout=0.2"]
    refused(job("stage2", *paths, f"model.path={tiny_models}"), "model.path", "stage-1")
    assert not (tmp_path / "r").exists()


def test_stage1_from_a_stage2_model(
    job: Job, tmp_path: Path, trained_captioner: Path, pair_table: Path
) -> None:
    paths = [f"data.input={pair_table}", f"run_dir={tmp_path / 'r'}", "data.holdout=0.2"]
    refused(job("stage1", *paths, f"model.path={trained_captioner}"), "model.path", "stage-2")


def test_table_without_a_usable_row(job: Job, tmp_path: Path, tiny_models: Path) -> None:
    pq.write_table(IMAGE_ROW.empty_table(), tmp_path / "t.parquet")
    paths = [f"data.input={tmp_path / 't.parquet'}", f"run_dir={tmp_path / 'r'}"]
    refused(job("stage1", *paths, f"model.path={tiny_models}"), "no row of status 'ok'")


def test_list_of_zero_urls(job: Job, tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": pa.array([], pa.string())}), tmp_path / "m.parquet")
    paths = [f"data.input={tmp_path / 'm.parquet'}", f"data.output={tmp_path / 'out'}"]
    refused(job("ingest", *paths), str(tmp_path / "m.parquet"))


def test_latents_of_other_images(
    job: Job, tmp_path: Path, tiny_models: Path, pair_table: Path
) -> None:
    """Rejected before Ray starts or the folder is created."""
    paths = [f"data.input={pair_table}", f"run_dir={tmp_path / 'r'}", "data.holdout=0.2"]
    ended = job("stage1", *paths, f"model.path={tiny_models}", f"data.latents={pair_table}")
    refused(ended, "data.latents", str(pair_table), "jobs/precompute.py")
    assert not (tmp_path / "r").exists()


def test_list_without_urls(job: Job, tmp_path: Path) -> None:
    pq.write_table(pa.table({"TEXT": ["a"]}), tmp_path / "m.parquet")
    paths = [f"data.input={tmp_path / 'm.parquet'}", f"data.output={tmp_path / 'out'}"]
    refused(job("ingest", *paths), "url", "TEXT")


@pytest.mark.parametrize("name", ["ingest", "stage1", "recaption", "reconstruct", "demo"])
def test_output_folder_of_somebody_else(
    job: Job, tmp_path: Path, models_for: Models, pair_table: Path, name: str
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("not ours")
    if name == "demo":
        settings = [f"run_dir={taken}"]
    elif name == "ingest":
        pq.write_table(pa.table({"URL": ["http://a/b.jpg"]}), tmp_path / "m.parquet")
        settings = [f"data.input={tmp_path / 'm.parquet'}", f"data.output={taken}"]
    else:
        model = models_for(name)
        output = OUTPUT.get(name, "data.output")
        settings = [f"data.input={pair_table}", f"{output}={taken}", f"model.path={model}"]
        settings += ["data.holdout=0.2"]
    refused(job(name, *settings), str(taken), "thesis.txt")
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]


def test_checkpoint_of_another_shape(
    job: Job, tmp_path: Path, trained_captioner: Path, pair_table: Path
) -> None:
    (image := tmp_path / "i.png").write_bytes(first_image(pair_table))
    ended = job("caption", image, "--model", trained_captioner, "model.num_queries=8")
    refused(ended, "encoder.learnable_queries", "16", "8")


def first_image(table: Path) -> bytes:
    return pq.read_table(next(table.glob("*.parquet")))["image"][0].as_py()["bytes"]


def test_caption_of_one_image(
    job: Job, tmp_path: Path, tiny_models: Path, trained_captioner: Path, pair_table: Path
) -> None:
    (image := tmp_path / "i.png").write_bytes(first_image(pair_table))
    ended = job("caption", image, "--model", trained_captioner, "generate.max_new_tokens=5")
    assert ended.status == 0
    assert len(ended.out.splitlines()) <= 1 or ended.out.strip()
    (tmp_path / "text.png").write_text("not a picture")
    refused(job("caption", tmp_path / "text.png", "--model", trained_captioner), "text.png")
    refused(job("caption", tmp_path / "none.png", "--model", trained_captioner), "none.png")
    refused(job("caption", image, "--model", tmp_path / "nowhere"), "nowhere")
    refused(job("caption", image, "--model", tiny_models), "stage-2")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_longer_captions_than_the_language_model_has_positions(
    job: Job, tmp_path: Path, trained_captioner: Path, pair_table: Path, engine: str
) -> None:
    """Said before a model is loaded or a table is made."""
    longer = ["generate.num_beams=1", f"generate.engine={engine}", "generate.max_new_tokens=1009"]
    (image := tmp_path / "i.png").write_bytes(first_image(pair_table))
    said = ("max_new_tokens=1009", "1024 positions", "takes 16", "at most 1008")
    refused(job("caption", image, "--model", trained_captioner, *longer), *said)
    paths = [f"data.input={pair_table}", f"data.output={tmp_path / 'o'}"]
    refused(job("recaption", *paths, f"model.path={trained_captioner}", *longer), *said)
    assert not (tmp_path / "o").exists()


def test_missing_models(job: Job, tmp_path: Path, pair_table: Path) -> None:
    paths = [f"data.input={pair_table}", f"run_dir={tmp_path / 'r'}", "data.holdout=0.2"]
    refused(job("stage1", *paths, "model.path=/no/models"), "/no/models")


def test_a_run_without_a_checkpoint(job: Job, tmp_path: Path, pair_table: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({}))
    paths = [f"data.input={pair_table}", f"data.output={tmp_path / 'o'}"]
    refused(job("recaption", *paths, f"model.path={tmp_path / 'run'}"), "no finished checkpoint")


def test_the_script_itself_exits_with_2(tmp_path: Path) -> None:
    """In its own process, unlike the other tests."""
    command = [sys.executable, "jobs/stage1.py", "data.input=/nowhere", f"run_dir={tmp_path / 'r'}"]
    done = subprocess.run(
        [*command, "train.steps=none"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: train.steps")
