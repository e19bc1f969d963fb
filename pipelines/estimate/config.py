"""Settings of `--dry-run`: what the estimate of a job assumes."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipelines.estimate.machines import Machine, find_machine, spot_share
from vlv_model.config import Config

DRY_RUN = "only print an estimate of memory, disk, hours and dollars; needs no GPU, weights, Ray or network"

MACHINE = {"--machine": "estimate.machine"}  # option of the jobs: the setting it sets


class EstimateConfig(Config):
    """What `--dry-run` assumes. A run itself only reads `machine`."""

    machine: str | None = Field(
        None,
        description="kind of machine (g6e.48xlarge) or GPU (L40S) of the estimate; also, a training "
        "does not start if its weights and optimiser exceed this GPU; default: memory without hours "
        "and dollars",
    )
    price: float | None = Field(
        None,
        gt=0,
        description="USD per hour of one such machine, or of one such GPU; default: "
        "pipelines/estimate/machines.yaml",
    )
    spot: bool = Field(
        False,
        description=f"the machines are spot machines, at {spot_share():g} of the price",
    )
    mfu: float = Field(
        0.45,
        gt=0,
        le=1,
        description="model FLOP utilisation that the job reaches: an assumption until you have "
        "measured it (benchmarks/training/throughput.py)",
    )
    bandwidth_share: float = Field(
        0.6,
        gt=0,
        le=1,
        description="share of the GPU's memory bandwidth that decoding captions reaches: an assumption",
    )
    rows: int | None = Field(
        None, ge=1, description="rows of data.input; default: they are counted, if it is there"
    )
    caption_tokens: float = Field(
        150, ge=1, description="average tokens of a caption, with its end-of-text"
    )

    @field_validator("machine")
    @classmethod
    def _known(cls, machine: str | None) -> str | None:
        return None if machine is None else find_machine(machine).name

    def found_machine(self) -> Machine | None:
        """The kind of machine, or None."""
        return None if self.machine is None else find_machine(self.machine)

    def usd_per_hour(self, machine: Machine) -> float | None:
        """The price of one machine, or None if it is not known."""
        price = self.price if self.price is not None else machine.usd_per_hour
        return None if price is None else price * (spot_share() if self.spot else 1)
