"""What a stage gives the optimiser."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.florence2.modeling_florence2 import Florence2VisionBlock

from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import Batch
from pipelines.training.stages import (
    MicroBatch,
    Stage,
    block_kinds,
    noise_and_timesteps,
    stage1,
    stage2,
)
from pipelines.training.usage import Utilisation
from tests.conftest import SMALLEST
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.errors import ConfigError


def stage_of(name: str, models: Path, folder: Path, trainable: str) -> Stage:
    model, _ = resolve_model(models)
    given: dict[str, Any] = {"data": {"input": str(folder)}, "run_dir": str(folder)}
    if name == "stage1":
        return stage1(Stage1Config.model_validate(given), model, None)
    given["train"] = {"trainable": trainable.replace("lora", "projector+llm")}
    if "lora" in trainable:
        given["train"]["lora"] = {"rank": 2}
    captions = ["a red circle above a blue square", "a green star"]
    return stage2(Stage2Config.model_validate(given), model, None, lambda keys, epochs: captions)


@pytest.mark.parametrize(
    ("name", "trainable", "random_init", "shares"),
    [
        ("stage1", "", {"learnable_queries", "caption_projector"}, [1.0, 0.25]),
        ("stage2", "projector+llm", {"language_projector"}, [1.0, 0.25]),
        ("stage2", "projector+llm+encoder", {"language_projector"}, [1.0, 0.25]),
        ("stage2", "projector", {"language_projector"}, [1.0]),
        ("stage2", "lora+encoder", {"language_projector", "lora_A", "lora_B"}, [1.0, 0.25]),
    ],
)
def test_randomly_initialised_parameters_have_the_full_learning_rate(
    name: str,
    trainable: str,
    random_init: set[str],
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
            assert bool(random_init & set(parameter.split("."))) == (number == 0), parameter


def two_rows(stage: Stage) -> MicroBatch:
    decoder = getattr(stage.model, "diffusion_decoder", None)
    side = decoder.image_size if decoder else stage.model.encoder.square.size
    shape = (2, 3, side, side)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    return stage.prepare(Batch([1, 2], [0, 0], pixels))


def saved_bytes_and_gradients(stage: Stage) -> tuple[int, float, dict[str, torch.Tensor]]:
    """The bytes that a micro-batch saves for its backward pass, its loss and its gradients."""
    batch, kept = two_rows(stage), 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    stage.model.train()
    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = stage.model(**batch.inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None}
    stage.model.zero_grad()
    return kept, loss.item(), gradients


def test_noise_depends_only_on_seed_epoch_and_key() -> None:
    """A row's noise differs between epochs and does not depend on its batch."""

    def uniform(generator: torch.Generator) -> torch.Tensor:
        return torch.randint(1000, (), generator=generator)

    def drawn(seed: int, rows: list[tuple[int, int]]) -> dict[tuple[int, int], list[torch.Tensor]]:
        epochs, keys = ([row[i] for row in rows] for i in (0, 1))
        pixels = torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8)
        made = noise_and_timesteps(seed, Batch(keys, epochs, pixels), (4, 2, 2), uniform)
        return {row: [made[name][i] for name in sorted(made)] for i, row in enumerate(rows)}

    rows = [(epoch, key) for epoch in (0, 1, 7) for key in (-5, 3, 2**62)]
    first, again = drawn(42, rows), drawn(42, rows[::-1]) | drawn(42, rows[4:5])
    other = drawn(43, rows)
    for row in rows:
        assert all(map(torch.equal, first[row], again[row]))
        for found in (*(first[another] for another in rows if another != row), other[row]):
            assert not torch.equal(first[row][0], found[0])  # noise
            assert not torch.equal(first[row][1], found[1])  # of the posterior


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_activation_checkpointing_saves_memory_and_keeps_gradients(
    name: str, tiny_models: Path, tmp_path: Path
) -> None:
    stage = stage_of(name, tiny_models, tmp_path, "projector+llm+encoder")
    for module in stage.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    kept, loss, gradients = saved_bytes_and_gradients(stage)
    stage.checkpoint_activations()
    kept_now, loss_now, gradients_now = saved_bytes_and_gradients(stage)
    assert kept_now < 0.7 * kept
    assert loss_now == loss
    torch.testing.assert_close(gradients_now, gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [pytest.param("stage1", marks=pytest.mark.faults), "stage2"])
def test_compiled_blocks_give_the_same_loss_and_gradients(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the making of kernels, which is torch's own and takes minutes on two cores.
    build = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", build)
    # Nor the vision tower: its tracing takes two minutes (looked at by hand, docs/experiments.md).
    blocks = tuple(kind for kind in block_kinds() if kind is not Florence2VisionBlock)
    stage = stage_of(name, SMALLEST, tmp_path, "projector+llm+encoder")
    names = list(stage.model.state_dict())
    _, loss, gradients = saved_bytes_and_gradients(stage)
    torch._dynamo.utils.counters.clear()
    stage.compile(torch.device("cpu"), blocks)
    _, loss_now, gradients_now = saved_bytes_and_gradients(stage)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    kinds = {type(m).__name__ for m in stage.model.modules() if m._compiled_call_impl}
    named = {"stage1": {"BasicTransformerBlock", "ResnetBlock2D"}, "stage2": {"Qwen2DecoderLayer"}}
    both = {"BartEncoderLayer", "BartDecoderLayer", "CLIPEncoderLayer"}
    assert kinds == named[name] | both
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(stage.model.state_dict()) == names
    assert loss_now == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients_now, gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_reported_before_training(
    device: str,
    variable: str,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    stage = stage_of("stage2", tiny_models, tmp_path, "projector")
    with pytest.raises(ConfigError, match="no no-such-compiler"):
        stage.compile(torch.device(device))


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_mfu_follows_images_tokens_time_and_devices(
    name: str, tiny_models: Path, tmp_path: Path
) -> None:
    stage = stage_of(name, tiny_models, tmp_path, "projector+llm+encoder")
    measured = Utilisation.measure(stage, two_rows(stage), torch.device("cpu"))
    assert all(p.grad is None for p in stage.model.parameters())
    share = measured.mfu(images=8, global_valid_tokens=100, seconds=2.0, devices=2)
    assert share > 0
    assert measured.mfu(8, 100, seconds=4.0, devices=1) == pytest.approx(share)
    assert measured.mfu(16, 200, seconds=2.0, devices=2) == pytest.approx(2 * share)
    more_tokens = measured.mfu(8, 200, seconds=2.0, devices=2)  # the images alone, in stage 1
    assert (more_tokens > share) == (name == "stage2")
