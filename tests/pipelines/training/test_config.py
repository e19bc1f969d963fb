import itertools

import pytest

from pipelines.cli.config import load
from pipelines.training.config import Stage2Config, TrainConfig
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.engine import learning_rate
from vlv_model.errors import ConfigError


def test_batches_must_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of train\.micro_batch_size=4"):
        TrainConfig(global_batch_size=10, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"has 2 micro-batches of 4 rows for train\.num_workers=3"):
        TrainConfig(global_batch_size=8, micro_batch_size=4, num_workers=3)
    config = TrainConfig(global_batch_size=64, num_workers=4, micro_batch_size=8)
    assert [config.accumulation(workers) for workers in (1, 2, 3, 4, 8)] == [8, 4, 3, 2, 1]


def test_num_workers_is_a_number_or_a_range() -> None:
    config = TrainConfig(global_batch_size=64, num_workers=(2, 8))
    assert (config.least_workers, config.most_workers, config.rows_at_once) == (2, 8, 8)
    for wrong in (0, "two", [3, 2], [0, 2], [1, 2, 3], [1.5, 2]):
        with pytest.raises(ValueError, match=r"expected an integer >= 1, or \[least, most\], got"):
            TrainConfig(num_workers=wrong)
    with pytest.raises(ValueError, match="should not be true or false"):
        TrainConfig(num_workers=True)
    settings = ["run_dir=/r", "data.input=/i", "train.num_workers=[4, 2]"]
    with pytest.raises(ConfigError, match=r"^train.num_workers: expected an integer .* \[4, 2\]$"):
        load(Stage2Config, None, settings)
    settings[-1] = "train.num_workers=[2,4]"
    assert load(Stage2Config, None, settings).train.num_workers == (2, 4)


def test_offload_needs_zero() -> None:
    with pytest.raises(ValueError, match="offload_optimizer needs"):
        TrainConfig(zero_stage=0, offload_optimizer=True)
    settings = deepspeed_config(
        TrainConfig(zero_stage=3, offload_optimizer=True, use_gpu=True), world_size=1
    )
    assert settings["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
    }


def test_an_indivisible_batch_size_gives_a_one_line_error() -> None:
    settings = ["run_dir=/r", "data.input=/i", "train.num_workers=3"]
    with pytest.raises(ConfigError, match=r"^train.global_batch_size=64 must be a multiple"):
        load(Stage2Config, None, settings)


def test_deepspeed_config_follows_the_settings() -> None:
    train = TrainConfig(
        global_batch_size=64,
        num_workers=4,
        micro_batch_size=4,
        precision="bfloat16",
        zero_stage=1,
        use_gpu=True,
    )
    settings = deepspeed_config(train, world_size=4)
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == "fp32"
    assert "data_types" not in settings  # which it has for stages 2 and 3
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["overlap_comm"] is True
    whole = train.model_copy(update={"zero_stage": 2, "use_gpu": False})
    settings = deepspeed_config(whole, world_size=4)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["zero_optimization"]["overlap_comm"] is False
    settings = deepspeed_config(train.model_copy(update={"precision": "float32"}), world_size=4)
    assert not {"bf16", "data_types", "communication_data_type"} & settings.keys()
    assert settings["gradient_clipping"] == train.max_grad_norm


def test_without_zero_the_loop_clips_gradients() -> None:
    assert deepspeed_config(TrainConfig(zero_stage=0), world_size=1)["gradient_clipping"] == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_spans_exactly_the_run(schedule: str) -> None:
    train = TrainConfig(steps=100, schedule=schedule, learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(train, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[99] < 0.02
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_constant_schedule() -> None:
    train = TrainConfig(steps=5, schedule="constant", learning_rate=0.5)
    assert [learning_rate(train, step) for step in range(5)] == [0.5] * 5


def test_cosine_schedule_is_half_the_peak_in_the_middle() -> None:
    train = TrainConfig(steps=100, schedule="cosine", learning_rate=2.0)
    assert learning_rate(train, 50) == pytest.approx(1.0)
