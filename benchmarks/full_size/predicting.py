"""What the jobs' `--dry-run` predicts for a job of the full-size run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.full_size.folders import LANGUAGE_MODEL
from benchmarks.full_size.parts import Job, Work
from pipelines.cli.config import load
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.dry_run import recaption_memory
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.dry_run import reconstruct_memory
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.dry_run import count_step, training_states, with_activations
from vlv_model.checkpoints import skeleton
from vlv_model.config import ModelConfig

_QWEN = "Qwen/Qwen2.5-{}"
_CHECKPOINT = 12  # bytes of a trained parameter: float32 weight and AdamW's two moments
_FLOAT32 = 4
_LATENT = 2 * 2  # bytes of a latent value: mean and deviation in bfloat16


@dataclass(frozen=True)
class Predicted:
    """Memory of the process that holds the model and its output on disk, in GB (10^9 bytes)."""

    memory_gb: float
    disk_gb: float = 0.0
    flops: float = 0.0  # of a training's step


def predict(work: Work, job: Job) -> Predicted:
    """Predict a job from its settings, before its models exist (but for the tiny size)."""
    if work.size == "tiny":
        work.write(work.models)
        model = [f"model.path={work.models}"]
    else:
        model = [f"model.language_model={_QWEN.format(LANGUAGE_MODEL)}"]
    settings = [*job.more, *model]
    return _BY_SCRIPT[job.script](settings, work)


def _stage1(settings: list[str], work: Work) -> Predicted:
    return _training(load(Stage1Config, None, settings))


def _stage2(settings: list[str], work: Work) -> Predicted:
    return _training(load(Stage2Config, None, settings))


def _training(config: Stage1Config | Stage2Config) -> Predicted:
    states, parameters = training_states(config)
    step = count_step(config, config.train.rows_at_once)
    memory = with_activations(states, step).allocated
    return Predicted(memory / 1e9, _CHECKPOINT * parameters.trained / 1e9, step.flops)


def _recaption(settings: list[str], work: Work) -> Predicted:
    return Predicted(recaption_memory(load(RecaptionConfig, None, settings)).allocated / 1e9)


def _reconstruct(settings: list[str], work: Work) -> Predicted:
    return Predicted(reconstruct_memory(load(ReconstructConfig, None, settings)).allocated / 1e9)


def _precompute(settings: list[str], work: Work) -> Predicted:
    """The VAE's weights, without its activations."""
    model = _model_of(settings)
    channels, height, width = skeleton.autoencoder(model).latent_shape
    latents = _LATENT * channels * height * width * work.images_count
    return Predicted(_FLOAT32 * _count(skeleton.vae(model)) / 1e9, latents / 1e9)


def _export(settings: list[str], work: Work) -> Predicted:
    size = _FLOAT32 * _count(skeleton.captioner(_model_of(settings))) / 1e9
    return Predicted(size, size)


def _model_of(settings: list[str]) -> ModelConfig:
    chosen = [setting for setting in settings if setting.startswith("model.")]
    config = load(ReconstructConfig, None, ["data.input=/images", "data.output=/out", *chosen])
    return config.model.find()[0]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


_BY_SCRIPT: dict[str, Callable[[list[str], Work], Predicted]] = {
    "stage1": _stage1,
    "stage2": _stage2,
    "recaption": _recaption,
    "reconstruct": _reconstruct,
    "precompute": _precompute,
    "export": _export,
}
