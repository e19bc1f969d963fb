"""A training's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.estimate.counting import Count, count_training, without_data
from pipelines.estimate.memory import HOST_PROCESS, PROCESS, Memory, on_gpu
from pipelines.estimate.report import (
    Lines,
    arithmetic_of,
    assumption_lines,
    card_lines,
    disk_line,
    hours_lines,
    memory_lines,
    parameter_lines,
)
from pipelines.estimate.rows import count_rows
from pipelines.estimate.sample import sample_lines
from pipelines.estimate.words import lines, memory_words, size_words, worker_words
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.data import PREFETCHED_STEPS
from pipelines.training.memory import Parameters, offloaded, states
from pipelines.training.stages import Stage, captioning, denoising
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import skeleton
from vlv_model.precision import cast, dtype_of

TrainingConfig = Stage1Config | Stage2Config


def training_memory(config: TrainingConfig, rows: int | None = None) -> Memory:
    """Memory of one of the most workers of a training; `rows` replaces the micro-batch.

    Runs a step without data, which takes up to a minute at full size. Raises ModelError for a model
    whose configuration is not known here.
    """
    rows = rows or config.train.rows_at_once
    memory, _ = training_states(config)
    return with_activations(memory, count_step(config, rows))


def with_activations(memory: Memory, count: Count) -> Memory:
    """`memory` of weights and optimiser, and the activations that were counted."""
    return replace(memory, activations=count.peak, late_activations=count.late)


def training_states(config: TrainingConfig) -> tuple[Memory, Parameters]:
    """Memory of weights, gradients and optimiser, and numbers of parameters: no step is run."""
    parameters = Parameters.of(_stage(config).model)
    return states(config.train, parameters, config.train.most_workers), parameters


def count_step(config: TrainingConfig, rows: int, tokens: int | None = None) -> Count:
    """Activations and FLOPs of a micro-batch of `rows`; captions have `tokens`, by default the most."""
    side = config.model.find()[0].image_size
    if isinstance(config, Stage2Config):
        tokens = tokens or config.train.max_caption_tokens
        return count_stage(_stage(config), config.train, (rows, 3, side, side), tokens=tokens)
    stored = config.data.latents is not None
    return count_stage(_stage(config), config.train, (rows, 3, side, side), stored=stored)


def count_stage(
    stage: Stage,
    train: TrainConfig,
    squares: tuple[int, int, int, int],
    *,
    tokens: int = 0,
    stored: bool = False,
) -> Count:
    """The same for a stage whose model is on the meta device, and for squares of a shape `[b 3 s s]`.

    `tokens` of a caption for stage 2; `stored`: stage 1 reads its latents.
    """
    cast(stage.model, train.precision)
    if train.activation_checkpointing:
        stage.checkpoint_activations()
    model: Any = stage.model.train()
    with without_data("cuda" if on_gpu(train.use_gpu) else "cpu", model) as device:

        def loss() -> Tensor:
            pixels = torch.zeros(squares, dtype=torch.uint8, device=device)
            if stage.name == "stage2":
                return _captioning_loss(model, pixels, tokens)
            return _denoising_loss(model, pixels, stored)

        return count_training(model, loss)


def _stage(config: TrainingConfig) -> Stage:
    model, _ = config.model.find()
    if isinstance(config, Stage2Config):
        captioner = skeleton.captioner(model, config.train.lora)
        captioner.set_trainable(config.train.trainable)
        return captioning(captioner, _no_captions, config.train.max_caption_tokens)
    with_vae = config.data.latents is None
    return denoising(skeleton.autoencoder(model, with_vae=with_vae), config.train.seed)


def _no_captions(keys: Sequence[int], epochs: Sequence[int]) -> list[str]:
    return [""] * len(keys)  # the step that is counted has no data


def _denoising_loss(model: VLVAutoEncoder, squares: Tensor, stored: bool) -> Tensor:
    rows, device = len(squares), squares.device
    latents = torch.zeros(rows, *model.latent_shape, device=device)
    loss: Tensor = model(
        pixel_values=squares,
        noise=torch.zeros_like(latents),
        timesteps=torch.stack([model.draw_timestep(torch.Generator())] * rows).to(device),
        **{"latents" if stored else "posterior_noise": latents},
    )
    return loss


def _captioning_loss(model: VLVCaptioner, squares: Tensor, tokens: int) -> Tensor:
    # Not the model's forward, which selects labels by value: these tensors have none.
    ids = torch.zeros(len(squares), tokens, dtype=torch.long, device=squares.device)
    prefix = model.prefix(squares)
    embeddings = model.language_model.get_input_embeddings()(ids)
    hidden = model.language_model.model(
        inputs_embeds=torch.cat([prefix, embeddings], dim=1), use_cache=False
    ).last_hidden_state
    logits = model.language_model.lm_head(hidden[:, prefix.shape[1] - 1 : -1].flatten(0, 1))
    return F.cross_entropy(logits.float(), ids.flatten(), reduction="sum")


def dry_run(config: TrainingConfig) -> str:
    """The estimate as text."""
    train, estimate = config.train, config.estimate
    workers, rows, use_gpu = train.most_workers, train.rows_at_once, on_gpu(train.use_gpu)
    closed, parameters = training_states(config)
    print("counting activations (up to a minute) …", file=sys.stderr, flush=True)
    step = count_step(config, rows)
    memory = with_activations(closed, step)
    checkpointed = ", checkpointed activations" if train.activation_checkpointing else ""
    what = f"{train.precision}, ZeRO-{train.zero_stage}, {worker_words(workers)}, micro-batch {rows}{checkpointed}"
    found = parameter_lines(parameters.trained, parameters.frozen)
    found += memory_lines(memory, what, use_gpu)

    def count(batch: int) -> Memory:
        print(f"counting a micro-batch of {batch} …", file=sys.stderr, flush=True)
        return with_activations(closed, count_step(config, batch))

    if use_gpu:
        found += card_lines(
            memory, estimate, "train.micro_batch_size", rows, count, partial(_settable, train)
        )
    found += _host_lines(config, closed, parameters)
    checkpoint = 12 * parameters.trained
    kept = f"{train.keep_checkpoints + 1} x {size_words(checkpoint)}, checkpoints (one while it is written)"
    found.append(disk_line((train.keep_checkpoints + 1) * checkpoint, kept))
    return lines(found + _time_lines(config, step, rows))


def _settable(train: TrainConfig, rows: int) -> int:
    """The largest micro-batch of at most `rows` of which a global batch has one for each worker."""
    most = min(rows, train.global_batch_size // train.most_workers)
    return next(size for size in range(most, 0, -1) if train.global_batch_size % size == 0)


def _host_lines(config: TrainingConfig, memory: Memory, parameters: Parameters) -> Lines:
    """Memory of the first machine, which also copies a checkpoint."""
    train, machine = config.train, config.estimate.found_machine()
    workers = min(train.most_workers, machine.gpus if machine else train.most_workers)
    side = config.model.find()[0].image_size
    rows = -(-train.global_batch_size // train.most_workers)
    prefetched = (PREFETCHED_STEPS + 1) * rows * 3 * side**2
    size = dtype_of(train.precision).itemsize
    weights = size * (parameters.trained + parameters.frozen)
    if on_gpu(train.use_gpu):
        process, states = HOST_PROCESS, offloaded(train, parameters, train.most_workers)
    else:
        process, states = PROCESS, memory.allocated
    copies = 12 * parameters.trained
    training = workers * (process + prefetched + states + train.readers * PROCESS) + copies
    needed = max(training, workers * (process + weights))
    there, verdict = "", ""
    if machine and machine.memory:
        there = f" of {machine.memory / 1e9:,.0f} GB"
        verdict = ": does NOT fit" if needed > machine.memory else ""
    where = f"{memory_words(needed)}{there} on the first machine, {worker_words(workers)}{verdict}"
    found = [
        ("host memory", where),
        ("  loading", f"{size_words(weights)} each"),
        ("  rows ahead", f"{size_words(prefetched)} each"),
        ("  checkpoint", f"{size_words(copies)}, copies of weights and moments"),
    ]
    if train.offload_optimizer:
        found.append(("  offload", f"{size_words(states)} each, offloaded optimiser"))
    return found


def _time_lines(config: TrainingConfig, step: Count, rows: int) -> Lines:
    train, estimate = config.train, config.estimate
    images = train.steps * train.global_batch_size
    flops = step.flops / rows
    if isinstance(config, Stage2Config):
        tokens = round(min(estimate.caption_tokens, config.train.max_caption_tokens))
        flops = count_step(config, 1, tokens).flops
    what = f"{flops / 1e12:.2f} TFLOP an image, {flops * train.global_batch_size / 1e15:,.2f} PFLOP a step"
    found = [("work", what)]
    present, origin = (estimate.rows, "estimate.rows") if estimate.rows else count_rows(config.data)
    if present:
        epochs = images / (present * (1 - config.data.holdout))
        origin = f"{present:,} ({origin}): {epochs:,.1f} epochs"
    found.append(("rows", origin))
    found += sample_lines(config.data)
    machine = estimate.found_machine()
    if machine is None:
        return [*found, ("time", "give --machine for hours and dollars")]
    if train.use_gpu is False:
        return found
    rate = machine.gpu.rates[arithmetic_of(train.precision, train.tf32)] * estimate.mfu / flops
    found += hours_lines(images, rate, train.most_workers, machine, estimate)
    return found + assumption_lines(estimate)
