"""Adapters on the caption decoder: trained instead of it, saved without it, merged when loaded."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from pipelines.cli.config import load
from pipelines.export.config import ExportConfig
from pipelines.export.job import export
from tests.vlv_model.made_checkpoints import metadata, shift
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import read_checkpoint, save_checkpoint
from vlv_model.config import Lora
from vlv_model.errors import CheckpointError
from vlv_model.lora import is_adapter

LORA = Lora(rank=4, alpha=6, dropout=0.5)


@pytest.fixture
def adapted(stage1: Path) -> VLVCaptioner:
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True, lora=LORA)
    captioner.set_trainable("projector+llm")
    return captioner


def loss_of(captioner: VLVCaptioner, squares: torch.Tensor) -> torch.Tensor:
    return captioner.loss(squares, **captioner.tokenize(["a red circle", "b", "", "a blue star"]))


def test_new_adapters_change_nothing_and_only_they_get_gradients(
    adapted: VLVCaptioner, stage1: Path, squares: torch.Tensor
) -> None:
    plain = VLVCaptioner.from_pretrained(stage1, for_training=True)
    assert torch.equal(loss_of(adapted, squares), loss_of(plain, squares))
    adapted.train()
    shift(adapted)  # or the first matrix of each has no gradient, as the second is zero
    assert not torch.equal(loss_of(adapted, squares), loss_of(adapted, squares))  # dropout
    loss_of(adapted, squares).backward()
    reached = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in reached if not n.startswith("language_projector.")} == {
        n for n, _ in adapted.named_parameters() if is_adapter(n)
    }


def test_a_checkpoint_has_the_adapters_and_opens_as_a_plain_captioner(
    adapted: VLVCaptioner, stage1: Path, squares: torch.Tensor, tmp_path: Path
) -> None:
    shift(adapted)
    saved = save_checkpoint(
        tmp_path / "stage2", adapted, metadata(stage1, "stage2", parent=str(stage1))
    )
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert (saved / "model.safetensors").stat().st_size < 4 * sum(trained) + 10_000  # its header
    assert all(
        is_adapter(name) or name.startswith("language_projector.")
        for name in read_checkpoint(saved).tensors
    )
    trained_on = VLVCaptioner.from_pretrained(saved, for_training=True)
    assert trained_on.lora == LORA

    export(load(ExportConfig, None, [f"output={tmp_path / 'whole'}", f"model.path={saved}"]))
    expected = loss_of(adapted.eval(), squares)
    for opened in (saved, tmp_path / "whole"):
        captioner = VLVCaptioner.from_pretrained(opened)
        assert not [n for n in captioner.state_dict() if is_adapter(n) or "base_layer" in n]
        torch.testing.assert_close(loss_of(captioner, squares), expected, rtol=0, atol=1e-5)
        assert all(p.requires_grad for p in captioner.language_model.parameters())
    ids = torch.arange(12)[None]
    qwen = Qwen2ForCausalLM.from_pretrained(tmp_path / "whole" / "language_model").eval()
    torch.testing.assert_close(
        qwen(ids).logits, adapted.language_model(ids).logits, rtol=0, atol=1e-5
    )


def test_a_checkpoint_with_adapters_cannot_be_a_parent(
    adapted: VLVCaptioner, stage1: Path, tmp_path: Path
) -> None:
    saved = save_checkpoint(tmp_path / "a", adapted, metadata(stage1, "stage2", parent=str(stage1)))
    plain = VLVCaptioner.from_pretrained(saved)
    plain.set_trainable("projector")
    above = save_checkpoint(tmp_path / "b", plain, metadata(stage1, "stage2", parent=str(saved)))
    with pytest.raises(CheckpointError, match=r"has adapters .* export it with jobs/export\.py"):
        VLVCaptioner.from_pretrained(above)


def test_adapters_are_merged_before_rounding(
    adapted: VLVCaptioner, stage1: Path, tmp_path: Path
) -> None:
    shift(adapted)
    saved = save_checkpoint(
        tmp_path / "stage2", adapted, metadata(stage1, "stage2", parent=str(stage1))
    )
    exact = VLVCaptioner.from_pretrained(saved).language_model
    low = VLVCaptioner.from_pretrained(saved, precision="bfloat16").language_model
    for ours, theirs in zip(low.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
