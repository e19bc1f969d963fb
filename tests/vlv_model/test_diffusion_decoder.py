import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from tests.vlv_model import formulas as reference
from vlv_model.checkpoints.loading import load_diffusion, resolve_model
from vlv_model.checkpoints.published import SD_21_BASE_SCHEDULER
from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.errors import ModelError
from vlv_model.preprocessing import vae_pixels


@pytest.fixture
def decoder(autoencoder):
    return autoencoder.diffusion_decoder


@pytest.fixture
def empty(autoencoder):
    return autoencoder.text_encoder.encode_prompts([""])


def with_schedule(decoder, **settings) -> DiffusionDecoder:
    scheduler = DDPMScheduler.from_config(decoder.noise_scheduler.config, **settings)
    return DiffusionDecoder(decoder.vae, decoder.unet, scheduler, decoder.image_size)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_latents_are_scaled_samples(decoder, squares):
    pixels = vae_pixels(squares)
    noise = torch.randn(4, *decoder.latent_shape)
    mean = decoder.encode(pixels, torch.zeros_like(noise))
    deviation = (decoder.encode(pixels, noise) - mean) / noise
    assert mean.shape == (4, *decoder.latent_shape)
    assert deviation.min() > 0
    torch.manual_seed(3)
    sampled = decoder.encode(pixels)
    torch.manual_seed(3)
    assert torch.allclose(
        sampled, decoder.encode(pixels, torch.randn(4, *decoder.latent_shape)), atol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_follows_the_prediction_type(decoder, prediction_type):
    decoder = with_schedule(decoder, prediction_type=prediction_type)
    latents, noise, condition = (
        torch.randn(2, *s) for s in (decoder.latent_shape, decoder.latent_shape, (16, 64))
    )
    timesteps = torch.tensor([10, 900])
    alpha = reference.alphas_cumprod()[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = {"epsilon": noise, "v_prediction": velocity}[prediction_type]
    with torch.no_grad():
        output = decoder.unet(noisy, timesteps, condition).sample
        loss = decoder.loss(latents, noise, timesteps, condition)
    assert torch.allclose(loss, (output - target).square().mean(), atol=1e-6)


def test_one_condition_serves_all_rows(decoder, empty):
    latents, noise = torch.randn(2, 3, *decoder.latent_shape)
    timesteps = torch.tensor([0, 500, 999])
    with torch.no_grad():
        once = decoder.loss(latents, noise, timesteps, empty)
        assert once == decoder.loss(latents, noise, timesteps, empty.repeat(3, 1, 1))


def test_other_targets_and_sizes_are_rejected(decoder):
    with pytest.raises(ModelError, match="prediction_type is 'sample'"):
        with_schedule(decoder, prediction_type="sample")
    with pytest.raises(ModelError, match="image_size is 60, the VAE downsamples by 8"):
        DiffusionDecoder(decoder.vae, decoder.unet, decoder.noise_scheduler, 60)


def test_the_published_schedule_is_read_from_its_sampler(tiny, tmp_path):
    config, _ = resolve_model(tiny)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(SD_21_BASE_SCHEDULER))
    *_, scheduler = load_diffusion(config.model_copy(update={"scheduler": str(tmp_path)}))
    assert type(scheduler) is DDPMScheduler
    assert torch.allclose(scheduler.alphas_cumprod, reference.alphas_cumprod(), atol=1e-7)
    assert not scheduler.config.clip_sample
    assert scheduler.config.steps_offset == 1


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_a_rows_picture_does_not_depend_on_its_batch(decoder, empty, scheduler):
    condition = torch.randn(3, 16, 64)

    def generate(rows, seeds):
        return decoder.generate(
            condition[rows], empty, generators(*seeds), num_steps=5, scheduler=scheduler
        ).int()

    together = generate([0, 1, 2], [5, 6, 7])
    assert together.shape == (3, 3, 64, 64)
    assert (generate([2, 0], [7, 5]) - together[[2, 0]]).abs().max() <= 1  # rounding to uint8
    assert (generate([0], [6]) - together[:1]).abs().max() > 1


def test_ddpm_sampling_equals_the_written_out_formula(decoder, empty):
    """Ho et al. 2020, equation 11 with the fixed small variance, on every 100th timestep."""
    decoder = with_schedule(decoder, prediction_type="epsilon")
    condition, scale = torch.randn(1, 16, 64), 2.0
    ours = decoder.generate(condition, empty, generators(1), scale, num_steps=10)

    generator = generators(1)[0]
    alphas = torch.cat([torch.ones(1), reference.alphas_cumprod()])  # alphas[t + 1]
    x = torch.randn(1, *decoder.latent_shape, generator=generator)
    with torch.no_grad():
        for t in range(901, 0, -100):  # "leading" spacing, steps_offset 1
            free = decoder.unet(x, t, empty).sample
            noise_pred = free + scale * (decoder.unet(x, t, condition).sample - free)
            now, before = alphas[t + 1], alphas[max(t - 100, -1) + 1]
            clean = (x - (1 - now).sqrt() * noise_pred) / now.sqrt()
            alpha = now / before
            x = (
                before.sqrt() * (1 - alpha) / (1 - now) * clean
                + alpha.sqrt() * (1 - before) / (1 - now) * x
            )
            variance = (1 - before) / (1 - now) * (1 - alpha)
            x = x + variance.sqrt() * torch.randn(1, *decoder.latent_shape, generator=generator)
        image = decoder.vae.decode(x / decoder.vae.config.scaling_factor).sample
    expected = ((image.clamp(-1, 1) + 1) * 127.5).round()
    assert (ours.float() - expected).abs().max() <= 1


def test_one_generator_per_row_is_demanded(decoder, empty):
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        decoder.generate(torch.randn(2, 16, 64), empty, generators(0))


def test_parts_of_two_diffusion_models_are_rejected(decoder):
    vae = AutoencoderKL(latent_channels=5)
    with pytest.raises(ModelError, match="5 latent channels, the UNet expects 8"):
        DiffusionDecoder(vae, decoder.unet, decoder.noise_scheduler, 64)
