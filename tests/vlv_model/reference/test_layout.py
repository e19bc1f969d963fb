"""At full size, on the meta device: every tensor has one published name."""

import pytest
import torch

from benchmarks.training.models import SIZES, captioner
from tests.vlv_model import published_layout
from vlv_model.reference.layout import BIAS, HEAD, expected_tensors


@pytest.fixture(scope="module")
def full_size():
    """The captioner of the paper: Florence-2-large, the text encoder of SD 2.1, Qwen2.5-3B."""
    return captioner(SIZES["full"], torch.device("meta"))


def test_every_tensor_has_one_place(full_size):
    published = published_layout.stage2(full_size)
    expected = expected_tensors(full_size.state_dict(), "stage2")
    unused = {f"VLV_model.{HEAD}", f"VLV_model.{BIAS}"}
    assert published.keys() == expected.keys() | unused
    assert {n: one.shape for n, one in expected.items()} == {
        n: list(t.shape) for n, t in published.items() if n not in unused
    }
    assert sorted(one.ours for one in expected.values()) == sorted(full_size.state_dict())
    assert [n for n, one in expected.items() if one.transposed] == [
        "VLV_model.model.image_projection"
    ]
    assert expected["VLV_model.model.image_projection"].shape == [2048, 1024]


def test_the_layout_of_florence_has_the_published_size(full_size):
    """The hub counts 776,721,497 parameters in the remote code's checkpoint, embeddings once."""
    tensors = published_layout.florence(full_size.encoder.florence)
    copies = ("lm_head.weight", "embed_tokens.weight")
    assert sum(t.numel() for n, t in tensors.items() if not n.endswith(copies)) == 776_721_497
