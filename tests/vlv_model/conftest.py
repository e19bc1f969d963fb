"""The tiny models, written once, and fresh copies of what is built from them."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the hub

import pytest
import torch

from tests.vlv_model.drawings import scenes
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
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
