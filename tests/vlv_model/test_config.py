from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from vlv_model.config import Config, ModelConfig


class Inner(Config):
    size: int = Field(1, ge=1)


class Settings(Config):
    steps: int = 1
    limit: int | None = None
    stage: Literal[0, 1, 2] = 0
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    name: str = ""
    use_gpu: bool = True
    overwrite: bool | None = None
    config: dict[str, Any] | None = None
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": "7"}, 7),
        ({"steps": 7.0}, 7),
        ({"limit": "7"}, 7),
        ({"limit": None}, None),
        ({"rate": "3e-4"}, 3e-4),  # YAML 1.1 reads 3e-4 as a string
        ({"rate": 1}, 1.0),
        ({"betas": [0, "0.5"]}, (0.0, 0.5)),
        ({"use_gpu": True}, True),
        ({"overwrite": False}, False),
        ({"config": {"use_gpu": True}}, {"use_gpu": True}),
    ],
)
def test_numbers_come_as_yaml_and_the_command_line_write_them(given, expected):
    assert getattr(Settings(**given), *given) == expected


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["steps", "limit", "stage", "rate", "name"])
def test_booleans_are_not_numbers_or_text(name, value):
    with pytest.raises(ValidationError, match="should not be true or false"):
        Settings(**{name: value})


@pytest.mark.parametrize("given", [{"betas": [0.9, True]}, {"sizes": [True]}])
def test_booleans_in_lists_are_rejected(given):
    with pytest.raises(ValidationError, match="should not be true or false"):
        Settings(**given)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), float("inf")])
def test_only_finite_numbers_are_settings(value):
    for values in ({"rate": value}, {"betas": [0.9, value]}):
        with pytest.raises(ValidationError, match="finite number"):
            Settings(**values)


@given(st.floats().filter(lambda value: not value.is_integer()) | st.text("x.e-", min_size=1))
def test_an_integer_is_never_rounded_or_guessed(value):
    with pytest.raises(ValidationError):
        Settings(steps=value)


def test_the_same_holds_for_sections_and_unknown_keys():
    assert Settings(inner={"size": "3"}).inner.size == 3
    for values in ({"inner": {"size": True}}, {"inner": {"sise": 1}}, {"inner": True}):
        with pytest.raises(ValidationError):
            Settings(**values)


@pytest.mark.parametrize(
    "given",
    [{"prompt": ""}, {"projector_seed": -1}, {"projector_seed": 2**63}, {"num_queries": True}],
)
def test_the_models_settings_are_bounded(given):
    with pytest.raises(ValidationError, match=next(iter(given))):
        ModelConfig(**given)


def test_every_seed_within_the_bounds_can_be_used():
    import torch

    for seed in (0, 2**63 - 1):
        torch.Generator().manual_seed(ModelConfig(projector_seed=seed).projector_seed)
