"""What a stage gives the optimiser."""

from pathlib import Path

import pytest

from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.stages import Stage, stage1, stage2
from vlv_model.sources import resolve_model


def stage_of(name: str, models: Path, folder: Path, trainable: str) -> Stage:
    model, _ = resolve_model(models)
    given = {"data": {"input": str(folder)}, "run_dir": str(folder)}
    if name == "stage1":
        return stage1(Stage1Config.model_validate(given), model, None)
    given["train"] = {"trainable": trainable}
    return stage2(Stage2Config.model_validate(given), model, None)


@pytest.mark.parametrize(
    ("name", "trainable", "fresh", "shares"),
    [
        ("stage1", "", {"learnable_queries", "caption_projector"}, [1.0, 0.25]),
        ("stage2", "projector+llm", {"language_projector"}, [1.0, 0.25]),
        ("stage2", "projector+llm+encoder", {"language_projector"}, [1.0, 0.25]),
        ("stage2", "projector", {"language_projector"}, [1.0]),
    ],
)
def test_what_starts_random_has_the_whole_learning_rate(
    name: str,
    trainable: str,
    fresh: set[str],
    shares: list[float],
    tiny_models: Path,
    tmp_path: Path,
) -> None:
    stage = stage_of(name, tiny_models, tmp_path, trainable)
    groups = stage.parameter_groups(0.25)
    assert [group["share"] for group in groups] == shares
    named = {id(p): n for n, p in stage.model.named_parameters() if p.requires_grad}
    grouped = [[named[id(p)] for p in group["params"]] for group in groups]
    together = [name for names in grouped for name in names]
    assert sorted(together) == sorted(named.values())  # each once
    for number, names in enumerate(grouped):
        for parameter in names:
            assert bool(fresh & set(parameter.split("."))) == (number == 0), parameter
