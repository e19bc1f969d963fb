"""Compare the recaption job's captions per second with plain loops and with the bare model.

    python benchmarks/recaption/throughput.py runs/bench-recaption --size tiny --device cpu [--rounds 3] [--quick]

All use the same captioner and images, read from Parquet, in turn:

    ours            the job, end to end: Ray, chunks, commits; greedy. The start is measured
                    separately, until the first commit; the rate counts only later commits
    reference       the published loop: 4 beams, batch 2, float32, the processor on the CPU
    reference 300   the same, but always 300 tokens, as by a model that cannot stop
    plain           transformers' generate: greedy, batch 64
    bare            the engine on decoded squares, in as many processes as ours has actors

All but "reference 300" stop at the end-of-text. Figures are medians over the rounds. A caption
that differs from the plain loop's counts as equal if the two largest logits at the first different
token differ by less than 1e-4. The last line is JSON.

`--slots` measures something else: the step of the job on chunks of 256 decoded squares, without Ray, on
one thread of a CPU:

    drained         a chunk begins when the one before it is finished
    streamed        a chunk begins as soon as the decoder wants more images, as in the job
    beams           four beams, in batches of 64

The model has random weights and captions forced lengths: 20 tokens and an exponential of 60, at most
300. `slots_used` is the share of all slots that hold a caption, over all steps of the decoder: a count,
the same in every round. Ratios are of captions per second of CPU time, which other work on the machine
disturbs less than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.faults.counting import committed
from benchmarks.faults.jobs import environment
from benchmarks.faults.kinds import REPO
from benchmarks.recaption import captioners
from benchmarks.recaption.loops import WAYS, Loop, run_bare, run_loop, run_step
from pipelines.cli.config import build
from pipelines.recaption import job
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.job import recaption
from vlv_model.caption_tokens import caption_text, end_of_text_id

LONGEST = 300  # tokens
BATCH = 64
CLOSE = 1e-4  # difference of two logits
LOOPS = {
    "reference": {"batch": 2, "beams": 4, "stop": True},
    "reference 300": {"batch": 2, "beams": 4, "stop": False},
    "plain": {"batch": BATCH, "beams": 1, "stop": True},
}
# Images for each: enough for some seconds, or for the slow ones some minutes.
IMAGES = {
    "tiny": {"ours": 4096, "bare": 4096, "plain": 1024, "reference": 96, "reference 300": 8},
    "small": {"ours": 128, "bare": 64, "plain": 64, "reference": 4, "reference 300": 2},
    "full": {"ours": 2048, "bare": 512, "plain": 256, "reference": 32, "reference 300": 8},
}
SLOT_IMAGES = {"tiny": 1024, "small": 512, "full": 2048}
SLOT_ROWS = 256  # of a chunk, as by default
CHUNK = {"tiny": 128, "small": 16, "full": 128}
QUICK = {"ours": 24, "bare": 8, "plain": 8, "reference": 2, "reference 300": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for captioner, images and tables")
    parser.add_argument("--size", choices=IMAGES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few images, random weights")
    parser.add_argument("--slots", action="store_true", help="drained and streamed slots alone")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.folder = given.folder.absolute()
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.folder, given.size, given.device, given.quick, given.slots)
    if given.contender:
        print(json.dumps(bench.contend(given.contender)))
        return
    rounds = 1 if given.quick else given.rounds
    if given.slots:
        print(json.dumps({"benchmark": "recaption slots", **bench.compare_slots(rounds)}))
        return
    print(json.dumps({"benchmark": "recaption", **bench.compare(rounds)}))


class Bench:
    """A captioner, images, and the contenders, each in its own process."""

    def __init__(
        self, folder: Path, size: str, device: str, quick: bool, slots: bool = False
    ) -> None:
        self.folder, self.size, self.device, self.quick = folder, size, device, quick
        self.images = QUICK if quick else IMAGES[size]
        self.longest = 12 if quick else LONGEST
        self.chunk = 4 if quick else CHUNK[size]
        cpu = device == "cpu"
        self.workers = (os.cpu_count() or 1) if cpu else torch.cuda.device_count()
        is_trained = size == "tiny" and not quick and not slots
        self.model = folder / ("stage2" if is_trained else f"random-{size}")
        suffix = ("-slots" if slots else "") + ("-quick" if quick else "")
        self.file = folder / f"images-{size}{suffix}.parquet"
        if slots:
            self.images = {"slots": 24 if quick else SLOT_IMAGES[size]}

    def prepare(self) -> None:
        if captioners.is_forced(self.model):
            captioners.random(self.folder, self.size)
        else:
            captioners.trained(self.folder)
        captioners.write_images(self.file, max(self.images.values()), self.size)

    # ------------------------------------------------------------------ in a process of its own

    def contend(self, name: str) -> dict[str, Any]:
        """Run one contender once; returns images, tokens and seconds, or the figures of slots."""
        if name in WAYS:
            return self.contend_slots(name)
        device, images = torch.device(self.device), self.images[name]
        if name == "ours":
            if captioners.is_forced(self.model):
                job.open_step = captioners.ForcedCaptionImages
            recaption(self.config())
            return {}
        if name == "bare":
            generate = self.config().generate
            return run_bare(self.model, self.file, images, generate, device, self.workers)
        loop = Loop(**LOOPS[name])
        run_loop(loop, self.model, self.file, images, self.longest, device)
        if name == "plain":
            (self.folder / "plain.json").write_text(json.dumps(list(loop.ids.items())))
        return loop.figures()

    def contend_slots(self, way: str) -> dict[str, Any]:
        images, rows = self.images["slots"], 8 if self.quick else SLOT_ROWS
        generate = self.config().generate.model_copy(
            update={"batch_size": 4 if self.quick else BATCH}
        )
        images = images // 8 if way == "beams" else images  # they take long
        return run_step(way, self.model, self.file, images, generate, rows)

    def config(self) -> RecaptionConfig:
        data = {"input": str(self.file), "output": str(self.folder / "captions")}
        generate = {"num_beams": 1, "max_new_tokens": self.longest, "batch_size": BATCH}
        return build(
            RecaptionConfig,
            {
                "data": {**data, "rows_per_chunk": self.chunk},
                "model": {"path": str(self.model)},
                "generate": generate,
                "actors": {"use_gpu": self.device == "cuda"},
            },
        )

    # ---------------------------------------------------------------------------- the comparison

    def compare(self, rounds: int) -> dict[str, Any]:
        self.prepare()
        results: dict[str, list[dict[str, Any]]] = {n: [] for n in ("ours", *LOOPS, "bare")}
        for number in range(rounds):
            for name, runs in results.items():
                runs.append(self.measured(name))
                print(f"round {number + 1}, {name}: {json.dumps(runs[-1])}", flush=True)
        return {
            "size": self.size,
            "device": self.device,
            "cores": os.cpu_count(),
            "rounds": rounds,
            **summarise(results),
            **self.compared(),
        }

    def compare_slots(self, rounds: int) -> dict[str, Any]:
        """The ways of a step in turn, each run in a process of its own."""
        self.prepare()
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for name, runs in results.items():
                runs.append(json.loads(self._in_a_process("--slots", name)))
                print(f"round {number + 1}, {name}: {json.dumps(runs[-1])}", flush=True)
        median = {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in results.items()
        }
        rate = {name: one["captions_per_cpu_second"] for name, one in median.items()}
        return {
            "size": self.size, "cores": os.cpu_count(), "rounds": rounds,
            "ratio_to_drained": round(rate["streamed"] / rate["drained"], 3),
            "ratio_to_beams": round(rate["streamed"] / rate["beams"], 2),
            "medians": median, "runs": results,
        }  # fmt: skip

    def measured(self, name: str) -> dict[str, Any]:
        """Rates of one run of a contender."""
        output = self.folder / "captions"
        if name == "ours":
            shutil.rmtree(output, ignore_errors=True)
        begun = time.time()
        line = self._in_a_process(name)
        seconds = time.time() - begun
        if name == "ours":
            return job_rates(output, begun, seconds, self.workers)
        one = json.loads(line)
        return rates(one["images"], one["tokens"], one["seconds"])

    def _in_a_process(self, *contender: str) -> bytes:
        """The last line that a contender prints."""
        command = [sys.executable, __file__, str(self.folder), *contender[:-1], "--contender"]
        command += [contender[-1], "--size", self.size, "--device", self.device]
        command += ["--quick"] if self.quick else []
        variables = environment(self.folder)
        variables.pop("OMP_NUM_THREADS")  # torch's default: all cores
        done = subprocess.run(command, cwd=REPO, env=variables, stdout=subprocess.PIPE, check=True)
        return done.stdout.splitlines()[-1]

    def compared(self) -> dict[str, Any]:
        """How many of our greedy captions equal the plain loop's."""
        captioner = captioners.open_captioner(self.model)
        tokenizer = captioner.tokenizer
        rows, _ = committed(self.folder / "captions")
        ours = dict(zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True))
        plain = dict(json.loads((self.folder / "plain.json").read_text()))
        other = {k: ids for k, ids in plain.items() if caption_text(tokenizer, ids) != ours[k]}
        pixels = captioners.squares_of(self.file, other, captioner)
        close = sum(
            margin(captioner, pixels[key], ids, ours[key]) < CLOSE for key, ids in other.items()
        )
        return {
            "captions_compared": len(plain),
            "captions_equal": len(plain) - len(other),
            "captions_apart_by_rounding": close,
            "captions_identical": close == len(other),
        }


def rates(images: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "captions_per_second": round(images / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def job_rates(table: Path, begun: float, seconds: float, workers: int) -> dict[str, Any]:
    """Rates of a finished job: after each actor's first commit, and overall."""
    rows, damaged = committed(table)
    assert not damaged, damaged
    commits = sorted((table / "_commits").glob("*.json"), key=lambda file: file.stat().st_mtime)
    times = [file.stat().st_mtime for file in commits]
    sizes = [json.loads(file.read_text())["rows"] for file in commits]
    steady = min(workers, len(commits) - 1)
    tokens = sum(rows["num_tokens"].to_pylist())
    count = sum(sizes[steady:])
    share = count / rows.num_rows
    return {
        **rates(count, round(tokens * share), times[-1] - times[steady - 1]),
        "captions_per_second_over_all": round(rows.num_rows / seconds, 3),
        "seconds_to_first_commit": round(times[0] - begun, 2),
        "seconds": round(seconds, 2),
    }


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and the ratios that have targets."""
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    rate = {name: one["captions_per_second"] for name, one in median.items()}
    return {
        "ratio_to_reference": round(rate["ours"] / rate["reference"], 2),
        "ratio_to_reference_300": round(rate["ours"] / rate["reference 300"], 2),
        "ratio_to_plain": round(rate["ours"] / rate["plain"], 2),
        "share_of_bare_model": round(rate["ours"] / rate["bare"], 3),
        "medians": median,
    }


@torch.no_grad()
def margin(captioner: Any, square: torch.Tensor, ids: list[int], text: str) -> float:
    """Difference of the two largest logits at the first token where `text` differs from `ids`."""
    tokenizer = captioner.tokenizer
    common = 0
    while common < len(ids):
        if not text.startswith(caption_text(tokenizer, ids[: common + 1]).rstrip("\ufffd")):
            break
        common += 1
    prefix_ids = torch.tensor([ids[:common]]).long()
    embeddings = captioner.language_model.get_input_embeddings()(prefix_ids)
    inputs = torch.cat([captioner.prefix(square[None]), embeddings], dim=1)
    logits = captioner.language_model(inputs_embeds=inputs).logits[0, -1]
    if type(captioner) is captioners.ForcedCaptioner:
        logits[end_of_text_id(tokenizer)] = -torch.inf
    first, second = logits.topk(2).values.tolist()
    return first - second


if __name__ == "__main__":
    main()
