"""What a run folder settles before a training begins or goes on."""

import json
from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.training.config import Stage1Config
from pipelines.training.run_folder import check_free, settle
from vlv_model.errors import ConfigError, RunError


def config(run_dir: Path, *settings: str) -> Stage1Config:
    given = [f"run_dir={run_dir}", f"data.input={run_dir}", "train.global_batch_size=12"]
    return load(Stage1Config, None, [*given, *settings])


def test_micro_batches_stay_as_the_run_began(tmp_path: Path) -> None:
    """Dropout is drawn for each: a run that goes on with other workers has to keep them."""
    begun = settle(config(tmp_path, "train.num_workers=3"), tmp_path)
    assert begun.train.micro_batch_size == 4
    note = {"train.micro_batch_size": begun.train.micro_batch_size}
    (tmp_path / "run.json").write_text(json.dumps(note))
    assert settle(config(tmp_path), tmp_path).train.micro_batch_size == 4
    given = config(tmp_path, "train.micro_batch_size=2")  # is compared with the run's, and refused
    assert settle(given, tmp_path) is given
    with pytest.raises(ConfigError, match="3 micro-batches of 4 rows for num_workers=6"):
        settle(config(tmp_path, "train.num_workers=6"), tmp_path)


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path: Path) -> None:
    now = {"train.steps": 3, "train.lora.rank": 0}
    (tmp_path / "run.json").write_text(json.dumps({"train.steps": 3}))
    check_free(tmp_path, now)
    with pytest.raises(RunError, match=r"train\.lora\.rank: 0 there, 4 here"):
        check_free(tmp_path, {**now, "train.lora.rank": 4})
    (tmp_path / "run.json").write_text(json.dumps({"train.lora.rank": 0}))
    with pytest.raises(RunError, match=r"train\.steps"):
        check_free(tmp_path, now)
