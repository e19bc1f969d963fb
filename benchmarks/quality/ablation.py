"""Run the paper's ablations with the tiny models.

    python benchmarks/quality/ablation.py runs/ablation [--seeds 0 1 2] [--stage1-steps 300] [--stage2-steps 300]

For each seed and variant, the jobs train stage 1 from the shipped pretrained parts, then stage 2 on the
same pairs, and the captions of test scenes are scored. Prints a Markdown table (mean ± standard
deviation over seeds) and, as the last line, JSON. Repeat the command to continue an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.demo.config import LOGICAL_CPUS, DemoConfig
from pipelines.demo.job import Demo
from pipelines.execution.connection import RayConfig, ray_session
from vlv_model.config import Trainable
from vlv_model.tiny import NUM_QUERIES

if TYPE_CHECKING:
    from pipelines.demo.proof import TestScenes

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs" / "tiny"


@dataclass(frozen=True)
class Variant:
    """A row of the table: settings of the encoder and of stage 2."""

    name: str
    num_queries: int = NUM_QUERIES
    bottleneck: bool = True
    trainable: Trainable = "projector+llm"
    pretrained_rate: float = 1.0  # stage 2: learning rate of LLM and encoder / projector's rate

    @property
    def encoder(self) -> str:
        """Name of its stage-1 run; variants that differ only in stage 2 share one."""
        return f"{self.num_queries}-queries" + ("" if self.bottleneck else "-no-bottleneck")

    def model_settings(self, seed: int) -> list[str]:
        return [
            f"model.num_queries={self.num_queries}",
            f"model.bottleneck={str(self.bottleneck).lower()}",
            f"model.projector_seed={seed}",
        ]

    def stage2_settings(self) -> list[str]:
        return [
            f"train.trainable={self.trainable}",
            f"train.pretrained_rate={self.pretrained_rate}",
        ]


VARIANTS = (
    Variant("projector only", trainable="projector"),
    Variant("projector + LLM"),
    Variant("projector + LLM + encoder", trainable="projector+llm+encoder"),
    Variant("projector + LLM, at a tenth", pretrained_rate=0.1),
    Variant(
        "projector + LLM + encoder, at a tenth",
        trainable="projector+llm+encoder",
        pretrained_rate=0.1,
    ),
    *(Variant(f"{n} queries", num_queries=n) for n in (NUM_QUERIES // 2, NUM_QUERIES // 4)),
    Variant("bottleneck removed", bottleneck=False),
)
FIGURES = {
    "gap_closed": "gap closed",
    "exact_match": "exact match",
    "exact_match_held_out_combinations": "held-out combinations",
    "words": "attributes",
    "words_held_out_combinations": "attributes, held-out",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=4_000, help="number of training scenes")
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--stage1-steps", type=int, default=300)
    parser.add_argument("--stage2-steps", type=int, default=300)
    given = parser.parse_args(arguments)
    from pipelines.demo.proof import TestScenes

    found: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in VARIANTS}
    with ray_session(RayConfig(num_cpus=LOGICAL_CPUS)):
        for seed in given.seeds:
            demo = Demo(
                DemoConfig(
                    run_dir=str(given.folder / f"seed-{seed}"),
                    full=True,
                    scenes=given.scenes,
                    test_scenes=given.test_scenes,
                    seed=seed,
                    stage1_steps=given.stage1_steps,
                    stage2_steps=given.stage2_steps,
                ),
                CONFIGS,
            )
            demo.claim()
            demo.ingest()
            test = TestScenes.read(demo.folder)
            gaps: dict[str, float] = {}
            for variant in VARIANTS:
                found[variant.name].append(measure(demo, test, variant, seed, gaps))
                print(f"seed {seed}, {variant.name}: {found[variant.name][-1]}", flush=True)
    print(table(found))
    print(json.dumps({"benchmark": "ablation", "seeds": given.seeds, "variants": found}))


def measure(
    demo: Demo, test: TestScenes, variant: Variant, seed: int, gaps: dict[str, float]
) -> dict[str, float]:
    """Train a variant, unless it is finished, and score it; `gaps` caches gap_closed by encoder."""
    from pipelines.demo.proof import caption_scores, denoising
    from pipelines.execution.model import ModelSettings
    from vlv_model.autoencoder import VLVAutoEncoder

    encoder = demo.folder / "encoders" / variant.encoder
    captioner = demo.folder / "captioners" / variant.name.replace(",", "").replace(" ", "-")
    captions = demo.folder / "captions" / captioner.name
    model = variant.model_settings(seed)
    demo.stage1(f"encoders/{encoder.name}", *model)
    stage2 = variant.stage2_settings()
    demo.stage2(f"captioners/{captioner.name}", encoder, *stage2, *model)
    demo.recaption(f"captions/{captions.name}", captioner)
    if variant.encoder not in gaps:
        autoencoder = VLVAutoEncoder.from_pretrained(*ModelSettings(path=str(encoder)).resolve())
        losses = denoising(autoencoder, test.squares, test.truths)
        gaps[variant.encoder] = losses["gap_closed"]
    scores: dict[str, Any] = caption_scores(test, captions)
    return {
        "gap_closed": gaps[variant.encoder],
        "exact_match": scores["exact_match"],
        "exact_match_held_out_combinations": scores["exact_match_held_out_combinations"],
        "words": statistics.mean(scores["attributes"].values()),
        "words_held_out_combinations": statistics.mean(
            scores["attributes_held_out_combinations"].values()
        ),
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation of each figure, in percent, as a Markdown table."""
    lines = [f"| stage 2 | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, runs in found.items():
        cells = []
        for figure in FIGURES:
            values = [100 * run[figure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
