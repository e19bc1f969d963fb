"""The checks of a run folder before training starts or continues."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipelines.cli.config import load
from pipelines.training.config import Stage1Config
from pipelines.training.job import open_run
from pipelines.training.run_folder import check_same_run, claim, with_micro_batch_size
from tests.hub import hub
from vlv_model.errors import ConfigError, RunError


def config(run_dir: Path, *settings: str) -> Stage1Config:
    given = [f"run_dir={run_dir}", f"data.input={run_dir}", "train.global_batch_size=12"]
    return load(Stage1Config, None, [*given, *settings])


def test_a_continued_run_keeps_its_micro_batch_size(tmp_path: Path) -> None:
    """Dropout is seeded per micro-batch, so another number of workers must not change its size."""
    begun = with_micro_batch_size(config(tmp_path, "train.num_workers=3"), tmp_path)
    assert begun.train.micro_batch_size == 4
    note = {"train.micro_batch_size": begun.train.micro_batch_size}
    (tmp_path / "run.json").write_text(json.dumps(note))
    assert with_micro_batch_size(config(tmp_path), tmp_path).train.micro_batch_size == 4
    given = config(tmp_path, "train.micro_batch_size=2")  # is compared with the run's, and refused
    assert with_micro_batch_size(given, tmp_path) is given
    with pytest.raises(ConfigError, match=r"3 micro-batches of 4 rows for train\.num_workers=6"):
        with_micro_batch_size(config(tmp_path, "train.num_workers=6"), tmp_path)


def test_a_run_older_than_a_setting_continues_with_its_default(tmp_path: Path) -> None:
    now = {"train.steps": 3, "train.lora.rank": 0}
    (tmp_path / "run.json").write_text(json.dumps({"train.steps": 3}))
    check_same_run(tmp_path, now)
    with pytest.raises(RunError, match=r"train\.lora\.rank: 0 there, 4 here"):
        check_same_run(tmp_path, {**now, "train.lora.rank": 4})
    (tmp_path / "run.json").write_text(json.dumps({"train.lora.rank": 0}))
    with pytest.raises(RunError, match=r"train\.steps"):
        check_same_run(tmp_path, now)


def test_more_steps_continue_a_run_whose_learning_rate_is_constant(tmp_path: Path) -> None:
    begun = {"train.steps": 8, "train.schedule": "constant", "train.seed": 42}
    claim(tmp_path, begun)
    (tmp_path / "result.json").write_text("{}")
    claim(tmp_path, begun)
    assert (tmp_path / "result.json").is_file()
    with pytest.raises(RunError, match=r"train\.seed: 42 there, 1 here"):
        claim(tmp_path, {**begun, "train.steps": 12, "train.seed": 1})
    claim(tmp_path, {**begun, "train.steps": 12})
    assert json.loads((tmp_path / "run.json").read_text()) == {**begun, "train.steps": 12}
    assert not (tmp_path / "result.json").is_file()  # it is to be trained on
    with pytest.raises(
        RunError, match=r"12 there, 8 here\): train\.steps can be raised, not lowered"
    ):
        claim(tmp_path, begun)


def test_more_steps_of_a_decaying_schedule_are_refused_with_what_to_do(tmp_path: Path) -> None:
    begun = {"train.steps": 8, "train.schedule": "cosine"}
    claim(tmp_path, begun)
    with pytest.raises(RunError) as refused:
        claim(tmp_path, {**begun, "train.steps": 12})
    for words in ("train.steps: 8 there, 12 here", "train.schedule=cosine decays over exactly these",
                  f"give model.path={tmp_path} and another run_dir"):  # fmt: skip
        assert words in str(refused.value)
    with pytest.raises(RunError, match=r"train\.schedule: cosine there, constant here"):
        claim(tmp_path, {"train.steps": 12, "train.schedule": "constant"})


FIRST, SECOND = "1" * 40, "2" * 40  # commits


def machine(name: Path, endpoint: str, words: list[str], settings: list[str]) -> list[str]:
    """The output of hub_machine for each word, with the hub's cache in the folder `name`."""
    environment = {key: v for key, v in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(name), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "tests.pipelines.training.hub_machine", *words, *settings]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.faults
def test_a_hub_id_its_commit_and_a_local_copy_are_the_same_model(
    tiny_models: Path, pair_table: Path, tmp_path: Path
) -> None:
    """A run with hub ids continues after a download, after a push, and on another machine."""
    repositories, run_dir = tmp_path / "hub", tmp_path / "run"
    for repo in ("florence", "diffusion"):
        shutil.copytree(tiny_models / repo, repositories / "some" / repo / FIRST)
    settings = [f"data.input={pair_table}", f"run_dir={run_dir}", "data.holdout=0.2",
                "model.florence=some/florence", "model.diffusion=some/diffusion",
                "model.num_queries=16", "model.image_size=64", "model.encoder_image_size=128",
                "train.global_batch_size=8"]  # fmt: skip
    pushed = repositories / "some/florence" / SECOND
    shutil.copytree(tiny_models / "florence", pushed)
    tensors = load_file(pushed / "model.safetensors")
    save_file({n: tensor + 1 for n, tensor in tensors.items()}, pushed / "model.safetensors")
    os.utime(pushed, (0, 0))  # not yet
    first = f"some/florence@{FIRST}"
    with hub(repositories) as endpoint:
        # The second time there are digests where only ids were known.
        words = ["open", "load", "save", f"push={pushed}", "other=some/florence@main"]
        lines = machine(tmp_path / "one", endpoint, [*words, "other=some/florence@v9"], settings)
    assert lines[:3] == [f"open: {first}", f"load: {first}", f"save: {first}"]
    assert lines[3] == f"push={pushed}: {first}"
    assert f"model.florence: {first} there, some/florence@{SECOND} here" in lines[4]
    assert (
        "'some/florence@v9' is not a local folder, and the model hub does not provide it"
        in lines[5]
    )

    # Another machine, which has no hub, and downloaded more files than the first one before.
    here = tmp_path / "two/hub/models--some--florence/snapshots" / FIRST
    shutil.copytree(tiny_models / "florence", here)
    there = here.parents[1].with_name("models--some--diffusion") / "snapshots" / FIRST
    shutil.copytree(tiny_models / "diffusion", there)
    save_file(tensors, here / "model.fp16.safetensors")
    recorded = json.loads((run_dir / "run.json").read_text())
    assert recorded["model.florence digest"] == first  # its digest is the checkpoint's alone
    copy, other = tiny_models / "florence", pushed
    words = ["open", f"other={first}", f"other={copy}", f"other={other}", "other=nobody/nothing"]
    lines = machine(tmp_path / "two", "http://127.0.0.1:9", words, settings)
    assert lines[0] == f"open: {first}"
    assert lines[1].endswith(f": {first}")
    assert lines[2].endswith(f": {copy}")  # a folder of the same files
    assert f"{first} there, {other} here" in lines[3]
    assert (
        "'nobody/nothing' is not a local folder, and the model hub does not provide it" in lines[4]
    )


def test_an_older_run_with_relative_folders_continues(
    tiny_models: Path, pair_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions recorded folders as given, and no tokenizer or scheduler."""
    shutil.copytree(tiny_models, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    given = [f"data.input={pair_table}", "data.holdout=0.2", "model.florence=models/florence"]
    given += ["model.diffusion=models/diffusion", "model.num_queries=16", "model.image_size=64"]
    run = open_run(config(run_dir, *given))
    claim(run_dir, run.identity)
    recorded = json.loads((run_dir / "run.json").read_text())
    recorded |= {f"model.{part}": f"models/{part}" for part in ("florence", "diffusion")}
    for part in ("tokenizer", "scheduler"):
        del recorded[f"model.{part} digest"]
    (run_dir / "run.json").write_text(json.dumps(recorded))
    claim(run_dir, open_run(config(run_dir, *given)).identity)
    shutil.copytree(tiny_models / "diffusion", tmp_path / "elsewhere")
    elsewhere = [*given, "model.diffusion=elsewhere"]
    with pytest.raises(
        RunError, match=r"model\.diffusion: models/diffusion there, .*elsewhere here"
    ):
        open_run(config(run_dir, *elsewhere))
