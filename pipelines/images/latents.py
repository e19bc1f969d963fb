"""Tables of latents: the VAE's latent distribution of each image.

jobs/precompute.py writes them; stage 1 reads them instead of running the VAE. A row has the mean and
the standard deviation of its image's latents as little-endian bfloat16 `[c h w]`. The shape and the
VAE's fingerprint are in `_table.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import OK
from pipelines.storage.tables import ADDED_SETTINGS, Table, parquet_files
from vlv_model.config import ModelConfig
from vlv_model.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

KIND = "latents"
SETTING = "data.latents"
COLUMNS = ("mean", "deviation")


def latents_identity(
    model: ModelConfig, recorded: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything in a model that decides the latents of an image, as `_table.json` stores it.

    `recorded` is the identity of an existing table: the same VAE keeps the fingerprint recorded there.
    """
    from vlv_model.checkpoints.digests import fingerprint_like, matches_fingerprint
    from vlv_model.checkpoints.loading import read_latent_format
    from vlv_model.checkpoints.sources import part_source

    latents, vae = read_latent_format(model), part_source(model, "vae")
    known = (recorded or {}).get("vae") or ""
    same = known and matches_fingerprint(known, vae)
    return {
        "vae": known if same else fingerprint_like(known, vae),
        "scaling_factor": latents.scaling_factor,
        "shift_factor": latents.shift_factor,
        "latent_shape": list(latents.shape(model.image_size)),
        "image_size": model.image_size,
        "preprocess": model.preprocess,
    }


def pack_latents(latents: Tensor) -> list[bytes]:
    """Float `[n c h w]` -> the bytes of each row as bfloat16."""
    import torch

    words = latents.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return [row.astype("<i2").tobytes() for row in words]


def unpack_latents(rows: list[bytes], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_latents`: float32 `[n c h w]`."""
    import torch

    words = np.frombuffer(b"".join(rows), "<i2").astype(np.int16)
    return torch.from_numpy(words).view(torch.bfloat16).float().view(len(rows), *shape)


class LatentReader:
    """Reads the latents of images by key."""

    def __init__(self, path: str) -> None:
        """Raises DataError if `path` is not a finished table of latents."""
        self.path = path
        files = parquet_files(path, SETTING)
        table = self._table = Table(path)
        description: dict[str, Any] = table.describe() if table.exists else {"kind": "foreign"}
        if description["kind"] != KIND:
            raise DataError(
                f"{SETTING}={path} is a {description['kind']} table, expected one that "
                "jobs/precompute.py wrote"
            )
        self.identity: dict[str, Any] = description["identity"]
        self.shape = tuple(self.identity["latent_shape"])
        self.index = RowIndex.open(files, needed=COLUMNS)
        self._rows = RowReader(self.index, COLUMNS, image=False)

    def failed(self) -> np.ndarray:
        """Keys int64 `[n]` of the images that precompute could not decode, which have no latents."""
        chunks = [commit.chunk for commit in self._table.commits() if commit.statuses.keys() - {OK}]
        found = [np.zeros(0, np.int64)]
        for rows in self._table.columns(chunks, ["key", "status"]):
            found.append(rows.filter(pc.not_equal(rows["status"], OK))["key"].to_numpy())
        return np.concatenate(found)

    def check(self, model: ModelConfig, keys: np.ndarray) -> None:
        """Raise DataError unless the table has the latents of `model`'s VAE for all `keys`."""
        recorded = ADDED_SETTINGS | self.identity
        current = latents_identity(model, recorded)
        if differing := [name for name in current if current[name] != recorded[name]]:
            shown = ", ".join(f"{n}: {recorded[n]} there, {current[n]} here" for n in differing)
            raise DataError(
                f"{SETTING}={self.path} was made with another VAE or another preprocessing than this "
                f"run's ({shown}): precompute it with this run's model.*, or leave it out"
            )
        missing = keys[~np.isin(keys, self.index.keys)]
        if len(missing):
            raise DataError(
                f"{SETTING}={self.path} lacks {len(missing):,} of the {len(keys):,} images of "
                f"data.input (the first is key {missing[0]}): run jobs/precompute.py on the same "
                "data.input"
            )

    def read(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, float32 `[n c h w]`, unscaled.

        All `keys` must have passed `check`.
        """
        positions = np.searchsorted(self.index.keys, np.array(keys, np.int64))
        rows = [self._rows.row(int(position)) for position in positions]
        mean, deviation = ([row[name] for row in rows] for name in COLUMNS)
        return unpack_latents(mean, self.shape), unpack_latents(deviation, self.shape)
