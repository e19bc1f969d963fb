"""Estimate hours and dollars of the four jobs from images, machines and prices.

    python cluster/cost.py
    python cluster/cost.py cloud=gcp recaption.images=3e8 recaption.machines=40
    python cluster/cost.py machine.gpu='RTX 6000 Ada' machine.gpus=8 machine.price=8

Assumes bfloat16, greedy captions and no time for communication. Recipes with float32, beam search or
slow networks take longer.

Machines and prices come from cluster/sizes.yaml; `machine.*` replaces the training machine. Every
rate is a setting; its description says where the default comes from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.render import read_sizes
from pipelines.cli.config import ConfigError
from pipelines.cli.main import main
from vlv_model.config import Config

# TFLOP of the published sizes, from pipelines/training/flops.py (a test counts again), one multiply-add
# as two. Training, forward and backward of an image of 384 pixels (768 in the vision tower): stage 1, and
# the VAE's part of it; stage 2, and per caption token.
STAGE1, VAE = 3.829, 0.620
STAGE2, STAGE2_TOKEN = 3.636, 0.01878
PREFIX, TOKEN = 2.221, 0.00617  # captioning, forward only: an image's prefix; each token
# Qwen2.5-3B in bfloat16, in GB: weights, and keys and values of one position
WEIGHTS, POSITION = 6.17, 36_864e-9
QUERIES = 77


class Ingest(Config):
    urls: float = Field(6e6, gt=0, description="rows of the list that pass its filters")
    alive: float = Field(
        0.7, gt=0, le=1, description="fraction of URLs that still work; LAION's decay every year"
    )
    images_per_second: float = Field(
        30.0,
        gt=0,
        description="images per second and core: download, decode, resize to 512, JPEG; measured on "
        "loopback with two cores (docs/performance.md), where the network was not a limit",
    )
    megabytes: float = Field(0.4, gt=0, description="size of a downloaded image, MB")
    gigabits: float = Field(
        10.0, gt=0, description="download bandwidth per machine, gigabits per second"
    )
    machines: int = Field(8, ge=1, description="machines of the CPU group")


class Train(Config):
    stage1_images: float = Field(
        200_000 * 512, gt=0, description="training images of stage 1: steps x batch (the paper's)"
    )
    stage2_images: float = Field(
        100_000 * 64, gt=0, description="training images of stage 2: steps x batch (the paper's)"
    )
    caption_tokens: float = Field(
        150, ge=1, description="average tokens per caption, without padding"
    )
    latents: bool = Field(False, description="stage 1 reads precomputed latents")
    mfu: float = Field(
        0.45,
        gt=0,
        le=1,
        description="model FLOP utilisation: our target, not yet measured on a GPU; "
        "benchmarks/training/throughput.py measures yours",
    )
    lost: float = Field(
        0.03, ge=0, lt=1, description="fraction of time for start-up, evaluation and repeated steps"
    )


class Recaption(Config):
    images: float = Field(1e6, gt=0, description="images to caption")
    tokens: float = Field(150, ge=1, description="average tokens per caption")
    batch: int = Field(
        64, ge=1, description="sequences that a GPU decodes at the same time, beams counted"
    )
    beams: int = Field(1, ge=1, description="generate.num_beams")
    bandwidth_share: float = Field(
        0.6,
        gt=0,
        le=1,
        description="fraction of the GPU's memory bandwidth that decoding reaches; an assumption",
    )
    machines: int = Field(8, ge=1, description="machines of the spot GPU group")


class Machine(Config):
    gpu: str | None = Field(None, description="kind of GPU, from gpu_kinds in cluster/sizes.yaml")
    gpus: int = Field(8, ge=1, description="GPUs per machine")
    price: float = Field(8.0, gt=0, description="price of the machine, USD per hour")


class CostConfig(Config):
    cloud: Literal["aws", "gcp"] = Field("aws", description="cloud provider")
    ingest: Ingest = Ingest()
    train: Train = Train()
    recaption: Recaption = Recaption()
    machine: Machine = Machine()


@dataclass(frozen=True)
class Line:
    """One job: its machines, images, speed and price."""

    job: str
    machines: str
    images: float
    per_second: float
    usd_an_hour: float

    @property
    def hours(self) -> float:
        return self.images / self.per_second / 3600

    @property
    def usd(self) -> float:
        return self.hours * self.usd_an_hour

    @property
    def usd_per_million(self) -> float:
        return self.usd / self.images * 1e6


@dataclass(frozen=True)
class Group:
    """A machine of a group; `price` in USD per hour."""

    name: str
    gpu: dict[str, float]
    gpus: int
    cpus: int
    price: float


def estimate(config: CostConfig, sizes: dict[str, Any]) -> list[Line]:
    """Ingest, both stages, and recaption of the given number of images and of 1, 100 and 1,000 M."""
    head = _price(sizes, sizes["head"][config.cloud], spot=False)
    cpu, spot = (_group(sizes, name, config.cloud) for name in ("cpu", "gpu_spot"))
    training = _training_group(config, sizes)

    ingest = config.ingest
    by_cores = ingest.images_per_second * cpu.cpus
    by_network = ingest.gigabits * 1e3 / 8 / ingest.megabytes
    lines = [
        Line(
            "ingest",
            f"{ingest.machines} x {cpu.name}",
            ingest.urls * ingest.alive,
            min(by_cores, by_network) * ingest.machines,
            cpu.price * ingest.machines + head,
        )
    ]
    train = config.train
    useful = training.gpu["tflops"] * training.gpus * train.mfu * (1 - train.lost)
    for job, images, tflop in (
        ("stage 1", train.stage1_images, STAGE1 - (VAE if train.latents else 0)),
        ("stage 2", train.stage2_images, STAGE2 + STAGE2_TOKEN * train.caption_tokens),
    ):
        lines.append(Line(job, training.name, images, useful / tflop, training.price + head))
    rate = captions_per_second(config.recaption, spot.gpu, train.mfu) * spot.gpus
    for images in sorted({config.recaption.images, 1e6, 1e8, 1e9}):
        machines = config.recaption.machines
        lines.append(
            Line(
                f"recaption {images / 1e6:,.0f} M",
                f"{machines} x {spot.name}",
                images,
                rate * machines,
                spot.price * machines + head,
            )
        )
    return lines


def captions_per_second(recaption: Recaption, gpu: dict[str, float], mfu: float) -> float:
    """Captions per second of one GPU: the prefix is compute-bound, decoding mostly memory-bound.

    A decoding step reads all weights once per batch, and the keys and values of each sequence.
    """
    useful = gpu["tflops"] * mfu
    positions = QUERIES + recaption.tokens / 2
    gigabytes = WEIGHTS + recaption.batch * positions * POSITION
    step = max(
        gigabytes / (gpu["gigabytes_per_second"] * recaption.bandwidth_share),
        recaption.batch * TOKEN / useful,
    )
    images = recaption.batch / recaption.beams
    return 1 / (PREFIX / useful + recaption.tokens * step / images)


def _training_group(config: CostConfig, sizes: dict[str, Any]) -> Group:
    given = config.machine
    if given.gpu is None:
        return _group(sizes, "gpu", config.cloud)
    return Group(f"{given.gpus} x {given.gpu}", _gpu(sizes, given.gpu), given.gpus, 0, given.price)


def _group(sizes: dict[str, Any], name: str, cloud: str) -> Group:
    group = sizes["groups"][name]
    machine, price = group[cloud], _price(sizes, group[cloud], group["spot"])
    kind = sizes["prices"]["gpus"].get(machine)
    gpu = _gpu(sizes, kind) if kind else {}
    return Group(
        f"{machine}{' (spot)' if group['spot'] else ''}", gpu, group["gpus"], group["cpus"], price
    )


def _gpu(sizes: dict[str, Any], kind: str) -> dict[str, float]:
    kinds: dict[str, dict[str, float]] = sizes["gpu_kinds"]
    if kind not in kinds:
        raise ConfigError(
            f"machine.gpu={kind}: expected one of {', '.join(kinds)} (gpu_kinds in cluster/sizes.yaml)"
        )
    return kinds[kind]


def _price(sizes: dict[str, Any], machine: str, spot: bool) -> float:
    prices = sizes["prices"]
    if machine not in prices["usd_an_hour"]:
        raise ConfigError(f"cluster/sizes.yaml has no price for {machine}: add it to prices")
    price: float = prices["usd_an_hour"][machine]
    return price * (prices["spot_share"] if spot else 1)


def table(lines: list[Line]) -> str:
    """The lines as text, in columns."""
    head = ("job", "machines", "images", "images/s", "hours", "USD", "USD per million images")
    rows = [head] + [
        (
            line.job,
            line.machines,
            f"{line.images / 1e6:,.1f} M",
            f"{line.per_second:,.0f}",
            f"{line.hours:,.1f}",
            f"{line.usd:,.0f}",
            f"{line.usd_per_million:,.2f}",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def show(config: CostConfig) -> None:
    print(table(estimate(config, read_sizes())))
    print(
        "\nPrices: cluster/sizes.yaml, entered by hand. MFU and bandwidth_share are assumptions: "
        "measure them on your GPUs (docs/cluster.md)."
    )


if __name__ == "__main__":
    sys.exit(main(CostConfig, show, __doc__ or ""))
