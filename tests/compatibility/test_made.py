"""What an earlier version wrote is opened, and what it had begun is finished, by the code of today."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build, dump, load
from pipelines.execution.model import latest_checkpoint
from pipelines.images.latents import LatentReader
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.job import ingest
from pipelines.precompute.config import PrecomputeConfig
from pipelines.precompute.job import precompute
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.job import recaption
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.job import reconstruct
from pipelines.storage.tables import Table, parquet_files
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.job import open_run, train
from pipelines.training.metrics import heldout_losses, read_metrics
from pipelines.training.run_folder import check_same_run
from tests.compatibility.make import HOME, IMAGES, OUTPUT, commands, replace_home
from tests.compatibility.site import BASE_URL, serve
from vlv_model import VLVAutoEncoder, VLVCaptioner
from vlv_model.checkpoints.weights import stages_of
from vlv_model.squares import Square

MADE = [folder.name for folder in sorted(Path(__file__).parent.glob("made-*"))]
CONFIGS: dict[str, Any] = {
    "ingest": IngestConfig, "precompute": PrecomputeConfig, "stage1": Stage1Config,
    "stage2": Stage2Config, "recaption": RecaptionConfig, "reconstruct": ReconstructConfig,
}  # fmt: skip
TABLE_JOBS: dict[str, Callable[[Any], dict[str, int]]] = {
    "ingest": ingest, "precompute": precompute, "recaption": recaption, "reconstruct": reconstruct,
}  # fmt: skip
KINDS = {"images": "image", "pairs": "pair", "latents": "latents", "captions": "caption",
         "pictures": "reconstruction"}  # fmt: skip
FAILED = {"decode:corrupt": 1, "decode:not_an_image": 1, "download:http_404": 1}


@pytest.fixture(params=MADE)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what was made, as if it had been made here."""
    home = tmp_path / "home"
    shutil.copytree(Path(__file__).parent / request.param, home)
    replace_home(home, HOME, str(home))
    return home


def config_of(name: str, home: Path, out: Path) -> Any:
    settings = [one for one in commands(home, out)[name] if not one.startswith("ray.")]
    here = [] if name.startswith("stage") else ["ray.address=in-process"]
    return load(CONFIGS[name], None, [*settings, *here])


def rows_of(table: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in parquet_files(str(table)))


def test_every_kind_of_table_opens(home: Path) -> None:
    for name, kind in KINDS.items():
        table = Table(home / name)
        about = table.describe()
        assert about["kind"] == kind
        assert table.pending() == []
        assert table.counts() == {"ok": IMAGES, **(FAILED if name == "images" else {})}
        assert rows_of(home / name).num_rows == sum(table.counts().values())
    index = RowIndex.open(parquet_files(str(home / "images")))
    assert len(index) == IMAGES
    assert RowReader(index).square(0, Square(32)).shape == (3, 32, 32)
    assert set(rows_of(home / "images")["url"].to_pylist()) == {
        f"{BASE_URL}/{p.name}" for p in (home / "web").iterdir()
    } | {f"{BASE_URL}/missing.png"}
    latents = LatentReader(str(home / "latents"))
    assert sorted(latents.index.keys.tolist()) == sorted(index.keys.tolist())
    mean, deviation = latents.read(index.keys[:3].tolist())
    assert mean.shape == deviation.shape == (3, 8, 4, 4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_its_settings_mean_the_same(home: Path, name: str) -> None:
    """Those of today may be more, or fewer (`Config.removed`); none has another value."""
    file = home / "settings" / f"{name}.yaml"
    then, now = load(CONFIGS[name], str(file), []), config_of(name, home, home)
    free = {"ray"}  # in which the jobs of this test differ
    assert then.model_dump(exclude=free) == now.model_dump(exclude=free)
    assert dump(then)


def test_checkpoints_and_exports_open(home: Path) -> None:
    encoders = [VLVAutoEncoder.from_pretrained(latest_checkpoint(home / "stage1") or "")]
    encoders.append(VLVAutoEncoder.from_pretrained(home / "encoder"))
    first, second = (model.state_dict() for model in encoders)
    assert all((first[name] == second[name]).all() for name in first)
    trained = latest_checkpoint(home / "stage2")
    assert trained is not None
    assert stages_of(trained) == ["stage1", "stage2"]
    rows = {row["key"]: row["caption"] for row in rows_of(home / "captions").to_pylist()}
    index = RowIndex.open(parquet_files(str(home / "images")))
    reader = RowReader(index)
    for model in (home / "captioner", trained):
        captioner = VLVCaptioner.from_pretrained(model)
        for row in range(3):
            pixels = captioner_pixels(reader, row)
            (caption,) = captioner.generate(pixels, num_beams=2, max_new_tokens=12)
            assert caption.text == rows[int(index.keys[row])]


def captioner_pixels(reader: RowReader, row: int) -> Any:
    import torch

    return torch.from_numpy(reader.square(row, Square(32)))[None]


@pytest.mark.parametrize("name", list(TABLE_JOBS))
def test_a_table_that_was_begun_is_finished(home: Path, name: str) -> None:
    """What was committed stays as it is, and all is what an unbroken job made."""
    begun, whole = home / "killed" / OUTPUT[name], home / OUTPUT[name]
    table = Table(begun)
    left = table.pending()
    done = [table.part(commit.chunk) for commit in table.commits()]
    assert left
    assert len(done) >= 2
    before = [part.read_bytes() for part in done]
    with serve(home / "web") as asked:
        counts = TABLE_JOBS[name](config_of(name, home, home / "killed"))
    assert len(asked) == (3 * len(left) - 1 if name == "ingest" else 0)  # the last chunk has two
    assert counts == Table(whole).counts() == Table(begun).counts()
    assert Table(begun).pending() == []
    assert [part.read_bytes() for part in done] == before
    here, there = rows_of(begun), rows_of(whole)
    assert here["key"].to_pylist() == there["key"].to_pylist()
    # Floats of another machine; and pictures that are resampled since by another filter.
    inexact = {"latents": ["mean", "std"], "pictures": ["image"], "images": ["image", "phash"]}
    same = [n for n in there.column_names if n not in inexact.get(OUTPUT[name], ())]
    assert here.select(same).equals(there.select(same))
    if name == "ingest":
        for one, other in zip(here.to_pylist(), there.to_pylist(), strict=True):
            assert looks_like(one, other)
    assert not list(begun.glob(".part-*"))  # nor is a half-written part left
    # Parts that lie beside `_table.json` stay there, and no card among them.
    assert (begun / "README.md").exists() == (table.parts != begun)


def looks_like(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows have the same picture, as nearly as filters for resampling are alike."""
    if other["image"] is None:
        return one["image"] is None and one["phash"] == other["phash"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")).astype(int)
        for row in (one, other)
    ]
    bits = int(one["phash"], 16) ^ int(other["phash"], 16)
    return np.abs(pictures[0] - pictures[1]).mean() < 6 and bits.bit_count() <= 6


@pytest.mark.parametrize("name", list(TABLE_JOBS))
def test_a_table_that_was_finished_is_not_made_again(home: Path, name: str) -> None:
    folder = home / OUTPUT[name]
    before = {file: file.read_bytes() for file in folder.rglob("*.parquet")}
    with serve(home / "web") as asked:
        counts = TABLE_JOBS[name](config_of(name, home, home))
    assert not asked
    assert counts == Table(folder).counts()
    assert {file: file.read_bytes() for file in folder.rglob("*.parquet")} == before


@pytest.mark.parametrize("where", ["of data.output", "of the run"])
def test_a_stage_2_that_was_begun_keeps_its_pair_table(home: Path, where: str) -> None:
    """Less what was taken down from the images since."""
    run_dir, pairs = home / "killed" / "stage2", home / "pairs"
    if where == "of the run":
        pairs = pairs.rename(run_dir / "pairs")
    config = config_of("stage2", home, home / "killed")
    begun = open_run(config)
    assert begun.config.data.input == str(pairs)
    check_same_run(run_dir, begun.identity)
    key = int(begun.rows[0].keys[0])
    take_down(build(TakedownConfig, {"table": str(home / "images"), "keys": [key]}))
    run = open_run(config)
    assert key not in run.rows[0].keys
    assert len(run.rows[0]) == len(begun.rows[0]) - 1
    assert key not in rows_of(pairs)["key"].to_pylist()


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_training_that_was_begun_is_finished(home: Path, name: str) -> None:
    """With the losses of an unbroken one, each step once, from the checkpoint that was there."""
    begun, whole = home / "killed" / name, home / name
    assert latest_checkpoint(begun) == begun / "checkpoints" / "step-00000004"
    config = config_of(name, home, home / "killed")
    result = train(config)
    here, there = ([e for e in read_metrics(run) if e["event"] == "step"] for run in (begun, whole))
    assert [step["step"] for step in here] == list(range(1, 13))
    assert [step["keys"] for step in here] == [step["keys"] for step in there]
    losses = pytest.approx([step["loss"] for step in there], rel=1e-3)
    assert [step["loss"] for step in here] == losses
    assert heldout_losses(begun) == pytest.approx(heldout_losses(whole), rel=1e-3)
    assert result["steps"] == 12
