"""Export's `--dry-run`: the size of the folder, from the configurations of the models."""

from __future__ import annotations

from pathlib import Path

from pipelines.estimate.report import Lines
from pipelines.estimate.words import count_words, lines, size_words
from pipelines.export.config import ExportConfig
from vlv_model.checkpoints import skeleton
from vlv_model.checkpoints.files import StageName, read_checkpoint
from vlv_model.checkpoints.parts import parts_exported
from vlv_model.errors import ConfigError
from vlv_model.precision import dtype_of

_UNKNOWN_STAGE: StageName = "stage2"


def dry_run(config: ExportConfig) -> str:
    """The parts of the folder with their sizes. Raises what an export raises for `model.path`."""
    if config.model.path is None and config.from_reference is None:
        raise ConfigError("give model.path (a run or checkpoint) or --from-reference")
    _, checkpoint = config.model.find()
    stage = read_checkpoint(checkpoint).stage if checkpoint else _UNKNOWN_STAGE
    sizes = part_sizes(config, stage)
    found: Lines = [(name, f"{count_words(n)} parameters, {size_words(b)}") for name, n, b in sizes]
    total = sum(size for *_, size in sizes)
    found.append(
        (
            "folder",
            f"{size_words(total)} in {config.precision}, besides tokenizers: {config.output}",
        )
    )
    if checkpoint is None and config.from_reference:
        found.append(
            ("stage", f"taken for {stage}: {Path(config.from_reference).name} is not read")
        )
    return lines(found)


def part_sizes(config: ExportConfig, stage: StageName) -> list[tuple[str, int, int]]:
    """Name, number of parameters and bytes of each part of the folder."""
    model, _ = config.model.find()
    autoencoder, captioner = skeleton.autoencoder(model), skeleton.captioner(model)
    modules = {
        "florence": captioner.encoder.florence,
        **captioner.text_encoder.pretrained_parts,
        "language_model": captioner.language_model,
        **autoencoder.diffusion_decoder.pretrained_parts,
    }
    names = [name for name in parts_exported(stage, config.parts, model) if name in modules]
    numbers = {name: skeleton.num_parameters(modules[name]) for name in names}
    new = captioner if stage == "stage2" else autoencoder
    numbers["queries and projectors"] = sum(
        p.numel() for name, p in new.named_parameters() if name.startswith(new.new_parts)
    )
    size = dtype_of(config.precision).itemsize
    return [(name, count, size * count) for name, count in numbers.items()]
