import pytest
import torch

from pipelines.tiny_world.denoising import NUM_TIMESTEPS, denoising_losses, gap_closed
from tests.conftest import SMALLEST
from vlv_model.autoencoder import VLVAutoEncoder

WIDTH = 16  # of a condition of these models


@pytest.fixture(scope="module")
def decoder():
    return VLVAutoEncoder.from_pretrained(SMALLEST).diffusion_decoder


def test_conditions_are_compared_on_the_same_noise(decoder) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(70, *decoder.latent_shape, generator=generator)  # more than a batch
    one = torch.randn(1, 16, WIDTH, generator=generator)
    conditions = {"one": one, "repeated": one.repeat(70, 1, 1), "other": one + 1}
    losses = denoising_losses(decoder, latents, conditions, seed=0)
    assert losses["one"] == pytest.approx(losses["repeated"], rel=1e-5)
    assert losses["other"] != losses["one"]
    again = denoising_losses(decoder, latents, {"one": one}, seed=0)
    assert again["one"] == losses["one"]
    assert denoising_losses(decoder, latents, {"one": one}, seed=1)["one"] != losses["one"]


def test_the_loss_is_the_mean_over_evenly_spread_timesteps(decoder) -> None:
    latents, condition = torch.randn(3, *decoder.latent_shape), torch.randn(1, 16, WIDTH)
    noise = torch.randn(
        NUM_TIMESTEPS, 3, *decoder.latent_shape, generator=torch.Generator().manual_seed(5)
    )
    expected = [
        float(decoder.loss(latents, noise[i], torch.full((3,), 125 * i + 62), condition).detach())
        for i in range(8)
    ]
    losses = denoising_losses(decoder, latents, {"x": condition}, seed=5)
    assert losses["x"] == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_gap_closed_is_one_if_the_encoder_matches_the_caption() -> None:
    losses = {"no_caption": 0.3, "true_caption": 0.1}
    assert gap_closed({**losses, "encoder": 0.1}) == pytest.approx(1)
    assert gap_closed({**losses, "encoder": 0.3}) == pytest.approx(0)
    assert gap_closed({**losses, "encoder": 0.4}) == pytest.approx(-0.5)
