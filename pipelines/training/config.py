"""Settings of the two training stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.cli.config import InputPathOrUrl, OutputPath
from pipelines.estimate.config import DRY_RUN, EstimateConfig
from pipelines.execution.connection import PoolSize, RayConfig, bounds
from pipelines.execution.model import ModelSettings
from pipelines.images.selection import ImageInput
from vlv_model.config import Config, Lora, Precision, Trainable


class ImageData(ImageInput):
    """The images of a training."""

    holdout: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="share of the images held out for evaluation; chosen by a hash of `key`, so it "
        "is the same in every job and rerun",
    )
    validation: InputPathOrUrl | None = Field(
        None,
        description="images for the samples, in any layout that recaption reads (for example a "
        "folder of files); default: held-out images of data.input",
    )


class Stage1Data(ImageData):
    """The images of stage 1."""

    latents: InputPathOrUrl | None = Field(
        None,
        description="latents of data.input, written by jobs/precompute.py; the VAE is then not "
        "loaded; default: the VAE runs in every step",
    )


JoinOn = Literal["key", "url", "name"]
"""What names the image of a caption."""


class CaptionedData(ImageData):
    """The images of stage 2 and their captions."""

    removed: ClassVar[Mapping[str, str]] = {
        "output": "captions are joined without a copy of the images, in <run_dir>/captions",
    }

    captions: tuple[InputPathOrUrl, ...] | None = Field(
        None,
        min_length=1,
        max_length=255,
        description="captions of the images of data.input, one path or several: tables, Parquet, CSV, TSV, "
        "JSONL, JSON, folders or .tar shards of sidecars; of several captions of an image, each epoch "
        "draws one; default: those that lie with the images",
    )
    caption_weights: tuple[float, ...] | None = Field(
        None,
        description="how often the captions of each path of data.captions are drawn, relative to the "
        "others; default: all alike",
    )
    caption_column: tuple[str, ...] = Field(
        ("caption",),
        min_length=1,
        description="name of the caption column, or one for each path of data.captions",
    )
    join_on: JoinOn | None = Field(
        None,
        description="what joins data.captions to data.input: keys, URLs or file names; default: `key` if "
        "the captions have the keys that ingest wrote, else their URLs, else their names",
    )

    @field_validator("captions", "caption_column", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_for_each_source(self) -> CaptionedData:
        sources = len(self.captions or [""])
        if len(self.caption_column) not in (1, sources):
            raise ValueError(
                f"data.caption_column has {len(self.caption_column)} names for {sources} paths of "
                "data.captions: give one, or one for each"
            )
        if self.caption_weights is None:
            return self
        if len(self.caption_weights) != sources or min(self.caption_weights) <= 0:
            raise ValueError(
                f"data.caption_weights={list(self.caption_weights)}: give a positive number for each of "
                f"the {sources} paths of data.captions"
            )
        return self

    def column_of(self, source: int) -> str:
        """The caption column of a path of `captions`, by its position."""
        return self.caption_column[source if len(self.caption_column) > 1 else 0]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each path of `captions`."""
        return self.caption_weights or (1.0,) * len(self.captions or [""])


class TrainConfig(Config):
    """Optimisation: length, batch size, schedule, precision, sharding, checkpoints."""

    steps: int = Field(
        200_000,
        ge=1,
        description="optimiser updates of the whole run; more of them continue a constant schedule",
    )
    global_batch_size: int = Field(512, ge=1, description="rows per update, over all workers")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="rows in one forward and backward pass of a worker; gradients of several are "
        "accumulated; default: all rows of a worker; a continued run keeps its first value",
    )
    num_workers: PoolSize = Field(
        1,
        description="workers, one per GPU; [least, most]: as many as the cluster has room for; the "
        "run goes on with fewer when machines are lost",
    )
    use_gpu: bool | None = Field(
        None,
        description="one CUDA GPU for each worker; false trains on CPUs; default: true on a cluster, and "
        "on a machine that has a GPU",
    )
    cpus_per_worker: int = Field(
        1, ge=1, description="CPUs reserved per worker; also its number of reading threads"
    )
    readers: int = Field(
        0,
        ge=0,
        description="processes per worker, one CPU each, on any machine, that read, decode and crop "
        "rows; 0: the worker's own threads do it",
    )
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    pretrained_rate: float = Field(
        1.0,
        gt=0,
        description="learning rate of pretrained weights, as a fraction of learning_rate; randomly "
        "initialised ones (queries, projectors) use learning_rate itself",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay of the learning rate to zero over exactly `steps`"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up before the decay")
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's two decay rates")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the gradient norm to this; 0: no clipping"
    )
    precision: Precision = Field(
        "float32",
        description="compute precision; bfloat16 keeps float32 master weights and, with zero_stage "
        "2 or 3, accumulates gradients in float32",
    )
    tf32: bool = Field(
        False,
        description="on CUDA, use TF32 (10 bits of mantissa) for float32 matrix products and "
        "convolutions",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(
        False,
        description="keep AdamW's moments and the float32 master weights in CPU memory and update "
        "them there; needs zero_stage 1, 2 or 3",
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass: less memory, slower",
    )
    compile: bool = Field(
        False,
        description="compile the models' blocks with torch.compile, which takes minutes at each "
        "start; needs a C compiler (for CUDA also Python's headers) on the workers and zero_stage of "
        "at most 2",
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="seed of the row order, noise, timesteps and dropout"
    )
    eval_every: int = Field(2_000, ge=1, description="steps between evaluations on the holdout")
    eval_rows: int = Field(512, ge=1, description="most held-out rows per evaluation")
    samples: int = Field(
        4,
        ge=0,
        description="images (held-out, or from data.validation) that the first checkpoint after each "
        "evaluation reconstructs (stage 1) or captions (stage 2), for W&B and <run_dir>/samples; made "
        "in a one-CPU task during training; 0: none",
    )
    checkpoint_every: int = Field(1_000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    max_failures: int = Field(
        10,
        ge=0,
        description="lost workers after which the job gives up; preempted machines do not count",
    )
    wandb: Literal["auto", "offline", "disabled"] = Field(
        "auto",
        description="Weights & Biases; auto: online with an API key (WANDB_API_KEY or `wandb "
        "login`), else offline; WANDB_MODE in the environment overrides it, unless disabled",
    )
    wandb_project: str = Field("vlv", min_length=1, description="project at Weights & Biases")

    removed: ClassVar[Mapping[str, str]] = {
        "prefetch": "the rows of two steps are read ahead",
        "wandb_name": "WANDB_NAME in the environment names the run; default: stage and folder name",
    }

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both must be in [0, 1), got {list(betas)}")
        return betas

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.global_batch_size % self.rows_at_once:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={self.rows_at_once}"
            )
        if self.micro_batches < self.most_workers:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} has {self.micro_batches} "
                f"micro-batches of {self.rows_at_once} rows for train.num_workers={self.most_workers}: "
                "each worker needs one"
            )
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("train.offload_optimizer needs train.zero_stage of 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile needs train.zero_stage of 0, 1 or 2: stage 3 releases a block's "
                "weights between its runs"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} must be less than train.steps={self.steps}"
            )
        return self

    @property
    def least_workers(self) -> int:
        return bounds(self.num_workers)[0]

    @property
    def most_workers(self) -> int:
        return bounds(self.num_workers)[1]

    @property
    def rows_at_once(self) -> int:
        return self.micro_batch_size or max(1, self.global_batch_size // self.most_workers)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update, over all workers."""
        return self.global_batch_size // self.rows_at_once

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each worker accumulates per update; some workers' last may be empty."""
        return -(-self.micro_batches // world_size)


class Stage2TrainConfig(TrainConfig):
    """Stage 2 with the defaults of the reference implementation."""

    steps: int = Field(
        100_000,
        ge=1,
        description="optimiser updates of the whole run; more of them continue a constant schedule",
    )
    global_batch_size: int = Field(64, ge=1, description="rows per update, over all workers")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="decay of the learning rate to zero over exactly `steps`"
    )
    trainable: Trainable = Field("projector+llm+encoder", description="parts that are trained")
    max_caption_tokens: int = Field(
        300, ge=2, description="most caption tokens, end-of-text included; longer captions are cut"
    )
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Stage2TrainConfig:
        if self.lora.rank and self.trainable == "projector":
            raise ValueError(
                f"train.lora.rank={self.lora.rank} needs train.trainable of projector+llm or "
                "projector+llm+encoder: with projector the language model is frozen"
            )
        return self


class Stage1Config(Config):
    """All settings of `jobs/stage1.py`."""

    data: Stage1Data
    run_dir: OutputPath = Field(description="folder of the run: checkpoints, metrics, settings")
    model: ModelSettings = ModelSettings()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()


class Stage2Config(Config):
    """All settings of `jobs/stage2.py`."""

    data: CaptionedData
    run_dir: OutputPath = Field(description="folder of the run: checkpoints, metrics, settings")
    model: ModelSettings = ModelSettings()
    train: Stage2TrainConfig = Stage2TrainConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()
