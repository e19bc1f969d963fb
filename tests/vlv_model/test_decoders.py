"""SDXL and SD 3.5 against diffusers' own pipelines and plain formulas, on tiny random weights."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)

from tests.vlv_model.drawings import scenes
from tests.vlv_model.made_checkpoints import metadata
from vlv_model import ModelConfig, ModelError, VLVAutoEncoder, VLVCaptioner
from vlv_model.checkpoints import skeleton
from vlv_model.checkpoints.export import export_model
from vlv_model.checkpoints.layouts import SD, SD3, SDXL, layout_of
from vlv_model.checkpoints.loading import resolve_model
from vlv_model.checkpoints.weights import save_checkpoint
from vlv_model.conditions import Condition
from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.sd3 import T5_POSITIONS
from vlv_model.sdxl import time_ids_of
from vlv_model.text_encoder import prompt_ids
from vlv_model.tiny import TEXT_POSITIONS
from vlv_model.tiny_decoders import write_tiny_sd3, write_tiny_sdxl

SMALL = {"num_queries": TEXT_POSITIONS, "image_size": 32, "encoder_image_size": 64}
KINDS = ("sdxl", "sd3")
WRITE = {"sdxl": write_tiny_sdxl, "sd3": write_tiny_sd3}
LONG = "a small red circle left of a large blue square on a plain green background, " * 3
PROMPTS = ["a red circle", LONG]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    return {kind: WRITE[kind](folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(tiny, folders):
    return {
        kind: VLVAutoEncoder.from_pretrained(tiny, diffusion=folders[kind], **SMALL)
        for kind in KINDS
    }


@pytest.fixture
def pipes(models):
    """diffusers' pipelines around the same modules."""
    pipes = {}
    for kind, model in models.items():
        text, decoder = model.text_encoder, model.diffusion_decoder
        parts = dict(zip(("tokenizer", "tokenizer_2"), text.tokenizers, strict=True))
        parts |= {**text.pretrained_parts, **decoder.pretrained_parts}
        if kind == "sdxl":
            scheduler = DDIMScheduler.from_config(decoder.noise_scheduler.config)
            pipes[kind] = StableDiffusionXLPipeline(
                **parts, scheduler=scheduler, add_watermarker=False
            )
        else:
            pipes[kind] = StableDiffusion3Pipeline(
                **parts, scheduler=decoder.noise_scheduler, text_encoder_3=None, tokenizer_3=None
            )
        pipes[kind].set_progress_bar_config(disable=True)
    return pipes


@pytest.mark.parametrize("kind", KINDS)
def test_the_condition_of_prompts_is_that_of_the_pipeline(models, pipes, kind):
    text, decoder = models[kind].text_encoder, models[kind].diffusion_decoder
    ours, empty = text.prompt_condition(PROMPTS), text.unconditional()
    more = {"sdxl": {}, "sd3": {"prompt_3": None}}[kind]
    given = pipes[kind].encode_prompt(
        PROMPTS, None, **more, device=torch.device("cpu"), do_classifier_free_guidance=True
    )
    if kind == "sd3":
        ours, empty = (
            replace(one, embeddings=decoder.joint_embeddings(one.embeddings))
            for one in (ours, empty)
        )
        assert ours.embeddings.shape == (2, TEXT_POSITIONS + T5_POSITIONS, 128)
    found = (ours.embeddings, empty.expand(2).embeddings, ours.pooled, empty.expand(2).pooled)
    for one, expected in zip(found, given, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_a_full_prompt_give_its_condition(models, kind):
    """The token path of a prompt that fills all positions, without ids."""
    text = models[kind].text_encoder
    (ids, _) = (prompt_ids(tokenizer, [LONG], TEXT_POSITIONS) for tokenizer in text.tokenizers)
    tables = [clip.get_input_embeddings() for clip in text.pretrained_parts.values()]
    tokens = torch.cat([table(ids) for table in tables], dim=-1)
    found, expected = text.condition(tokens), text.prompt_condition([LONG])
    torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-6, rtol=0)
    assert torch.equal(text(tokens), found.embeddings)  # what stage 2 reads

    text.special_tokens = "bos_eos"
    try:
        within = text.condition(tokens[:, 1:-1])
        torch.testing.assert_close(within.pooled, expected.pooled, atol=1e-6, rtol=0)
        assert torch.equal(text(tokens[:, 1:-1]), within.embeddings[:, 1:-1])
        with pytest.raises(ModelError, match="20 positions, two of them for special_tokens: set"):
            text.check_queries(TEXT_POSITIONS)
    finally:
        text.special_tokens = "none"


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(models, pipes, kind):
    model = models[kind]
    text, decoder = model.text_encoder, model.diffusion_decoder
    condition, empty = text.prompt_condition(PROMPTS), text.unconditional().expand(2)
    joint = decoder.joint_embeddings if kind == "sd3" else lambda embeddings: embeddings
    noise = decoder._noise([torch.Generator().manual_seed(seed) for seed in (3, 4)])
    latents = pipes[kind](
        prompt_embeds=joint(condition.embeddings),
        pooled_prompt_embeds=condition.pooled,
        negative_prompt_embeds=joint(empty.embeddings),
        negative_pooled_prompt_embeds=empty.pooled,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=32,
        latents=noise,
        output_type="latent",
    ).images
    vae, kept = decoder.vae, []
    decode = vae.decode
    vae.decode = lambda z: kept.append(z) or decode(z)
    try:
        pictures = decoder.generate(
            condition,
            text.unconditional(),
            [torch.Generator().manual_seed(seed) for seed in (3, 4)],
            guidance_scale=3.0,
            num_steps=3,
            scheduler="ddim" if kind == "sdxl" else None,
        )
    finally:
        del vae.decode
    assert pictures.shape == (2, 3, 32, 32)
    config = vae.config
    expected = latents / config.scaling_factor + (config.shift_factor or 0)
    torch.testing.assert_close(kept[0], expected, atol=1e-4, rtol=1e-4)


def test_sdxl_loss_is_the_plain_formula(models):
    model = models["sdxl"]
    decoder, condition = model.diffusion_decoder, model.text_encoder.prompt_condition(PROMPTS)
    latents, noise = torch.randn(2, 2, 4, 4, 4).unbind()
    times = torch.tensor([10, 700])
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = (1 - beta).cumprod(0)[times].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    for time_ids in (None, time_ids_of(torch.tensor([[100, 50], [32, 99]]), 32)):
        ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2) if time_ids is None else time_ids
        predicted = decoder.unet(
            noisy,
            times,
            encoder_hidden_states=condition.embeddings,
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": ids},
        ).sample
        found = decoder.loss(latents, noise, times, replace(condition, time_ids=time_ids))
        torch.testing.assert_close(found, (predicted - noise).square().mean())
    # Height 100 and width 50 become 64 and 32, of which the crop leaves out 16 rows at the top.
    assert ids.tolist() == [[100, 50, 16, 0, 32, 32], [32, 99, 0, 33, 32, 32]]


def test_sd3_loss_is_the_plain_formula_at_logit_normal_times(models):
    model = models["sd3"]
    decoder, condition = model.diffusion_decoder, model.text_encoder.prompt_condition(PROMPTS)
    latents, noise = torch.randn(2, 2, 16, 4, 4).unbind()
    sigma = torch.tensor([0.1, 0.8])
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    joint = torch.zeros(2, TEXT_POSITIONS + T5_POSITIONS, 128)
    joint[:, :TEXT_POSITIONS, :80] = condition.embeddings
    velocity = decoder.transformer(noisy, joint, condition.pooled, 1000 * sigma).sample
    found = decoder.loss(latents, noise, 1000 * sigma, condition)
    torch.testing.assert_close(found, (velocity - (noise - latents)).square().mean())

    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([decoder.draw_timestep(generator) for _ in range(2000)]) / 1000
    logits = torch.logit(drawn)
    assert abs(logits.mean()) < 0.1
    assert abs(logits.std() - 1) < 0.1
    decoder.time_shift = 3.0
    generator.manual_seed(0)
    shifted = torch.stack([decoder.draw_timestep(generator) for _ in range(5)]) / 1000
    decoder.time_shift = 1.0
    torch.testing.assert_close(shifted, 3 * drawn[:5] / (1 + 2 * drawn[:5]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_trained_parts_alone(models, kind):
    model = models[kind]
    squares = scenes(2, seed=1)[:, :, :32, :32].contiguous()
    generator = torch.Generator().manual_seed(0)
    model.train()
    loss = model(
        squares,
        noise=torch.randn(2, *model.latent_shape, generator=generator),
        timesteps=torch.stack([model.draw_timestep(generator) for _ in range(2)]),
    )
    loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    model.eval()
    assert all(name.startswith(model.trained_parts) for name in reached)
    projectors = {name for name in reached if "caption_projector" in name}
    assert len(projectors) == 8
    assert "encoder.learnable_queries" in reached
    text = {name for name in reached if name.startswith(("text_encoder", "diffusion_decoder"))}
    assert text == set()


def test_the_files_say_which_decoder_it_is(tiny, folders, tmp_path):
    base, _ = resolve_model(tiny)
    for kind, layout in (("sdxl", SDXL), ("sd3", SD3)):
        config = base.model_copy(update={"diffusion": str(folders[kind])})
        assert layout_of(config) == layout
        without_index = shutil.copytree(folders[kind], tmp_path / kind)
        (without_index / "model_index.json").unlink()
        assert layout_of(base.model_copy(update={"diffusion": str(without_index)})) == layout
        parts = {n: str(folders[kind] / n) for n in ("text_encoder", "text_encoder_2")}
        assert layout_of(base.model_copy(update={"diffusion": "/nowhere", **parts})) == layout
    assert layout_of(base) == SD
    assert layout_of(base.model_copy(update={"diffusion": "/nowhere"})) == SD
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="is a FluxPipeline, expected StableDiffusionPipeline"):
        layout_of(base.model_copy(update={"diffusion": str(tmp_path)}))


def test_parts_of_two_decoders_are_refused(tiny, folders, models):
    with pytest.raises(ModelError, match="the VAE has 4 latent channels, the transformer expects"):
        VLVAutoEncoder.from_pretrained(
            tiny, diffusion=folders["sd3"], vae=folders["sdxl"] / "vae", **SMALL
        )
    decoder = models["sdxl"].diffusion_decoder
    with pytest.raises(ModelError, match="no sampler 'euler': choose one of ddpm, ddim"):
        decoder._sampler("euler")
    with pytest.raises(ModelError, match="give a Condition that has one"):
        decoder.predict(
            torch.zeros(1, 4, 4, 4), torch.tensor([1]), Condition(torch.zeros(1, 2, 80))
        )
    sizes = {"num_queries": 8, "image_size": 40}
    with pytest.raises(ModelError, match="image_size is 40: choose a multiple of 16 up to 192"):
        VLVAutoEncoder.from_pretrained(tiny, diffusion=folders["sd3"], **sizes)


def test_a_captioner_reads_the_unpadded_condition(tiny, folders):
    captioner = VLVCaptioner.from_pretrained(
        tiny, for_training=True, diffusion=folders["sd3"], **SMALL
    )
    squares = scenes(2, seed=1)[:, :, :32, :32].contiguous()
    assert captioner.clip_embeddings(squares).shape == (2, TEXT_POSITIONS, 80)
    assert captioner.prefix(squares).shape[:2] == (2, TEXT_POSITIONS)
    assert captioner.base_parts == ("florence", "text_encoder", "text_encoder_2", "language_model")


def test_stable_diffusion_is_unchanged_behind_the_interface(autoencoder):
    assert type(autoencoder.diffusion_decoder) is DiffusionDecoder
    assert isinstance(autoencoder.diffusion_decoder.vae, AutoencoderKL)
    assert autoencoder.text_encoder.widths == (64,)
    drawn = autoencoder.draw_timestep(torch.Generator().manual_seed(5))
    expected = torch.randint(1000, (), generator=torch.Generator().manual_seed(5))
    assert drawn == expected
    assert drawn.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_opens_without_the_base_models(tiny, folders, kind, tmp_path):
    """The folder alone says which decoder its parts are of."""
    base = shutil.copytree(tiny, tmp_path / "base")
    shutil.rmtree(base / "diffusion")
    shutil.copytree(folders[kind], base / "diffusion")
    encoder = VLVAutoEncoder.from_pretrained(base, **SMALL)
    config = resolve_model(base)[0].model_copy(update=SMALL)
    save_checkpoint(tmp_path / "stage1", encoder, metadata(config))
    captioner = VLVCaptioner.from_pretrained(config, tmp_path / "stage1", for_training=True)
    save_checkpoint(
        tmp_path / "stage2",
        captioner,
        metadata(config, "stage2", parent=str(tmp_path / "stage1")),
    )
    about = {
        "stage": "stage2",
        "step": 1,
        "rows_seen": 1,
        "config": {},
        "merged_stages": ["stage1"],
    }
    export_model(tmp_path / "out", captioner, config, {**about, "origin": {}})
    shutil.rmtree(base)

    squares = scenes(1, seed=1)[:, :, :32, :32].contiguous()
    opened = VLVCaptioner.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.prefix(squares), captioner.eval().prefix(squares))
    with pytest.raises(ModelError, match="vae: there is no folder"):
        VLVAutoEncoder.from_pretrained(tmp_path / "out")


PUBLISHED = {
    "stable-diffusion-xl-base-1.0": (SDXL, 2_567_463_684, (768, 1280), 4),
    "stable-diffusion-3.5-medium": (SD3, 2_243_171_520, (768, 1280), 16),
    "stable-diffusion-3.5-large": (SD3, 8_056_627_520, (768, 1280), 16),
}


@pytest.mark.parametrize("repo", PUBLISHED)
def test_published_models_are_known_in_full_size(repo):
    config = ModelConfig(diffusion=f"stabilityai/{repo}")
    layout, parameters, widths, channels = PUBLISHED[repo]
    assert layout_of(config, local=True) == layout
    model = skeleton.autoencoder(config)
    decoder, encoder = model.diffusion_decoder, model.encoder
    assert skeleton.num_parameters(decoder.denoiser) == parameters
    assert (model.text_encoder.widths, model.latent_shape) == (widths, (channels, 48, 48))
    assert skeleton.num_parameters(encoder.caption_projector) == sum(
        1024 * width + width + width * width + width for width in widths
    )
