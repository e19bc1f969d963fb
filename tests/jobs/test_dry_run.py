"""`--dry-run` of the jobs: an estimate on the terminal, nothing written, bad names in one line."""

from pathlib import Path

import pytest

from tests.jobs.conftest import Job
from tests.jobs.test_bad_input import refused

PRINTED = {
    "stage1": ["micro-batch", "checkpoints", "TFLOP an image", "MFU 0.45"],
    "stage2": ["micro-batch", "checkpoints", "TFLOP an image", "MFU 0.45"],
    "recaption": ["64 images x 4 beams", "tokens/s", "2,000 (estimate.rows)", "bandwidth"],
    "precompute": ["32 images", "latents, 2,048 bytes an image", "4.1 MB"],
    "reconstruct": ["16 images", "pictures (PNG)"],
}


def arguments(name: str, models: Path, folder: Path) -> list[str]:
    output = "run_dir" if name.startswith("stage") else "data.output"
    return [
        f"model.path={models}",
        f"{output}={folder}/out",
        f"data.input={folder}/none",
        "--dry-run",
    ]


@pytest.mark.parametrize("name", PRINTED)
def test_a_dry_run_prints_an_estimate_and_writes_nothing(
    job: Job, tiny_models: Path, tmp_path: Path, name: str
) -> None:
    words = arguments(name, tiny_models, tmp_path)
    ended = job(name, *words, "--machine", "g6e.48xlarge", "estimate.rows=2000")
    assert ended.status == 0, ended.err
    for printed in ("parameters", "of each GPU", "fits", "L40S", "USD at 30.13", *PRINTED[name]):
        assert printed in ended.out, ended.out
    assert list(tmp_path.iterdir()) == []


def test_embed_prints_an_estimate_of_weights_that_are_not_here(job: Job, tmp_path: Path) -> None:
    words = [f"data.input={tmp_path}/none", f"data.output={tmp_path}/out", "--dry-run"]
    words += ["--machine", "g6e.48xlarge", "estimate.rows=2000"]
    inception = ["embed.extractor=inception", f"embed.weights={tmp_path}/none.pth"]
    ended = job("embed", *words, *inception)
    assert ended.status == 0, ended.err
    for printed in ("23.85 M frozen", "features, 8,192 bytes a row", "embed.batch_size", "L40S"):
        assert printed in ended.out, ended.out
    assert list(tmp_path.iterdir()) == []


def test_without_a_machine_there_are_no_hours(job: Job, tiny_models: Path, tmp_path: Path) -> None:
    ended = job("precompute", *arguments("precompute", tiny_models, tmp_path))
    assert "L4, A10G" in ended.out  # the cards that it fits
    assert "give --machine" in ended.out
    assert "not counted" in ended.out  # there is no input


def test_an_unknown_machine_gives_the_nearest_names(job: Job, tmp_path: Path) -> None:
    words = arguments("stage1", tmp_path, tmp_path)
    refused(job("stage1", *words, "--machine=A1000"), "estimate.machine", "did you mean A100")


def test_a_model_that_is_not_there_is_one_line(job: Job, tmp_path: Path) -> None:
    refused(job("stage2", *arguments("stage2", tmp_path / "none", tmp_path)), "none")


def test_an_export_prints_its_size(job: Job, trained_captioner: Path, tmp_path: Path) -> None:
    words = [f"{tmp_path}/out", f"model.path={trained_captioner}", "--dry-run"]
    sizes = {
        precision: job("export", *words, f"precision={precision}").out
        for precision in ("float32", "bfloat16")
    }
    assert all("language_model" in text and "queries" in text for text in sizes.values())
    assert sizes["float32"] != sizes["bfloat16"]
    assert not (tmp_path / "out").exists()


def test_help_names_the_option(job: Job) -> None:
    text = job("stage1", "--help").out
    assert "--machine VALUE" in text
    assert "--dry-run" in text
