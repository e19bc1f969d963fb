"""The tiny models, written once, and fresh copies of the models built from them."""

import copy
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the hub

import pytest
import torch

from tests.vlv_model.drawings import scenes
from tests.vlv_model.made_checkpoints import metadata, shift
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import save_checkpoint
from vlv_model.tiny import write_tiny_models


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny_models(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture(scope="session")
def _autoencoder(tiny):
    return VLVAutoEncoder.from_pretrained(tiny)


@pytest.fixture(scope="session")
def _captioner(tiny):
    return VLVCaptioner.from_pretrained(tiny)


@pytest.fixture
def autoencoder(_autoencoder):
    return copy.deepcopy(_autoencoder)


@pytest.fixture
def captioner(_captioner):
    return copy.deepcopy(_captioner)


@pytest.fixture
def squares():
    """Four scenes, one coloured rectangle each, uint8 `[4 3 64 64]`."""
    return scenes(4, seed=0)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A -> B -> C: stage 1; stage 2 of everything; stage 2 of the language projector only."""
    folder = tmp_path_factory.mktemp("trained")
    a, b, c = (folder / run / "step_7" for run in ("run1", "run2", "run3"))
    autoencoder = VLVAutoEncoder.from_pretrained(tiny)
    shift(autoencoder)
    save_checkpoint(a, autoencoder, metadata(tiny))
    middle = VLVCaptioner.from_pretrained(a, for_training=True)
    shift(middle)
    save_checkpoint(b, middle, metadata(tiny, "stage2", parent=str(a)))
    last = copy.deepcopy(middle)
    last.set_trainable("projector")
    shift(last)
    save_checkpoint(c, last, metadata(tiny, "stage2", step=9, parent=str(b)))
    return folder, (autoencoder, middle, last)


@pytest.fixture
def chain(trained, tmp_path):
    """Copies of the three checkpoints, to be damaged, and the module of the last."""
    folder, modules = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return [tmp_path / run / "step_7" for run in ("run1", "run2", "run3")], modules[2]


@pytest.fixture
def stage1(chain):
    return chain[0][0]


@pytest.fixture
def stage2(chain, trained):
    return chain[0][1], copy.deepcopy(trained[1][1])


@pytest.fixture
def trained_autoencoder(trained):
    """The module of the stage-1 checkpoint."""
    return copy.deepcopy(trained[1][0])
