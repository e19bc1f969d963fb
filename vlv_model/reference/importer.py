"""Imports a published state dict into our model strictly, and reports all but renamed tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlv_model.checkpoints.files import StageName
from vlv_model.checkpoints.weights import describe_mismatches, shapes_of
from vlv_model.errors import CheckpointError
from vlv_model.reference.layout import (
    BIAS,
    HEAD,
    PADDED,
    POSITION_IDS,
    POSITIONS,
    Expected,
    expected_tensors,
)
from vlv_model.reference.state_dicts import Reference

# Prefixes of our names -> part in the report; the first match counts.
_PARTS = {
    "encoder.learnable_queries": "learnable queries",
    "encoder.caption_projector": "caption projector",
    "encoder.florence.vision_tower": "vision tower",
    "encoder.florence.multi_modal_projector": "vision tower's projector",
    "encoder.florence.language_model.encoder.embed_tokens": "token embeddings",
    "encoder.florence.language_model.decoder.embed_tokens": "token embeddings",
    "encoder.florence.language_model.shared": "token embeddings",
    "encoder.florence.language_model.encoder": "BART encoder",
    "encoder.florence.language_model.decoder": "BART decoder",
    "text_encoder": "text encoder",
    "language_projector": "language projector",
    "language_model": "language model",
    "diffusion_decoder.vae": "VAE",
    "diffusion_decoder.unet": "UNet",
}
# Not the token embeddings: the published code does not tie them to the frozen head and trains them.
FROZEN = ("vision tower", "vision tower's projector", "text encoder", "VAE", "UNet")
_OPTIONAL = {"VAE": "vae.", "UNet": "unet."}


@dataclass
class PartReport:
    """Counts of a part's tensors that equal the base model's, equal it in bfloat16, or differ."""

    tensors: int = 0
    equal: int = 0
    equal_in_bfloat16: int = 0
    different: int = 0
    largest_difference: float = 0.0


@dataclass
class ImportReport:
    """Each part compared with its base model, and notes on everything but renamed tensors."""

    parts: dict[str, PartReport] = field(default_factory=lambda: defaultdict(PartReport))
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report for JSON: `parts` (each with `frozen`) and `notes`."""
        parts = {n: {**asdict(p), "frozen": n in FROZEN} for n, p in self.parts.items()}
        return {"parts": parts, "notes": self.notes}

    def text(self) -> str:
        """The report for the console: one line per part and note."""
        lines = [f"{'part':26}tensors  equal to the base model  as bfloat16  different"]
        for name, part in self.parts.items():
            lines.append(
                f"{name:26}{part.tensors:>7}{part.equal:>26}{part.equal_in_bfloat16:>13}"
                f"{part.different:>11}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def stage_of(reference: Reference) -> StageName:
    """Stage 2 if there is a language model; anything else is checked as stage 1."""
    has_captioner = any(name.startswith(("qwen2_model.", "mlp.")) for name in reference.tensors)
    return "stage2" if has_captioner else "stage1"


def fill(model: nn.Module, reference: Reference) -> ImportReport:
    """Copy every tensor of `reference` into `model`, frozen parts too.

    `model` is a VLVAutoEncoder or VLVCaptioner with its base models' weights. Names, shapes and
    shared tensors are checked before `model` is changed. Raises CheckpointError that names missing,
    unexpected, misshapen, contradictory or non-finite tensors.
    """
    stage = stage_of(reference)
    weights = model.state_dict()
    report = ImportReport()
    given = dict(reference.tensors)
    expected = _without_absent_parts(expected_tensors(weights, stage), given, report)
    shared = _shared_tensors(expected, weights)
    if reference.omits_shared:
        _restore_shared(given, shared)
    shapes = {name: _shape_for(one, given.get(name)) for name, one in expected.items()}
    shapes |= _unused_shapes("VLV_model." if stage == "stage2" else "", shapes, given, reference)
    if mismatches := describe_mismatches(shapes_of(given), shapes):
        raise CheckpointError(
            f"this is not a {stage} checkpoint of these base models: {'; '.join(mismatches)}: name "
            "the base models (model.*) and sizes (model.num_queries) that it was trained with"
        )
    _check_values(given, shared, report)
    for name in sorted(given.keys() - expected.keys()):
        report.notes.append(f"{name}: dropped, {_about_unused(name, given)}")
    aliases = {name for _, *others in shared for name in others}
    for name, one in expected.items():
        if name not in aliases:
            _copy(given[name], weights[one.ours], name, one, report)
    for name, part in report.parts.items():
        if name in FROZEN and part.different:
            report.notes.append(
                f"{name}: frozen in the method, but {part.different} tensors differ from the base "
                f"model's (by up to {part.largest_difference:.3g}); the checkpoint's are used"
            )
    return report


def _without_absent_parts(
    expected: dict[str, Expected], given: Mapping[str, Tensor], report: ImportReport
) -> dict[str, Expected]:
    for part, beginning in _OPTIONAL.items():
        inside = [name for name in expected if name.startswith(beginning)]
        if inside and not any(name.startswith(beginning) for name in given):
            report.notes.append(f"{part}: not in the checkpoint, the base model's is used")
            expected = {n: e for n, e in expected.items() if not n.startswith(beginning)}
    return expected


def _shared_tensors(
    expected: Mapping[str, Expected], weights: Mapping[str, Tensor]
) -> list[list[str]]:
    """Groups of published names that are one tensor in our model (tied weights)."""
    groups = defaultdict(list)
    for name, one in expected.items():
        tensor = weights[one.ours]
        groups[(tensor.data_ptr(), tuple(tensor.shape))].append(name)
    # The token embeddings that embed the prompt come first.
    first = [prefix + PADDED[0] for prefix in ("", "VLV_model.")]
    return [
        sorted(names, key=lambda name: name not in first)
        for names in groups.values()
        if len(names) > 1
    ]


def _restore_shared(given: dict[str, Tensor], shared: list[list[str]]) -> None:
    for names in shared:
        if present := [name for name in names if name in given]:
            for name in names:
                given.setdefault(name, given[present[0]])


def _unused_shapes(
    prefix: str, shapes: Mapping[str, list[int]], given: Mapping[str, Tensor], reference: Reference
) -> dict[str, list[int]]:
    """Shapes of tensors in the checkpoint that our model does not use."""
    table = shapes[prefix + PADDED[0]]
    unused = {prefix + HEAD: table, prefix + BIAS: [1, table[0]]}
    if reference.omits_shared and prefix + HEAD not in given:
        del unused[prefix + HEAD]
    if prefix + POSITION_IDS in given:
        unused[prefix + POSITION_IDS] = [1, shapes[prefix + POSITIONS][0]]
    return unused


def _about_unused(name: str, given: Mapping[str, Tensor]) -> str:
    tensor = given[name]
    if name.endswith(HEAD):
        same = torch.equal(tensor, given[name.removesuffix(HEAD) + PADDED[0]])
        return "unused: " + ("equal to" if same else "different from") + " the token embeddings"
    if name.endswith(BIAS):
        return "unused: " + ("all zero" if not tensor.any() else "not all zero")
    is_range = torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()))
    if not is_range:
        raise CheckpointError(f"{name} is not 0, 1, 2, …: this is not a CLIP text encoder")
    return "0, 1, 2, …"


def _shape_for(one: Expected, tensor: Tensor | None) -> list[int]:
    """The expected shape; a padded table may have fewer rows in the checkpoint."""
    if one.padded and tensor is not None and tensor.dim() and 0 < tensor.shape[0] < one.shape[0]:
        return [tensor.shape[0], *one.shape[1:]]
    return one.shape


def _check_values(
    given: Mapping[str, Tensor], shared: list[list[str]], report: ImportReport
) -> None:
    for name, tensor in given.items():
        if not (tensor.is_floating_point() or name.endswith(POSITION_IDS)):
            raise CheckpointError(f"{name} is {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} has values that are not finite")
    for first, *others in shared:
        for name in others:
            if torch.equal(given[first], given[name]):
                continue
            if not first.removeprefix("VLV_model.") == PADDED[0]:
                raise CheckpointError(
                    f"{first} and {name} differ, but are one tensor in our model: this checkpoint "
                    "was trained with untied weights"
                )
            report.notes.append(
                f"{name}: dropped, different from {first}, which embeds the prompt: the published "
                "code trained them separately"
            )


def _copy(theirs: Tensor, ours: Tensor, name: str, one: Expected, report: ImportReport) -> None:
    """Compare a tensor with the base model's, then overwrite that."""
    value = theirs.detach().to(ours.dtype)
    if one.transposed:
        value = value.T
        report.notes.append(f"{name}: transposed")
    target = ours[: len(value)] if one.padded else ours
    if len(target) < len(ours):
        report.notes.append(
            f"{name}: {len(target):,} rows of {len(ours):,}; the other tokens keep the base model's "
            "rows"
        )
    part = report.parts[_part_of(one.ours)]
    part.tensors += 1
    if torch.equal(value, target):
        part.equal += 1
    elif torch.equal(value, target.to(torch.bfloat16).to(target.dtype)):
        part.equal_in_bfloat16 += 1
    else:
        part.different += 1
        difference = float((value - target).abs().max())
        part.largest_difference = max(part.largest_difference, difference)
    with torch.no_grad():
        target.copy_(value)


def _part_of(name: str) -> str:
    return next(part for beginning, part in _PARTS.items() if name.startswith(beginning))
