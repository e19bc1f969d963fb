"""A training's estimate: twelve configurations, sensible and absurd, and the check at the start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.config import build
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.dry_run import TrainingConfig, dry_run, training_memory, training_states
from pipelines.training.memory import Parameters, states
from pipelines.training.start_check import check_before_start, check_fits
from vlv_model.errors import ConfigError, ModelError, RunError

FULL = Parameters(trained=360_000_000, frozen=1_640_000_000, largest=4_000_000)
QWEN = Parameters(trained=3_500_000_000, frozen=750_000_000, largest=311_000_000)


def config(models: Path | str, stage: int = 1, **train: Any) -> TrainingConfig:
    model = {"path": str(models)} if isinstance(models, Path) else {"florence": models}
    values = {
        "data": {"input": "/nowhere/images"},
        "run_dir": "/nowhere/run",
        "model": model,
        "train": {"global_batch_size": 16, "steps": 10, **train},
        "estimate": {"machine": "L40S", "price": 1.0},
    }
    return build(Stage2Config if stage == 2 else Stage1Config, values)


@pytest.mark.parametrize(
    ("stage", "train", "printed"),
    [
        (1, {}, ["float32, ZeRO-2, 1 worker, micro-batch 16", "fits", "dollars", "not counted"]),
        (
            1,
            {"micro_batch_size": 2, "num_workers": 8, "zero_stage": 1, "precision": "bfloat16"},
            ["8 x L40S", "ZeRO-1"],
        ),
        pytest.param(
            1,
            {"zero_stage": 3, "activation_checkpointing": True},
            ["ZeRO-3, 1 worker,", "buckets"],
            marks=pytest.mark.faults,
        ),
        pytest.param(
            1, {"offload_optimizer": True}, ["offloaded optimiser"], marks=pytest.mark.faults
        ),
        pytest.param(1, {"use_gpu": False}, ["of each process"], marks=pytest.mark.faults),
        (2, {"lora": {"rank": 512}}, ["trained"]),  # wider than the model
    ],
)
def test_a_configuration_is_answered(
    tiny_models: Path, stage: int, train: dict[str, Any], printed: list[str]
) -> None:
    text = dry_run(config(tiny_models, stage, **train))
    assert all(words in text for words in printed), text


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"micro_batch_size": 0}, "train.micro_batch_size=0"),
        ({"num_workers": 10_000}, "num_workers=10000: each worker needs one"),
        ({"offload_optimizer": True, "zero_stage": 0}, "needs train.zero_stage"),
        ({"precision": "float16"}, "train.precision"),
    ],
)
def test_an_impossible_configuration_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("any/name", **train)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        dry_run(config(str(tmp_path / "missing" / "model")))


def test_nothing_is_written(tiny_models: Path, tmp_path: Path) -> None:
    asked = config(tiny_models).model_copy(update={"run_dir": str(tmp_path / "run")})
    dry_run(asked)
    assert list(tmp_path.iterdir()) == []


def test_more_workers_and_smaller_numbers_take_less() -> None:
    def total(parameters: Parameters, workers: int = 8, **train: Any) -> int:
        return states(TrainConfig(global_batch_size=512, **train), parameters, workers).least

    for parameters in (FULL, QWEN):
        by_stage = [
            total(parameters, zero_stage=stage, precision="bfloat16") for stage in (0, 1, 2)
        ]
        assert by_stage == sorted(by_stage, reverse=True)
        assert total(parameters) > total(parameters, precision="bfloat16")
        assert total(parameters, 1) > total(parameters, 2) > total(parameters, 8)
        assert total(parameters, 1) > total(parameters, 1, offload_optimizer=True)


def test_states_of_qwen_on_one_gpu_are_those_of_the_recipes() -> None:
    """Two bytes a weight; four of gradients, twelve of masters and moments a trained one."""
    memory = states(TrainConfig(precision="bfloat16"), QWEN, 1)
    assert (memory.weights, memory.gradients) == (2 * 4_250_000_000, 4 * 3_500_000_000)
    assert memory.optimizer == 12 * 3_500_000_000


def test_fewer_rows_and_checkpointing_take_fewer_activations(tiny_models: Path) -> None:
    def activations(rows: int, **train: Any) -> int:
        return training_memory(config(tiny_models, **train), rows).activations

    few = activations(2)
    assert activations(4) == pytest.approx(2 * few, rel=0.1)
    assert activations(2, activation_checkpointing=True) < few
    closed, _ = training_states(config(tiny_models))
    counted = training_memory(config(tiny_models))
    assert replace(counted, activations=0, late_activations=0) == closed


def test_a_start_is_refused_where_the_card_is_exceeded() -> None:
    train = TrainConfig()
    memory = states(train, QWEN, 1)
    with pytest.raises(RunError, match=r"GPU, and L4 has 23\.6 GB: set train\.precision"):
        check_fits(memory, 23_600_000_000, "L4", train, 1)
    check_fits(memory, memory.least, "one that just fits", train, 1)


def test_a_start_on_cpus_warns_of_the_machines_memory(
    tiny_models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tiny_models, use_gpu=False)
    check_before_start(asked)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("os.sysconf", lambda _: 1)
    check_before_start(asked)
    assert "warning: weights, gradients and optimiser of 1 worker take" in capsys.readouterr().err


def test_a_start_on_an_unknown_card_says_what_it_takes(
    tiny_models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_before_start(_unnamed(tiny_models))
    assert "the workers compare it with theirs" in capsys.readouterr().err


def _unnamed(models: Path) -> TrainingConfig:
    values = config(models).model_dump(mode="json", exclude_unset=True)
    return build(Stage1Config, {k: v for k, v in values.items() if k != "estimate"})
