"""Tables of latents: what the VAE says of each image, stored beside the images.

Written by jobs/precompute.py, read by stage 1 in place of the VAE. A row holds the mean and the
deviation of its image's latents as bfloat16, little-endian, in the order `[c h w]` that the
table's manifest (`_table.json`) names together with the VAE's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.images.random_access import RowIndex, RowReader
from pipelines.storage.tables import ADDED_SETTINGS, Table, parquet_files
from vlv_model.config import ModelConfig
from vlv_model.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

KIND = "latents"
SETTING = "data.latents"
COLUMNS = ("mean", "deviation")


def made_of(model: ModelConfig, there: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All of a model that decides the latents of an image, as the manifest keeps it.

    `there` is what a manifest says already: the same VAE is called what it is called there.
    """
    from vlv_model.checkpoints.fingerprint import fingerprint_like, is_same
    from vlv_model.checkpoints.loading import read_latent_format
    from vlv_model.checkpoints.sources import part_source

    latents, vae = read_latent_format(model), part_source(model, "vae")
    recorded = (there or {}).get("vae") or ""
    same = recorded and is_same(recorded, vae)
    return {
        "vae": recorded if same else fingerprint_like(recorded, vae),
        "scaling_factor": latents.scaling_factor,
        "latent_shape": list(latents.shape(model.image_size)),
        "image_size": model.image_size,
        "preprocess": model.preprocess,
    }


def packed(latents: Tensor) -> list[bytes]:
    """Float `[n c h w]` -> the bytes of each row, as bfloat16."""
    import torch

    words = latents.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return [row.astype("<i2").tobytes() for row in words]


def unpacked(rows: list[bytes], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `packed`: float32 `[n c h w]`."""
    import torch

    words = np.frombuffer(b"".join(rows), "<i2").astype(np.int16)
    return torch.from_numpy(words).view(torch.bfloat16).float().view(len(rows), *shape)


class LatentReader:
    """Reads the latents of images by key."""

    def __init__(self, path: str) -> None:
        """Raises DataError where `path` is no finished table of latents."""
        self.path = path
        files = parquet_files(path, SETTING)
        table = Table(path)
        about: dict[str, Any] = table.describe() if table.exists else {"kind": "foreign"}
        if about["kind"] != KIND:
            raise DataError(
                f"{SETTING}={path} is a {about['kind']} table, expected one that "
                "jobs/precompute.py wrote"
            )
        self.identity: dict[str, Any] = about["identity"]
        self.shape = tuple(self.identity["latent_shape"])
        self.index = RowIndex.open(files, needed=COLUMNS)
        self._rows = RowReader(self.index, COLUMNS, image=False)

    def check(self, model: ModelConfig, keys: np.ndarray) -> None:
        """Raise DataError unless these are the latents of `model`'s VAE, for all of `keys`."""
        there = ADDED_SETTINGS | self.identity
        here = made_of(model, there)
        if differing := [name for name in here if here[name] != there[name]]:
            shown = ", ".join(f"{n}: {there[n]} there, {here[n]} here" for n in differing)
            raise DataError(
                f"{SETTING}={self.path} was not made with this run's VAE and squares ({shown}): "
                "precompute it with this run's model.*, or leave it out"
            )
        missing = keys[~np.isin(keys, self.index.keys)]
        if len(missing):
            raise DataError(
                f"{SETTING}={self.path} lacks {len(missing):,} of the {len(keys):,} images of "
                f"data.input (the first is key {missing[0]}): run jobs/precompute.py on the same "
                "data.input"
            )

    def read(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and deviation `[n c h w]`, float32, unscaled, of images that `check` has seen."""
        positions = np.searchsorted(self.index.keys, np.array(keys, np.int64))
        rows = [self._rows.row(int(position)) for position in positions]
        mean, deviation = ([row[name] for row in rows] for name in COLUMNS)
        return unpacked(mean, self.shape), unpacked(deviation, self.shape)
