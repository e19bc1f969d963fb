"""Export: writes trained or imported weights, base models and a model card into one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.execution.connection import quiet_libraries
from pipelines.export.card import model_card
from pipelines.export.config import ExportConfig
from pipelines.storage.tables import check_same_settings, read_json_object, with_added
from pipelines.training.metrics import heldout_losses
from pipelines.training.run_folder import RESULT
from vlv_model.checkpoints.files import read_chain, read_checkpoint, stages_of
from vlv_model.checkpoints.parts import parts_exported
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ConfigError, RunError

if TYPE_CHECKING:  # the model libraries would delay --help
    from vlv_model.autoencoder import VLVAutoEncoder
    from vlv_model.captioner import VLVCaptioner

REPORT = "import.json"
# Of this machine, or of no run.
_LOCAL_SETTINGS = (
    "run_dir", "ray", "model", "input", "output", "captions", "dry_run", "estimate",
)  # fmt: skip


def export(config: ExportConfig) -> str:
    """Write the folder unless it exists; returns a line to print.

    Raises RunError when the folder holds anything else, CheckpointError without trained weights.
    """
    quiet_libraries()
    if config.model.path is None and config.from_reference is None:
        raise ConfigError("give model.path (a run or checkpoint) or --from-reference")
    made_with = config.model_dump(include={"precision", "parts", "license"})
    if config.from_reference is not None:
        return _import(config, Path(config.from_reference), made_with)
    return _export(config, made_with)


def _export(config: ExportConfig, made_with: dict[str, str]) -> str:
    model_config, checkpoint = config.model.find()
    if checkpoint is None:
        raise CheckpointError(
            f"model.path={config.model.path} holds base models and no trained weights: give a training "
            "run, one of its checkpoints, or an exported folder"
        )
    chain = read_chain(checkpoint)
    made_of = {
        **made_with,
        "weights": [info.sha256 for _, info in chain],
        "preprocess": model_config.preprocess,
    }
    if _is_finished(config.output, made_of):
        return "exported already: nothing to do"
    stages = stages_of(checkpoint)  # verifies all files of the chain before loading a model
    last = chain[-1][1]
    model_config, _ = config.model.resolve(parts_exported(last.stage, config.parts, model_config))

    from vlv_model.checkpoints.export import open_model, sources_of  # the model libraries

    base_models: dict[str, str] = {}
    for _, info in chain:
        base_models |= info.base_models
    origin = {
        "made_of": made_of,
        "base_models": sources_of(model_config, last.stage),
        "trainings": [
            {
                "stage": info.stage,
                "step": info.step,
                "rows_seen": info.rows_seen,
                "sha256": info.sha256,
                "settings": without_local_settings(info.config),
            }
            for _, info in chain
        ],
        "run": _recorded(checkpoint, last.step),
    }
    if last.origin is not None:
        origin["before"] = last.origin
    about = {
        **last.model_dump(include={"stage", "step", "rows_seen"}),
        "config": without_local_settings(last.config),
        "merged_stages": stages[:-1],
        "base_models": base_models,
        "origin": origin,
    }
    _write(config, open_model(model_config, checkpoint, last.stage), model_config, about)
    return f"{last.stage}, step {last.step:,} ({config.precision})"


def _import(config: ExportConfig, source: Path, made_with: dict[str, str]) -> str:
    if not source.exists():
        raise CheckpointError(f"--from-reference: there is no file or folder '{source}'")
    model_config, checkpoint = config.model.find()
    if checkpoint is not None:
        raise ConfigError(
            f"model.path={config.model.path} has trained weights: with --from-reference give only base "
            "models"
        )

    from vlv_model.checkpoints.export import open_model, sources_of
    from vlv_model.reference.importer import fill, stage_of
    from vlv_model.reference.state_dicts import read_reference

    if "preprocess" not in config.model.model_fields_set:
        model_config = model_config.model_copy(update={"preprocess": "reference"})
    reference = read_reference(source)
    made_of = {
        **made_with,
        "weights": [*reference.digests.values()],
        "preprocess": model_config.preprocess,
    }
    if _is_finished(config.output, made_of):
        return "imported already: nothing to do"
    stage = stage_of(reference)
    resolved, _ = config.model.resolve(parts_exported(stage, config.parts, model_config))
    model_config = resolved.model_copy(update={"preprocess": model_config.preprocess})
    model = open_model(model_config, None, stage)
    report = fill(model, reference)
    if model_config.preprocess == "reference":
        report.notes.append(
            "model.preprocess=reference: images are cropped as by the published code"
        )
    about = {
        "stage": stage,
        "step": reference.step or 0,
        "rows_seen": 0,  # unknown
        "config": {},
        "merged_stages": ["stage1"] if stage == "stage2" else [],
        "origin": {
            "made_of": made_of,
            "base_models": sources_of(model_config, stage),
            "reference": {"files": reference.digests, "step": reference.step},
        },
    }
    report_json = json.dumps(report.to_json(), indent=2) + "\n"
    _write(config, model, model_config, about, {REPORT: report_json})
    return report.text()


def _write(
    config: ExportConfig,
    model: VLVAutoEncoder | VLVCaptioner,
    base_models: ModelConfig,
    about: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the folder of `model`, built from `base_models`, with its card and other `texts`."""
    from vlv_model.checkpoints.export import export_model

    card = model_card(Path(config.output).name, base_models, about, config.license)
    export_model(
        config.output,
        model,
        base_models,
        about,
        precision=config.precision,
        parts=config.parts,
        texts={"README.md": card, **(texts or {})},
    )


def _is_finished(output: str, made_of: Mapping[str, Any]) -> bool:
    """Whether the folder holds this export; RunError if it holds anything else."""
    if not os.path.lexists(output):
        return False
    try:
        origin = read_checkpoint(output).origin or {}
    except CheckpointError:
        origin = {}
    if "made_of" not in origin:
        raise RunError(f"output={output} exists and holds no export: choose another output")
    recorded = with_added(origin["made_of"], made_of)
    check_same_settings(Path(output), recorded, made_of, "output")
    return True


def without_local_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run without local paths."""
    return {
        key: without_local_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _LOCAL_SETTINGS
    }


def _recorded(checkpoint: Path, step: int) -> dict[str, Any]:
    """Rows and held-out losses of the checkpoint's run; {} if the checkpoint is in no run folder."""
    run_dir = checkpoint.absolute().parent.parent
    if not (run_dir / "run.json").is_file():
        return {}
    rows = read_json_object(run_dir / "run.json").get("rows")
    losses = {str(s): loss for s, loss in heldout_losses(run_dir).items() if s <= step}
    recorded = {"rows": rows, "heldout_loss": losses}
    if (run_dir / RESULT).is_file():
        result = read_json_object(run_dir / RESULT)
        recorded["columns_read"] = result.get("columns_read")
    return recorded
