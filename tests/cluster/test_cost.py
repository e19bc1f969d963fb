"""The cost model: its constants are counted again, its sums checked, and the docs quote it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import models
from cluster import cost
from cluster.cost import CostConfig, Machine, Recaption, Train, estimate, table
from cluster.render import read_sizes
from pipelines.cli.config import ConfigError
from pipelines.training.flops import count_flops

SIZES = read_sizes()
META = torch.device("meta")
FULL = models.SIZES["full"]
TOKENS = 150
REFERENCE = Machine(gpu="RTX 6000 Ada", gpus=8, price=8.0)


def eager(model: nn.Module) -> nn.Module:
    """Without fused attention, whose masks are looked at: on the meta device they hold nothing."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return model


def tflop(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def pixels() -> torch.Tensor:
    return torch.zeros(1, 3, FULL.image_size, FULL.image_size, dtype=torch.uint8, device=META)


def test_flops_of_stage_1_equal_the_constants() -> None:
    model = eager(models.autoencoder(FULL, META))
    noise = torch.zeros(1, *model.latent_shape, device=META)
    inputs = {
        "pixel_values": pixels(),
        "noise": noise,
        "timesteps": torch.zeros(1, dtype=torch.long, device=META),
        "posterior_noise": noise,
    }
    assert count_flops(model, inputs).per_image / 1e12 == pytest.approx(cost.STAGE1, rel=1e-3)
    with torch.no_grad():
        assert tflop(lambda: model.latents(pixels(), noise)) == pytest.approx(cost.VAE, rel=2e-3)


@pytest.mark.faults  # full size, if on no device: half a minute
def test_flops_of_stage_2_and_captioning_equal_the_constants() -> None:
    model = eager(models.captioner(FULL, META))
    language_model = model.language_model

    def step(tokens: int) -> None:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
        embeddings = [model.prefix(pixels()), language_model.get_input_embeddings()(ids)]
        hidden = language_model.model(inputs_embeds=torch.cat(embeddings, dim=1)).last_hidden_state
        language_model.lm_head(hidden[:, cost.QUERIES - 1 : -1]).sum().backward()

    whole, least = tflop(lambda: step(TOKENS)), tflop(lambda: step(1))
    per_token = (whole - least) / (TOKENS - 1)
    assert per_token == pytest.approx(cost.STAGE2_TOKEN, rel=1e-3)
    assert least - per_token == pytest.approx(cost.STAGE2, rel=1e-3)

    def prefill(length: int) -> None:
        embeddings = torch.zeros(1, length, FULL.language_model["hidden_size"], device=META)
        language_model(inputs_embeds=embeddings, logits_to_keep=1)

    with torch.no_grad():
        prefix = tflop(lambda: model.prefix(pixels())) + tflop(lambda: prefill(cost.QUERIES))
        assert prefix == pytest.approx(cost.PREFIX, rel=1e-3)
        assert tflop(lambda: prefill(1)) == pytest.approx(cost.TOKEN, rel=1e-3)
    weights = sum(p.numel() for p in language_model.parameters())
    assert 2 * weights / 1e9 == pytest.approx(cost.WEIGHTS, rel=1e-2)
    shape = language_model.config
    width = shape.hidden_size // shape.num_attention_heads
    position = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * width
    assert position / 1e9 == pytest.approx(cost.POSITION)


def test_the_papers_cost_is_reproduced() -> None:
    """About four days on 8 GPUs of 48 GB, under 1,000 USD, at a dollar a GPU and hour."""
    lines = {line.job: line for line in estimate(CostConfig(machine=REFERENCE), SIZES)}
    both = [lines["stage 1"], lines["stage 2"]]
    assert 3 <= sum(line.hours for line in both) / 24 <= 5
    assert sum(line.usd for line in both) < 1000


def test_costs_scale_with_their_inputs() -> None:
    def line(job: str, **sections: object) -> cost.Line:
        return next(x for x in estimate(CostConfig(**sections), SIZES) if x.job == job)

    half = line("stage 1", train=Train(mfu=0.225))
    assert half.hours == pytest.approx(2 * line("stage 1").hours)
    stored = line("stage 1", train=Train(latents=True)).hours / line("stage 1").hours
    assert stored == pytest.approx(1 - cost.VAE / cost.STAGE1)
    one, billion = line("recaption 1 M"), line("recaption 1,000 M")
    assert billion.usd == pytest.approx(1000 * one.usd)
    beams = line("recaption 1 M", recaption=Recaption(beams=4))
    assert 2 * one.hours < beams.hours < 4.5 * one.hours
    more = line("recaption 1 M", recaption=Recaption(machines=16))
    assert more.hours == pytest.approx(one.hours / 2)


def test_every_machine_of_the_sizes_has_a_price() -> None:
    for cloud in ("aws", "gcp"):
        lines = estimate(CostConfig(cloud=cloud), SIZES)
        assert all(line.usd > 0 for line in lines)


def test_an_unknown_gpu_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"machine.gpu=L41: expected one of L40S"):
        estimate(CostConfig(machine=Machine(gpu="L41")), SIZES)


@pytest.mark.parametrize("config", [CostConfig(), CostConfig(machine=REFERENCE)])
def test_the_docs_quote_the_current_table(config: CostConfig) -> None:
    text = (Path(cost.__file__).parents[1] / "docs/cluster.md").read_text(encoding="utf-8")
    for row in table(estimate(config, SIZES)).splitlines():
        assert row.rstrip() in text, row
