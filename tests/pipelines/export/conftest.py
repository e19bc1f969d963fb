"""A stage-2 run on a stage-1 checkpoint, with perturbed weights instead of training."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vlv_model.made_checkpoints import metadata, shift
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import save_checkpoint


@dataclass
class Trained:
    """Paths of the run and its checkpoints, and the models with their weights."""

    home: Path
    models: Path
    stage1: Path  # a checkpoint
    run: Path  # of stage 2
    autoencoder: VLVAutoEncoder
    captioner: VLVCaptioner


@pytest.fixture(scope="session")
def trained(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("origin")
    models = Path(shutil.copytree(tiny_models, home / "models"))
    settings = {"data": {"input": "/secret/images"}, "run_dir": "/secret/run"}
    settings |= {"train": {"learning_rate": 1e-5, "seed": 42}}
    autoencoder = VLVAutoEncoder.from_pretrained(models)
    shift(autoencoder)
    stage1 = home / "stage1" / "step-00000004"
    save_checkpoint(stage1, autoencoder, metadata(models, config=settings))
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    shift(captioner)
    run = home / "stage2"
    about = metadata(models, "stage2", parent=str(stage1), step=7, config=settings)
    save_checkpoint(run / "checkpoints" / "step-00000007", captioner, about)
    (run / "run.json").write_text(json.dumps({"rows": [98, 2]}))
    losses = ({"event": "eval", "step": s, "heldout_loss": 4.5 - s / 7} for s in (0, 7))
    (run / "metrics.jsonl").write_text("".join(json.dumps(loss) + "\n" for loss in losses))
    return Trained(home, models, stage1, run, autoencoder, captioner.eval())
