"""A training goes on with another number of workers and another ZeRO stage as if nothing had been."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines.cli.config import load
from pipelines.execution.model import is_finished
from pipelines.images.random_access import RowIndex
from pipelines.training import run_rows
from pipelines.training.checkpointing import load_optimizer
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import GlobalOrder, keys_digest
from pipelines.training.job import show
from pipelines.training.metrics import heldout_losses, read_metrics
from pipelines.training.run_folder import write_result
from pipelines.training.run_rows import split
from tests.conftest import SMALLEST
from tests.pipelines.training.worlds import run_worlds, segment, turn_a_bit
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.files import verify_checkpoint
from vlv_model.errors import CheckpointError

pytestmark = pytest.mark.end_to_end

ROWS = 6  # of a step: three micro-batches, which two workers cannot share evenly
BEGUN, BETWEEN, STEPS = 1, 2, 4  # trainings go on from checkpoints of the first two


class Runs:
    """Trainings of one table and model, each in its folder."""

    def __init__(self, folder: Path, table: Path, models: Path) -> None:
        self.folder, self.table, self.models = folder, table, models
        self.configs: dict[str, Stage1Config | Stage2Config] = {}

    def segment(
        self,
        name: str,
        *settings: str,
        after: Path | None = None,
        parent: Path | None = None,
        damaged: str = "",
        table: Path | None = None,
    ) -> dict[str, Any]:
        """One training to its end, from the start or from a checkpoint; of stage 2 upon `parent`."""
        given = [
            f"data.input={table or self.table}", f"run_dir={self.folder / name}", "train.use_gpu=false",
            "data.holdout=0.2", f"train.steps={STEPS}", "train.global_batch_size=6",
            "train.micro_batch_size=2", "train.learning_rate=0.002", "train.pretrained_rate=0.01",
            "train.max_grad_norm=0.05", "train.eval_rows=2", "train.eval_every=100",
            "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.num_workers=1",
        ]  # fmt: skip
        config = load(Stage2Config if parent else Stage1Config, None, [*given, *settings])
        self.configs[name] = config
        return segment(config, self.models, after, parent, damaged)

    def without_held_out_rows(self, name: str) -> Path:
        """The table after a takedown of all that a run held out, and what the run noted before."""
        index = RowIndex.open(sorted(self.table.glob("*.parquet")))
        kept, _ = split(index, 0.2)
        left = self.folder / "left"
        left.mkdir()
        for file in kept.files:
            rows = pq.read_table(file)
            pq.write_table(
                rows.filter(pc.is_in(rows["key"], pa.array(kept.keys))), left / file.name
            )
        (self.folder / name).mkdir()
        run_rows.save_keys(self.folder / name, index.keys, str(self.table))
        event = {
            "event": "eval",
            "step": 0,
            "heldout_loss": 0.5,
            "rows": 2,
            "columns_read": ["key"],
        }
        (self.folder / name / "metrics.jsonl").write_text(json.dumps(event) + "\n")
        return left

    def rows(self, step: int) -> list[int]:
        """Keys of the rows that every training uses in a step."""
        index, _ = split(RowIndex.open(sorted(self.table.glob("*.parquet"))), 0.2)
        taken = GlobalOrder(len(index), 42).take((step - 1) * ROWS, ROWS)
        return [int(index.keys[row]) for _, row in taken]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:08d}"

    def steps(self, name: str) -> dict[int, dict[str, Any]]:
        events = read_metrics(self.folder / name)
        return {event["step"]: event for event in events if event["event"] == "step"}

    def curve(self, name: str, figure: str = "loss", start: int = BEGUN) -> list[float]:
        """A figure of all steps behind `start`."""
        steps = self.steps(name)
        return [steps[step][figure] for step in range(start + 1, STEPS + 1)]


@pytest.fixture(scope="module")
def runs(
    pair_table: Path,
    forked_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Runs with two workers, then one, then two; later segments continue earlier ones."""
    runs = Runs(tmp_path_factory.mktemp("worlds"), pair_table, SMALLEST)
    segment, checkpoint = runs.segment, runs.checkpoint
    begun, begun_low = checkpoint("unbroken", BEGUN), checkpoint("low", BEGUN)
    left = runs.without_held_out_rows("unseen")
    low, offload = ["train.precision=bfloat16"], ["train.offload_optimizer=true"]
    two = [
        segment("unbroken", "train.zero_stage=2"),
        segment("again", "train.zero_stage=2", after=begun),
        *(segment(f"zero-{n}", f"train.zero_stage={n}", after=begun) for n in (0, 3)),
        segment("low", "train.zero_stage=2", *low),
        segment("low-again", "train.zero_stage=2", *low, after=begun_low),
        segment("spoilt", "train.learning_rate=1e30", "train.warmup_steps=0"),
        segment("damaged", after=begun, damaged="optimizer.safetensors"),
    ]
    lora = ["train.trainable=projector+llm", "train.lora.rank=4", "train.lora.dropout=0.2"]
    stage1 = checkpoint("unbroken", STEPS)
    two.append(segment("lora", *lora, "train.zero_stage=2", parent=stage1))
    one = [
        segment("one", "train.zero_stage=1", *offload, after=begun),
        segment("unseen", "train.zero_stage=1", *offload, after=begun, table=left),
        segment(
            "lora-3", *lora, "train.zero_stage=3", after=checkpoint("lora", BEGUN), parent=stage1
        ),
    ]
    constant = "train.schedule=constant"
    one += [
        segment("planned", constant),
        segment("short", constant, f"train.steps={BEGUN}"),
        segment("longer", constant, after=checkpoint("short", BEGUN)),
    ]
    run_worlds([(2, two), (1, one)], runs.folder, forked_python)
    return runs


@pytest.fixture(scope="module")
def more_runs(runs: Runs, forked_python: Path) -> Runs:
    """More changes of world size and ZeRO stage, continuing from `runs`."""
    segment, checkpoint = runs.segment, runs.checkpoint
    low, begun_low = "train.precision=bfloat16", checkpoint("low", BEGUN)
    offload, again = "train.offload_optimizer=true", "train.activation_checkpointing=true"
    one = [
        segment("one-0", "train.zero_stage=0", after=checkpoint("zero-3", BETWEEN)),
        segment("one-3", "train.zero_stage=3", offload, after=checkpoint("zero-0", BETWEEN)),
    ]
    two = [
        segment("two-one-two", "train.zero_stage=3", again, after=checkpoint("one", BETWEEN)),
        *(segment(f"low-{n}", f"train.zero_stage={n}", low, after=begun_low) for n in (0, 1, 3)),
    ]
    run_worlds([(1, one), (2, two)], runs.folder, forked_python)
    return runs


def test_the_same_world_size_repeats_every_loss(runs: Runs) -> None:
    for figure in ("loss", "grad_norm"):
        expected = runs.curve("unbroken", figure)
        assert runs.curve("again", figure) == pytest.approx(expected, rel=1e-6)
    assert min(runs.curve("unbroken", "grad_norm")) > 0.05  # clipped in every step


def test_a_constant_schedule_goes_on_as_a_longer_run_would(runs: Runs) -> None:
    for figure in ("loss", "learning_rate", "keys"):
        assert runs.curve("longer", figure) == runs.curve("planned", figure)


def test_training_without_held_out_rows_takes_the_same_steps(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    for figure in ("keys", "loss", "grad_norm"):
        assert runs.curve("unseen", figure) == runs.curve("one", figure)
    folder, config = runs.folder / "unseen", runs.configs["unseen"]
    evaluations = [event for event in read_metrics(folder) if event["event"] == "eval"]
    assert [(e["step"], e["heldout_loss"], e["rows"]) for e in evaluations] == [
        (0, 0.5, 2),
        (STEPS, None, 0),
    ]
    assert heldout_losses(folder) == {0: 0.5}
    result = write_result(config, folder)
    assert (result["loss_before"], result["loss_after"]) == (0.5, None)
    assert result["checkpoint"] == f"checkpoints/step-{STEPS:08d}"
    show(config, result)
    line = f"held-out loss 0.5000 → none (all held-out rows were removed) after {STEPS} steps"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", ["zero-0", "zero-3", "one"])
def test_a_run_continues_at_another_zero_stage_and_world_size(runs: Runs, name: str) -> None:
    """Norm and clipping match too, which DeepSpeed does not do without ZeRO."""
    for figure in ("loss", "grad_norm"):
        expected = runs.curve("unbroken", figure)
        assert runs.curve(name, figure) == pytest.approx(expected, rel=1e-5)


def test_lora_continues_at_another_world_size_and_trains_only_adapters(runs: Runs) -> None:
    assert runs.curve("lora-3") == pytest.approx(runs.curve("lora"), rel=1e-5)
    begun, ended = (
        load_file(runs.checkpoint("lora", s) / "model.safetensors") for s in (BEGUN, STEPS)
    )
    assert {name.partition(".")[0] for name in ended} == {"language_projector", "language_model"}
    assert all(".lora_" in name for name in ended if name.startswith("language_model."))
    assert all((ended[name] != begun[name]).any() for name in ended)
    held = runs.checkpoint("lora", STEPS)
    numbers = sum(tensor.numel() for tensor in ended.values())
    size = sum(file.stat().st_size for file in held.iterdir())
    assert size < 3 * 4 * numbers + 60_000  # weights, two moments, headers; no base model
    assert VLVCaptioner.from_pretrained(held).lora.rank == 0


@pytest.mark.faults  # twice a change; one is above
@pytest.mark.parametrize("name", ["one-0", "one-3", "two-one-two"])
def test_a_run_continues_after_two_changes_of_world_size_or_stage(
    more_runs: Runs, name: str
) -> None:
    for figure in ("loss", "grad_norm"):
        expected = more_runs.curve("unbroken", figure, start=BETWEEN)
        assert more_runs.curve(name, figure, start=BETWEEN) == pytest.approx(expected, rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["low-0", "low-1", "low-3"])
def test_bfloat16_continues_at_another_zero_stage(more_runs: Runs, name: str) -> None:
    """The stages round and accumulate gradients differently."""
    assert more_runs.curve(name) == pytest.approx(more_runs.curve("low"), rel=2e-3)


def test_bfloat16_continues_from_its_master_weights(runs: Runs) -> None:
    assert runs.curve("low-again") == runs.curve("low")
    weights = load_file(runs.checkpoint("low", BEGUN) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())


def test_optimizer_state_is_saved_by_name_for_trainable_weights_only(runs: Runs) -> None:
    for name in ("unbroken", "zero-0", "zero-3", "one"):
        folder = runs.checkpoint(name, BETWEEN)
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        names = {f"{w}.{m}" for w in weights for m in ("exp_avg", "exp_avg_sq")}
        assert set(moments) == names
        assert all(moments[f"{w}.exp_avg"].shape == tensor.shape for w, tensor in weights.items())
        assert sorted(file.name for file in folder.iterdir()) == [
            "checkpoint.json", "model.safetensors", "optimizer.safetensors",
        ]  # fmt: skip
    expected = load_file(runs.checkpoint("unbroken", BETWEEN) / "optimizer.safetensors")
    for name in ("zero-0", "zero-3", "one"):
        here = load_file(runs.checkpoint(name, BETWEEN) / "optimizer.safetensors")
        torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["unbroken", "one"])
def test_every_step_reports_the_digest_of_its_rows(runs: Runs, name: str) -> None:
    for step, event in runs.steps(name).items():
        assert event["keys"] == f"{keys_digest(runs.rows(step)):016x}"


def test_a_non_finite_loss_names_the_rows_of_all_workers(runs: Runs) -> None:
    assert list(runs.steps("spoilt")) == [1]  # after which the weights are enormous
    for rank in (0, 1):
        message = (runs.folder / "spoilt" / f"error-{rank}.txt").read_text()
        assert message.startswith("the loss of step 2 is nan, from 6 rows with the keys ")
        rows = message.removesuffix(": lower train.learning_rate or check these rows")
        keys = rows.partition("with the keys ")[2].split(", ")
        assert sorted(map(int, keys)) == sorted(runs.rows(2))


def test_a_damaged_checkpoint_is_refused_on_all_ranks(
    runs: Runs,
) -> None:
    """Of two ranks on one machine, only the first verifies the files."""
    assert runs.steps("damaged") == {}
    messages = {(runs.folder / "damaged" / f"error-{rank}.txt").read_text() for rank in (0, 1)}
    (line,) = messages
    assert "optimizer.safetensors' is damaged: its digest is" in line


class Engine:
    """A stand-in for DeepSpeed's engine, which must not be used here."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(2, 2)


def test_a_damaged_or_mismatched_optimizer_file_is_refused(runs: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs.checkpoint("unbroken", BETWEEN), tmp_path / "step-00000004"))
    with pytest.raises(CheckpointError, match=r"does not fit the model: .* tensors unexpected"):
        load_optimizer(Engine(), folder)
    file = folder / "optimizer.safetensors"
    verify_checkpoint(folder)
    turn_a_bit(file)
    assert is_finished(folder)
    with pytest.raises(CheckpointError, match="is damaged: its digest is"):
        verify_checkpoint(folder)
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_finished(folder)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_optimizer(Engine(), folder)
    file.unlink()
    assert not is_finished(folder)
    with pytest.raises(CheckpointError, match=r"lacks optimizer\.safetensors"):
        verify_checkpoint(folder)
    about = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(about | {"more_files": {}}))
    assert is_finished(folder)  # weights alone: an export, or of another program
    with pytest.raises(CheckpointError, match=r"start a new one with model\.path="):
        load_optimizer(Engine(), folder)
