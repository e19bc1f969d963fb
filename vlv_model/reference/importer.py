"""Fill a model of ours with a published state dict, strictly, and report what was more than names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlv_model.checkpoints.files import StageName
from vlv_model.checkpoints.weights import describe_misfits, shapes_of
from vlv_model.errors import CheckpointError
from vlv_model.reference.files import Reference
from vlv_model.reference.layout import (
    BIAS,
    HEAD,
    PADDED,
    POSITION_IDS,
    POSITIONS,
    Expected,
    expected_tensors,
)

# What the report counts together; the first that a name begins with.
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
# Token embeddings are not among them: nothing ties them in the published code, so it trained them.
FROZEN = ("vision tower", "vision tower's projector", "text encoder", "VAE", "UNet")
_OPTIONAL = {"VAE": "vae.", "UNet": "unet."}


@dataclass
class PartReport:
    """One part's tensors against the base model's: equal, equal once rounded to bfloat16, other."""

    tensors: int = 0
    equal: int = 0
    equal_in_bfloat16: int = 0
    different: int = 0
    largest_difference: float = 0.0


@dataclass
class ImportReport:
    """What an import did: parts against their base models, and notes on all that is not a name."""

    parts: dict[str, PartReport] = field(default_factory=lambda: defaultdict(PartReport))
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values: `parts` (each with `frozen`) and `notes`."""
        parts = {n: {**asdict(p), "frozen": n in FROZEN} for n, p in self.parts.items()}
        return {"parts": parts, "notes": self.notes}

    def text(self) -> str:
        """For the console: a line for each part and note."""
        lines = [f"{'part':26}tensors  equal to the base model  as bfloat16  different"]
        for name, part in self.parts.items():
            lines.append(
                f"{name:26}{part.tensors:>7}{part.equal:>26}{part.equal_in_bfloat16:>13}"
                f"{part.different:>11}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def stage_of(reference: Reference) -> StageName:
    """Stage 2 has a language model; everything else is taken for stage 1, and checked as such."""
    second = any(name.startswith(("qwen2_model.", "mlp.")) for name in reference.tensors)
    return "stage2" if second else "stage1"


def fill(model: nn.Module, reference: Reference) -> ImportReport:
    """Copy every tensor of `reference` into its place in `model`, frozen parts too.

    `model` is a VLVAutoEncoder or VLVCaptioner as its base models made it. Names, shapes and
    copies of shared tensors are checked before anything is changed. Raises CheckpointError that
    names what is missing, unexpected, of another shape, contradictory or not finite.
    """
    stage = stage_of(reference)
    weights = model.state_dict()
    report = ImportReport()
    given = dict(reference.tensors)
    expected = _without_absent_parts(expected_tensors(weights, stage), given, report)
    shared = _shared_tensors(expected, weights)
    if reference.drops_copies:
        _restore_copies(given, shared)
    shapes = {name: _shape_for(one, given.get(name)) for name, one in expected.items()}
    shapes |= _unused_shapes("VLV_model." if stage == "stage2" else "", shapes, given, reference)
    if misfits := describe_misfits(shapes_of(given), shapes):
        raise CheckpointError(
            f"this is no {stage} checkpoint of these base models: {'; '.join(misfits)}: name the "
            "base models (model.*) and sizes (model.num_queries) that it was trained with"
        )
    _check_values(given, shared, report)
    for name in sorted(given.keys() - expected.keys()):
        report.notes.append(f"{name}: dropped, {_about_unused(name, given)}")
    copies = {name for _, *others in shared for name in others}
    for name, one in expected.items():
        if name not in copies:
            _copy(given[name], weights[one.ours], name, one, report)
    for name, part in report.parts.items():
        if name in FROZEN and part.different:
            report.notes.append(
                f"{name}: frozen in the method, but {part.different} tensors are not the base "
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
    """Groups of their names whose tensors are one in our model (tied weights)."""
    groups = defaultdict(list)
    for name, one in expected.items():
        tensor = weights[one.ours]
        groups[(tensor.data_ptr(), tuple(tensor.shape))].append(name)
    # Of the token embeddings that which the prompt is read from comes first.
    first = [prefix + PADDED[0] for prefix in ("", "VLV_model.")]
    return [
        sorted(names, key=lambda name: name not in first)
        for names in groups.values()
        if len(names) > 1
    ]


def _restore_copies(given: dict[str, Tensor], shared: list[list[str]]) -> None:
    for names in shared:
        if present := [name for name in names if name in given]:
            for name in names:
                given.setdefault(name, given[present[0]])


def _unused_shapes(
    prefix: str, shapes: Mapping[str, list[int]], given: Mapping[str, Tensor], reference: Reference
) -> dict[str, list[int]]:
    """Tensors that the checkpoint has and our model has no place for."""
    table = shapes[prefix + PADDED[0]]
    unused = {prefix + HEAD: table, prefix + BIAS: [1, table[0]]}
    if reference.drops_copies and prefix + HEAD not in given:
        del unused[prefix + HEAD]
    if prefix + POSITION_IDS in given:
        unused[prefix + POSITION_IDS] = [1, shapes[prefix + POSITIONS][0]]
    return unused


def _about_unused(name: str, given: Mapping[str, Tensor]) -> str:
    tensor = given[name]
    if name.endswith(HEAD):
        same = torch.equal(tensor, given[name.removesuffix(HEAD) + PADDED[0]])
        return "unused: " + ("equal to" if same else "other than") + " the token embeddings"
    if name.endswith(BIAS):
        return "unused: " + ("all zero" if not tensor.any() else "not all zero")
    counted = torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()))
    if not counted:
        raise CheckpointError(f"{name} is not 0, 1, 2, …: this is no CLIP text encoder")
    return "0, 1, 2, …"


def _shape_for(one: Expected, tensor: Tensor | None) -> list[int]:
    """The expected shape; of a padded table, with the rows that the checkpoint has, if fewer."""
    if one.padded and tensor is not None and tensor.dim() and 0 < tensor.shape[0] < one.shape[0]:
        return [tensor.shape[0], *one.shape[1:]]
    return one.shape


def _check_values(
    given: Mapping[str, Tensor], shared: list[list[str]], report: ImportReport
) -> None:
    for name, tensor in given.items():
        if not (tensor.is_floating_point() or name.endswith(POSITION_IDS)):
            raise CheckpointError(f"{name} holds {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds values that are not finite")
    for first, *others in shared:
        for name in others:
            if torch.equal(given[first], given[name]):
                continue
            if not first.removeprefix("VLV_model.") == PADDED[0]:
                raise CheckpointError(
                    f"{first} and {name} differ, and are one tensor here: this checkpoint was "
                    "trained with them untied"
                )
            report.notes.append(
                f"{name}: dropped, other than {first}, from which the prompt is read: the published "
                "code trained them apart"
            )


def _copy(theirs: Tensor, ours: Tensor, name: str, one: Expected, report: ImportReport) -> None:
    """Compare a tensor with the base model's in its place, then put it there."""
    value = theirs.detach().to(ours.dtype)
    if one.transposed:
        value = value.T
        report.notes.append(f"{name}: transposed")
    target = ours[: len(value)] if one.padded else ours
    if len(target) < len(ours):
        report.notes.append(
            f"{name}: {len(target):,} rows of {len(ours):,}; the rest, of tokens that it lacks, "
            "stay the base model's"
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
