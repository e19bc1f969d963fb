"""Stored latents replace the VAE in training."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.admin.status import StatusConfig, status_text
from pipelines.cli.config import build, load
from pipelines.execution.connection import RayConfig
from pipelines.execution.read_images import ReadImages
from pipelines.execution.steps import Chunk
from pipelines.images.latents import (
    KIND,
    LatentReader,
    latents_identity,
    pack_latents,
    unpack_latents,
)
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.selection import Selection
from pipelines.precompute.config import EncodeConfig, PrecomputeConfig
from pipelines.precompute.job import precompute
from pipelines.precompute.predictor import EncodeImages
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table, parquet_files
from pipelines.training.config import Stage1Config
from pipelines.training.data import Batch
from pipelines.training.metrics import heldout_losses, read_metrics
from pipelines.training.stages import stage1
from tests.pipelines.image_jobs import open_table
from tests.pipelines.training.worlds import run_worlds, segment
from vlv_model.checkpoints.loading import load_vae
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.errors import DataError, RunError
from vlv_model.latents import posterior
from vlv_model.squares import Square


@pytest.fixture(scope="module")
def latents(pair_table: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of `pair_table`, written like the job does, without Ray."""
    folder = tmp_path_factory.mktemp("latents") / "table"
    return encoded(pair_table, tiny_models, folder)


def encoded(images: Path, models: Path, folder: Path, limit: int | None = None) -> Path:
    model, _ = resolve_model(models)
    selection = build(Selection, {"input": str(images), "output": str(folder), "limit": limit})
    table = open_table(KIND, selection, {**latents_identity(model), "precision": "float32"})
    read = ReadImages(table, Square.of(model))
    encode = EncodeImages(model, EncodeConfig(), use_gpu=False)
    for chunk in table.pending():
        table.write(chunk, encode(read(Chunk(chunk))).rows, row_group_size=IMAGE_ROW_GROUP)
    return folder


def keys_of(images: Path) -> np.ndarray:
    return RowIndex.open(sorted(images.glob("*.parquet"))).keys


def test_bfloat16_survives_the_bytes() -> None:
    values = torch.randn(3, 4, 2, 2).to(torch.bfloat16).float()
    rows = pack_latents(values)
    assert [len(row) for row in rows] == [2 * 16] * 3
    assert torch.equal(unpack_latents(rows, (4, 2, 2)), values)
    assert pack_latents(torch.tensor([[1.0]])) == [b"\x80\x3f"]  # 0x3f80, little-endian


def test_stored_latents_match_the_vae(latents: Path, pair_table: Path, tiny_models: Path) -> None:
    model, _ = resolve_model(tiny_models)
    images = RowReader(RowIndex.open(sorted(pair_table.glob("*.parquet"))))
    positions = [70, 3, 119]
    squares = torch.from_numpy(
        np.stack([images.square(p, Square(model.image_size)) for p in positions])
    )
    mean, deviation = posterior(load_vae(model), squares)
    read = LatentReader(str(latents)).read([int(images.index.keys[p]) for p in positions])
    for stored, expected in zip(read, (mean, deviation), strict=True):
        assert torch.allclose(stored, expected, rtol=2**-8, atol=1e-6)
        assert not torch.equal(stored, expected)


def test_a_training_row_reads_little(latents: Path) -> None:
    for file in parquet_files(str(latents)):
        groups = pq.ParquetFile(file).metadata
        assert all(
            groups.row_group(i).num_rows <= IMAGE_ROW_GROUP for i in range(groups.num_row_groups)
        )


@pytest.mark.parametrize("epoch", [0, 3, -1])
def test_the_loss_matches_the_online_vae(
    latents: Path, pair_table: Path, tiny_models: Path, tmp_path: Path, epoch: int
) -> None:
    """The noise is the same for (seed, epoch, key); only the rounding of latents differs."""
    model, _ = resolve_model(tiny_models)
    given = {"input": str(pair_table)}
    online = stage1(build(Stage1Config, {"data": given, "run_dir": str(tmp_path)}), model, None)
    given = {**given, "latents": str(latents)}
    stored = stage1(build(Stage1Config, {"data": given, "run_dir": str(tmp_path)}), model, None)
    reader = RowReader(RowIndex.open(sorted(pair_table.glob("*.parquet"))))
    batch = Batch.read(reader, [(epoch, p) for p in range(8)], Square.of(model))
    here, there = (stage.prepare(batch) for stage in (stored, online))
    assert here.inputs.keys() == {"pixel_values", "noise", "timesteps", "latents"}
    with torch.no_grad():
        latent = online.model.latents(batch.pixel_values, there.inputs["posterior_noise"])
        assert torch.allclose(here.inputs["latents"], latent, rtol=2**-7, atol=2**-6)
        losses = [s.model(**p.inputs).item() for s, p in ((stored, here), (online, there))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_vae_is_not_loaded(
    latents: Path, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    for weights in (models / "diffusion/vae").glob("*.safetensors"):
        weights.unlink()
    model, _ = resolve_model(models)
    data = {"input": str(pair_table), "latents": str(latents)}
    stage = stage1(build(Stage1Config, {"data": data, "run_dir": str(tmp_path)}), model, None)
    assert not [name for name, _ in stage.model.named_parameters() if "vae" in name]


def test_a_matching_table_is_accepted(latents: Path, pair_table: Path, tiny_models: Path) -> None:
    LatentReader(str(latents)).check(resolve_model(tiny_models)[0], keys_of(pair_table))


def test_another_vae_is_refused(
    latents: Path, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    (weights,) = (models / "diffusion/vae").glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(DataError, match=r"another VAE .* \(vae: opened-sha256:.* precompute it"):
        LatentReader(str(latents)).check(resolve_model(models)[0], keys_of(pair_table))


def test_another_image_size_is_refused(latents: Path, pair_table: Path, tiny_models: Path) -> None:
    model = resolve_model(tiny_models)[0].model_copy(update={"image_size": 128})
    with pytest.raises(DataError, match="image_size: 64 there, 128 here"):
        LatentReader(str(latents)).check(model, keys_of(pair_table))


def test_latents_of_squares_cut_by_another_rule_are_refused(
    latents: Path, pair_table: Path, tiny_models: Path
) -> None:
    usual, _ = resolve_model(tiny_models)
    other = usual.model_copy(update={"preprocess": "reference"})
    reader, keys = LatentReader(str(latents)), keys_of(pair_table)
    with pytest.raises(DataError, match="preprocess: default there, reference here"):
        reader.check(other, keys)
    reader.identity["preprocess"] = "reference"
    reader.check(other, keys)
    with pytest.raises(DataError, match="preprocess: reference there, default here"):
        reader.check(usual, keys)


def test_the_job_preprocesses_like_the_model(tiny_models: Path, tmp_path: Path) -> None:
    """A table cannot continue with another preprocessing."""
    folder, given = tmp_path / "photographs", ["ray.address=in-process", "actors.use_gpu=false"]
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (90, 101, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    given += [f"data.input={folder}", f"model.path={tiny_models}"]
    read = {}
    for rule in ("default", "reference"):
        settings = [*given, f"data.output={tmp_path / rule}", f"model.preprocess={rule}"]
        precompute(load(PrecomputeConfig, None, settings))
        reader = LatentReader(str(tmp_path / rule))
        read[rule] = reader.read(reader.index.keys.tolist())[0]
        expected = posterior(
            load_vae(resolve_model(tiny_models)[0]),
            torch.from_numpy(Square(64, rule).cut(Image.fromarray(noise)))[None],
        )[0]
        assert torch.allclose(read[rule], expected, atol=0.01 * float(expected.abs().max()))
    assert not torch.allclose(read["default"], read["reference"], atol=0.05)
    settings[-1] = "model.preprocess=default"
    with pytest.raises(RunError, match="preprocess: reference there, default here"):
        precompute(load(PrecomputeConfig, None, settings))


def test_missing_images_are_refused(pair_table: Path, tiny_models: Path, tmp_path: Path) -> None:
    some = LatentReader(str(encoded(pair_table, tiny_models, tmp_path / "t", limit=100)))
    with pytest.raises(DataError, match=r"lacks 20 of the 120 images .*\(the first is key \d+\)"):
        some.check(resolve_model(tiny_models)[0], keys_of(pair_table))


def test_a_table_without_latents_is_refused(pair_table: Path) -> None:
    with pytest.raises(DataError, match="is a foreign table, expected one that jobs/precompute"):
        LatentReader(str(pair_table))


@pytest.mark.end_to_end
def test_the_job_writes_each_image_once(
    ray_local: None,
    pair_table: Path,
    tiny_models: Path,
    latents: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "latents"
    config = load(PrecomputeConfig, None, [
        f"data.input={pair_table}", f"data.output={out}", "data.rows_per_chunk=50",
        f"model.path={tiny_models}", "actors.use_gpu=false", "actors.num_actors=1",
    ])  # fmt: skip
    assert precompute(config) == {"ok": 120}
    assert "of 120 of 120 images" in (card := (out / "README.md").read_text())
    assert str(tmp_path) not in card
    expected, found = LatentReader(str(latents)), LatentReader(str(out))
    keys = expected.index.keys.tolist()
    assert found.index.keys.tolist() == keys
    for here, there in zip(found.read(keys), expected.read(keys), strict=True):
        assert torch.allclose(here, there, rtol=2**-7, atol=1e-6)  # other batches, other rounding
    # Lost work is done again, finished work is not.
    before = {part: part.stat().st_mtime_ns for part in sorted(Table(out).parts.iterdir())}
    (out / "_commits/000001.json").unlink()
    with pytest.raises(DataError, match=r"data\.latents=.* not finished"):
        LatentReader(str(out))
    here = config.model_copy(update={"ray": RayConfig(address="in-process")})
    assert precompute(here) == {"ok": 120}
    again = {part: part.stat().st_mtime_ns for part in sorted(Table(out).parts.iterdir())}
    assert [part.stem for part in before if again[part] != before[part]] == ["part-000001"]
    assert "latents table" in status_text(StatusConfig(table=str(out)))


@pytest.mark.end_to_end
def test_a_run_on_stored_latents_matches_the_online_run(
    pair_table: Path, tiny_models: Path, latents: Path, tmp_path: Path, forked_python: Path
) -> None:
    """Losses agree within 0.2 %, since latents are rounded to bfloat16."""
    kinds: dict[str, list[str]] = {"online": [], "stored": [f"data.latents={latents}"]}
    trainings = [
        segment(load(Stage1Config, None, [
            f"data.input={pair_table}", "data.holdout=0.2", f"run_dir={tmp_path / name}", *stored,
            "train.use_gpu=false", "train.steps=6", "train.global_batch_size=8",
            "train.eval_rows=16", "train.learning_rate=0.002",
        ]), tiny_models)
        for name, stored in kinds.items()
    ]  # fmt: skip
    run_worlds([(1, trainings)], tmp_path, forked_python)
    curves = []
    for name in kinds:
        steps = [e["loss"] for e in read_metrics(tmp_path / name) if e["event"] == "step"]
        curves.append([*steps, *heldout_losses(tmp_path / name).values()])
    online, stored_curve = curves
    assert len(online) == 6 + 2
    assert stored_curve == pytest.approx(online, rel=2e-3)
    assert stored_curve != online  # the second run did read the stored ones
