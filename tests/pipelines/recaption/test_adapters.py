"""LoRA adapters (train.lora) in the recaption job, before and after merging."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipelines.cli.config import load
from pipelines.export.config import ExportConfig
from pipelines.export.job import export
from pipelines.recaption.job import recaption
from tests.pipelines.recaption.conftest import Settings
from tests.vlv_model.made_checkpoints import metadata, shift
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import read_checkpoint, save_checkpoint
from vlv_model.config import Lora
from vlv_model.lora import is_adapter


def test_adapters_give_the_captions_of_their_merged_export(
    settings: Settings,
    trained_captioner: Path,
    tiny_models: Path,
    tmp_path: Path,
) -> None:
    stage1 = trained_captioner.parent / "stage1"
    lora = Lora(rank=4, alpha=6, dropout=0.5)
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True, lora=lora)
    captioner.set_trainable("projector+llm")
    shift(captioner)
    about = metadata(tiny_models, "stage2", parent=str(stage1))
    adapted = save_checkpoint(tmp_path / "adapted", captioner, about)
    assert any(is_adapter(name) for name in read_checkpoint(adapted).tensors)
    whole = tmp_path / "whole"
    export(load(ExportConfig, None, [f"output={whole}", f"model.path={adapted}"]))

    captions = []
    for model in (adapted, whole, trained_captioner):
        output = tmp_path / f"captions-{model.name}"
        assert recaption(settings(f"data.output={output}", f"model.path={model}")) == {"ok": 21}
        table = pd.read_parquet(output / "data").sort_values("key")
        captions.append(table[["key", "caption", "num_tokens", "finish_reason"]].values.tolist())
    assert captions[0] == captions[1]
    assert captions[0] != captions[2]
