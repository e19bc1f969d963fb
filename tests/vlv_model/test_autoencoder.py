import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, Florence2ForConditionalGeneration

from tests.vlv_model import formulas as reference
from tests.vlv_model.drawings import scenes
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.config import MORE_DETAILED_CAPTION
from vlv_model.errors import ModelError
from vlv_model.precision import cast
from vlv_model.preprocessing import encoder_pixels, vae_pixels
from vlv_model.tiny import LATENT_CHANNELS


def draws(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise, posterior_noise = torch.randn(2, count, LATENT_CHANNELS, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    return {"noise": noise, "timesteps": timesteps, "posterior_noise": posterior_noise}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_loss_equals_the_reference(tiny, autoencoder, squares):
    florence = Florence2ForConditionalGeneration.from_pretrained(tiny / "florence").eval()
    clip = CLIPTextModel.from_pretrained(tiny / "diffusion" / "text_encoder").eval()
    vae = AutoencoderKL.from_pretrained(tiny / "diffusion" / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(tiny / "diffusion" / "unet").eval()
    encoder = autoencoder.encoder
    batch = draws(4)
    with torch.no_grad():
        captions = reference.caption_embeddings(
            florence,
            AutoTokenizer.from_pretrained(tiny / "florence"),
            MORE_DETAILED_CAPTION,
            encoder.learnable_queries,
            encoder.caption_projector.state_dict(),
            encoder_pixels(squares, 128),
        )
        clip_embeddings = reference.clip_text(clip, captions)
        expected = reference.stage1_loss(
            vae, unet, squares / 127.5 - 1, clip_embeddings=clip_embeddings, **batch
        )
        loss = autoencoder.loss(squares, **batch)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 1e-5
    assert (autoencoder.clip_embeddings(squares) - clip_embeddings).abs().max() < 1e-5


def test_every_way_to_give_the_pixels_gives_the_same_loss(autoencoder, squares):
    batch = draws(4)
    with torch.no_grad():
        loss = autoencoder(squares, **batch)
        prepared = autoencoder.loss(
            vae_pixels(squares), encoder_pixel_values=encoder_pixels(squares, 128), **batch
        )
        latents = autoencoder.latents(squares, batch.pop("posterior_noise"))
        condition = autoencoder.clip_embeddings(squares)
        in_parts = autoencoder.denoising_loss(latents, **batch, clip_embeddings=condition)
    assert torch.allclose(loss, prepared, atol=1e-6)
    assert torch.allclose(loss, in_parts, atol=1e-6)


def test_float_pixels_alone_are_rounded_to_squares_for_the_encoder(autoencoder, squares):
    batch = draws(4)
    with torch.no_grad():
        expected = autoencoder.loss(squares, **batch)
        assert torch.allclose(autoencoder.loss(vae_pixels(squares), **batch), expected, atol=1e-6)


def test_posterior_noise_of_zeros_gives_the_mean_and_none_the_global_draw(autoencoder, squares):
    decoder = autoencoder.diffusion_decoder
    posterior = decoder.vae.encode(vae_pixels(squares)).latent_dist
    scale = decoder.vae.config.scaling_factor
    mean = autoencoder.latents(squares, torch.zeros(4, *autoencoder.latent_shape))
    torch.manual_seed(5)
    drawn = autoencoder.latents(squares)
    torch.manual_seed(5)
    assert torch.allclose(mean, posterior.mean * scale)
    assert torch.allclose(drawn, posterior.sample() * scale)


def test_gradients_reach_exactly_the_encoders_trained_parts(autoencoder, squares):
    autoencoder.train()
    autoencoder.loss(squares, **draws(4)).backward()
    with_gradient = {n for n, p in autoencoder.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in autoencoder.named_parameters() if p.requires_grad}
    parts = {name.split(".")[1] for name in with_gradient}
    assert parts == {"learnable_queries", "caption_projector", "florence"}
    assert all(name.startswith(VLVAutoEncoder.trained_parts) for name in with_gradient)
    queries = autoencoder.encoder.learnable_queries.grad
    assert queries.abs().amax(-1).min() > 0  # through UNet and text encoder into each query


def test_train_never_sets_frozen_parts_to_train_mode(autoencoder):
    autoencoder.train()
    autoencoder.diffusion_decoder.unet.train()
    awake = {name for name, part in autoencoder.named_modules() if part.training}
    assert not [n for n in awake if n.startswith(("text_encoder", "diffusion_decoder"))]
    assert not [n for n in awake if "vision_tower" in n or "multi_modal_projector" in n]
    assert [n for n in awake if n.startswith("encoder.florence.language_model.decoder.layers")]


def test_training_lowers_the_held_out_loss(autoencoder):
    held_out, fixed = scenes(32, seed=100), draws(32, seed=100)

    def held_out_loss():
        autoencoder.eval()
        with torch.no_grad():
            return autoencoder.loss(held_out, **fixed).item()

    before = held_out_loss()
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-3)
    torch.manual_seed(0)  # dropout
    for step in range(30):
        autoencoder.train()
        loss = autoencoder.loss(scenes(8, seed=step), **draws(8, seed=step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert held_out_loss() < before - 0.01


def test_reconstruct_is_reproducible_row_by_row_and_restores_the_mode(autoencoder, squares):
    autoencoder.train()
    together = autoencoder.reconstruct(squares, generators(4), num_steps=4)
    assert autoencoder.encoder.training
    assert together.dtype == torch.uint8
    assert together.shape == (4, 3, 64, 64)
    alone = autoencoder.reconstruct(squares[:1], generators(1), num_steps=4)
    assert (alone[0].int() - together[0].int()).abs().max() <= 1


def test_text_to_image_follows_the_text(autoencoder):
    red, blue, again = (
        autoencoder.text_to_image([text], generators(1), num_steps=4).int()
        for text in ("a red circle", "two blue squares", "a red circle")
    )
    assert torch.equal(red, again)
    assert (red - blue).abs().max() > 1


def test_guidance_of_one_is_the_conditional_model_alone(autoencoder, squares):
    condition = autoencoder.clip_embeddings(squares)
    decoder = autoencoder.diffusion_decoder
    other = torch.randn(1, 77, 64)
    with torch.no_grad():
        guided = autoencoder.reconstruct(squares, generators(4), guidance_scale=1.0, num_steps=3)
        alone = decoder.generate(condition, other, generators(4), guidance_scale=1.0, num_steps=3)
    assert (guided.int() - alone.int()).abs().max() <= 1


def test_bfloat16_weights_give_a_float32_loss(autoencoder, squares):
    with torch.no_grad():
        expected = autoencoder.loss(squares, **draws(4))
        loss = cast(autoencoder, "bfloat16").loss(squares, **draws(4))
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.05


def test_parameters_cast_without_buffers_train_as_in_float32(autoencoder, squares):
    """DeepSpeed's bfloat16: each parameter is cast, each buffer left in float32."""
    with torch.no_grad():
        expected = autoencoder.loss(squares, **draws(4))
    cast(autoencoder, "bfloat16")
    loss = autoencoder.loss(squares, **draws(4))
    loss.backward()
    assert abs(loss - expected) < 0.05
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in trained)


def test_a_text_encoder_of_another_width_is_rejected(autoencoder):
    autoencoder.diffusion_decoder.unet.register_to_config(cross_attention_dim=32)
    with pytest.raises(ModelError, match="64 wide, the UNet attends to 32"):
        VLVAutoEncoder(autoencoder.encoder, autoencoder.text_encoder, autoencoder.diffusion_decoder)
