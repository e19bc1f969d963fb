"""Scores captions and reconstructions of the tiny world's test scenes against the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipelines.images.random_access import RowIndex, RowReader
from pipelines.reconstruct.config import DiffusionConfig
from pipelines.reconstruct.predictor import png, sample_batches
from pipelines.storage.parquet import read_rows, write_parquet
from pipelines.storage.tables import parquet_files
from pipelines.tiny_world import scenes
from pipelines.tiny_world.denoising import denoising_losses, gap_closed, text_conditions
from pipelines.tiny_world.scoring import score_captions, score_pictures
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.checkpoints.weights import CheckpointMetadata, save_checkpoint
from vlv_model.freezing import evaluating
from vlv_model.squares import Square

FROM_CAPTION = "from_caption.parquet"
DENOISED = 256  # test scenes for the denoising loss, each at eight timesteps


@dataclass(frozen=True)
class TestScenes:
    """The ingested images of the test split, sorted by key."""

    __test__ = False  # not a test class, for pytest

    keys: list[int]
    truths: list[scenes.Scene]
    squares: Tensor  # uint8 [n 3 64 64]

    @classmethod
    def read(cls, folder: Path) -> TestScenes:
        """Read the test scenes of a demo's folder."""
        teacher = parquet_files(str(folder / "world" / "test" / "teacher.parquet"))
        captions = {row["url"]: row["caption"] for row in read_rows(teacher, ["url", "caption"])}
        table = parquet_files(str(folder / "test_images"))
        urls = {row["key"]: row["url"] for row in read_rows(table, ["key", "url"])}
        squares = _squares(folder / "test_images")
        truths = [scenes.parse(captions[urls[key]]) for key in squares]
        return cls(
            keys=list(squares),
            truths=[truth for truth in truths if truth is not None],
            squares=torch.stack(list(squares.values())),
        )


def write_untrained(folder: Path, models: Path) -> Path:
    """Write a stage-1 checkpoint of step 0, with random queries and projector; returns the folder.

    The control's stage 2 starts from it and knows only what the pretrained Florence-2 knows.
    """
    if not folder.is_dir():
        model, _ = resolve_model(models)
        folder.parent.mkdir(parents=True, exist_ok=True)
        metadata = CheckpointMetadata(stage="stage1", step=0, rows_seen=0, config={}, model=model)
        save_checkpoint(folder, VLVAutoEncoder.from_pretrained(model), metadata)
    return folder


def prove(folder: Path, test: TestScenes, diffusion: DiffusionConfig) -> dict[str, Any]:
    """All scores, from the demo's tables and its stage-1 encoder; see `docs/method.md`.

    Also writes images generated from the true captions, for the report.
    """
    from pipelines.execution.model import ModelSettings

    autoencoder = VLVAutoEncoder.from_pretrained(
        *ModelSettings(path=str(folder / "stage1")).resolve()
    )
    return {
        "captions": caption_scores(test, folder / "captions"),
        "control": caption_scores(test, folder / "control" / "captions"),
        "reconstruction": _reconstruction(autoencoder, test, folder, diffusion),
        "denoising": denoising(autoencoder, test.squares[:DENOISED], test.truths[:DENOISED]),
    }


def denoising(
    autoencoder: VLVAutoEncoder, squares: Tensor, truths: Sequence[scenes.Scene]
) -> dict[str, float]:
    """Denoising loss by condition on fixed noise, and the share of the gap that the encoder closes."""
    with evaluating(autoencoder):
        captions = [scenes.caption(scene) for scene in truths]
        conditions = {
            **text_conditions(autoencoder.text_encoder, captions),
            "encoder": torch.cat([autoencoder.clip_embeddings(part) for part in squares.split(64)]),
        }
        mean = torch.zeros(len(squares), *autoencoder.latent_shape)
        latents = autoencoder.latents(squares, posterior_noise=mean)
        losses = denoising_losses(autoencoder.diffusion_decoder, latents, conditions, seed=0)
    return {**losses, "gap_closed": gap_closed(losses)}


def caption_scores(test: TestScenes, table: Path) -> dict[str, Any]:
    """Scores of a caption table, for scenes with and without a held-out combination."""
    rows = read_rows(parquet_files(str(table)), ["key", "caption"])
    by_key: Mapping[int, str | None] = {int(row["key"]): row["caption"] for row in rows}
    scored = {}
    for held_out in (False, True):
        chosen = [
            (truth, by_key.get(key))
            for key, truth in zip(test.keys, test.truths, strict=True)
            if scenes.is_held_out(truth) == held_out
        ]
        truths, captions = zip(*chosen, strict=True)
        scored[held_out] = score_captions(truths, captions), len(chosen)
    (seen, count), (unseen, count_unseen) = scored[False], scored[True]
    return {
        "exact_match": seen["exact_match"],
        "exact_match_held_out_combinations": unseen["exact_match"],
        "attributes": seen["attributes"],
        "attributes_held_out_combinations": unseen["attributes"],
        "scenes": count,
        "scenes_held_out_combinations": count_unseen,
    }


def _reconstruction(
    autoencoder: VLVAutoEncoder, test: TestScenes, folder: Path, diffusion: DiffusionConfig
) -> dict[str, Any]:
    """Attribute accuracies of reconstructions, and of images from true and wrong captions."""
    reconstructions = _squares(folder / "reconstructions")
    chosen = [i for i, key in enumerate(test.keys) if key in reconstructions]
    keys, truths = [test.keys[i] for i in chosen], [test.truths[i] for i in chosen]
    texts = [scenes.caption(truth) for truth in truths]
    from_caption = _text_to_image(autoencoder, texts, keys, diffusion)
    from_wrong = _text_to_image(autoencoder, texts[1:] + texts[:1], keys, diffusion)
    images = [{"bytes": png(picture), "path": None} for picture in from_caption]
    write_parquet(folder / FROM_CAPTION, pa.table({"key": keys, "image": images}))
    pictures = {
        "reconstruction": [reconstructions[key] for key in keys],
        "ceiling": from_caption,
        "floor": from_wrong,
    }
    scores = {
        name: score_pictures(truths, [picture.permute(1, 2, 0).numpy() for picture in shown])
        for name, shown in pictures.items()
    }
    mean = {name: score.pop("attributes") for name, score in scores.items()}
    return {
        "attributes": mean["reconstruction"],
        "ceiling": mean["ceiling"],
        "floor": mean["floor"],
        "by_attribute": scores,
        "pictures": len(keys),
    }


def _text_to_image(
    autoencoder: VLVAutoEncoder, texts: list[str], keys: list[int], diffusion: DiffusionConfig
) -> list[Tensor]:
    """Images, uint8 `[3 64 64]`, from the same noise as the reconstructions of these keys."""

    def sample(rows: slice, **sampling: Any) -> Tensor:
        return autoencoder.text_to_image(texts[rows], **sampling)

    return sample_batches(diffusion, keys, sample)


def _squares(table: Path) -> dict[int, Tensor]:
    """The images of a table by key, sorted by key, uint8 `[3 64 64]`."""
    index = RowIndex.open(parquet_files(str(table)))
    reader = RowReader(index)
    return {
        int(key): torch.from_numpy(reader.square(i, Square(scenes.SIDE)))
        for i, key in enumerate(index.keys)
    }
