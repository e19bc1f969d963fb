"""Makes a folder of small files as the code of today writes them; run once, and kept.

    python -m tests.compatibility.make tests/compatibility/made-2026-11

Each job runs as a user runs it: once to its end, and once until it is killed half-way (SIGKILL, the
driver and its Ray). Later code opens all of it and goes on from there (test_made.py). To keep what
a later version writes, make another folder: one that is here is never made again.

The models are tinier than the demo's, so that all of it together takes little room. Paths of the
machine that makes it are replaced by HOME in the files that hold them.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tiny_world import scenes
from pipelines.training.metrics import read_metrics
from tests.compatibility.site import BASE_URL, serve
from vlv_model import tiny

ROOT = Path(__file__).parents[2]
HOME = "@HOME@"
IMAGES = 20
JOBS = ("ingest", "precompute", "stage1", "stage2", "recaption", "reconstruct")

TRAIN = [
    "data.holdout=0.3", "train.use_gpu=false", "train.num_workers=1", "train.steps=12",
    "train.global_batch_size=4", "train.micro_batch_size=2", "train.learning_rate=0.002",
    "train.eval_rows=4", "train.eval_every=6", "train.checkpoint_every=4", "train.keep_checkpoints=1",
    "train.wandb=disabled", "train.samples=0", "ray.num_cpus=2",
]  # fmt: skip
ACTORS = ["actors.use_gpu=false", "actors.num_actors=1", "data.rows_per_chunk=2", "ray.num_cpus=2"]
GENERATE = ["generate.num_beams=2", "generate.max_new_tokens=12"]


def write_models(folder: Path) -> None:
    """The models of vlv_model.tiny, some ten times smaller."""
    tiny.NUM_QUERIES, tiny.TEXT_POSITIONS = 6, 20
    tiny.IMAGE_SIZE, tiny.ENCODER_IMAGE_SIZE = 32, 64
    tiny.VISION.update(embed_dim=[8, 8, 16], num_heads=[1, 1, 2], num_groups=[1, 1, 2])
    tiny.VISION.update(projection_dim=16)
    tiny.BART.update(d_model=16, encoder_layers=1, decoder_layers=1)
    tiny.BART.update(encoder_ffn_dim=32, decoder_ffn_dim=32)
    tiny.BART.update(encoder_attention_heads=2, decoder_attention_heads=2)
    tiny.VAE.update(block_out_channels=[4, 8, 8, 8])
    tiny.UNET.update(sample_size=4, block_out_channels=[16, 16], cross_attention_dim=16)
    tiny.UNET.update(attention_head_dim=[2, 2], norm_num_groups=8)
    tiny.CLIP_TEXT.update(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    tiny.CLIP_TEXT.update(max_position_embeddings=tiny.TEXT_POSITIONS)
    tiny.QWEN.update(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    tiny.QWEN.update(num_key_value_heads=1)
    tiny.write_tiny_models(folder)


def write_web(home: Path) -> None:
    """Pictures, files that are none, a list of all and of one that is missing, and captions."""
    web = home / "web"
    web.mkdir()
    drawn = scenes.sample(seed=3, n=IMAGES)
    names = [f"{number}.png" for number in range(IMAGES)]
    for number, (name, scene) in enumerate(zip(names, drawn, strict=True)):
        buffer = io.BytesIO()
        scenes.draw(scene, number).resize((48, 40)).save(buffer, "PNG")
        (web / name).write_bytes(buffer.getvalue())
    (web / "text.png").write_text("not a picture")
    (web / "cut.png").write_bytes((web / "0.png").read_bytes()[:300])
    listed = [*names, "text.png", "cut.png", "missing.png"]
    rows = len(listed)
    columns = {"URL": [f"{BASE_URL}/{name}" for name in listed], "TEXT": listed}
    columns |= {"AESTHETIC_SCORE": [6.0 + number / rows for number in range(rows)]}
    pq.write_table(pa.table(columns), home / "metadata.parquet")
    captions = {"url": columns["URL"][:IMAGES], "caption": [scenes.caption(s) for s in drawn]}
    pq.write_table(pa.table(captions), home / "teacher.parquet")


def commands(home: Path, out: Path) -> dict[str, list[str]]:
    """Settings of each job of the folder `home`, with its output in `out`."""
    images = f"data.input={home / 'images'}"
    return {
        "ingest": [
            f"data.input={home / 'metadata.parquet'}", f"data.output={out / 'images'}",
            "download.allow_private=true", "download.retries=0", "image.size=32",
            "filter.min_aesthetic=6.0", "image.format=png", "rows_per_chunk=3", "ray.num_cpus=2",
        ],
        "stage1": [images, f"model.path={home / 'models'}", f"run_dir={out / 'stage1'}", *TRAIN],
        "stage2": [
            images, f"data.captions={home / 'teacher.parquet'}", "data.join_on=url", f"data.output={home / 'pairs'}",
            f"model.path={home / 'encoder'}", f"run_dir={out / 'stage2'}", *TRAIN,
        ],
        "precompute": [
            images, f"model.path={home / 'models'}", f"data.output={out / 'latents'}", *ACTORS,
        ],
        "recaption": [
            images, f"model.path={home / 'captioner'}", f"data.output={out / 'captions'}",
            "data.split=all", *GENERATE, *ACTORS,
        ],
        "reconstruct": [
            images, f"model.path={home / 'encoder'}", f"data.output={out / 'pictures'}",
            "diffusion.num_steps=3", *ACTORS,
        ],
    }  # fmt: skip


OUTPUT = {"ingest": "images", "stage1": "stage1", "stage2": "stage2", "precompute": "latents",
          "recaption": "captions", "reconstruct": "pictures"}  # fmt: skip


def command(name: str, settings: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *settings]


def run(name: str, settings: list[str]) -> str:
    done = subprocess.run(command(name, settings), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")
    return done.stdout


def is_half_done(output: Path) -> bool:
    """Some of it is committed: parts of a table, or a training's checkpoint and a step behind it."""
    if (output / "run.json").is_file():
        events = [event["event"] for event in read_metrics(output)]
        return "checkpoint" in events and events[-1] == "step"
    return len(list(output.glob("_commits/*.json"))) >= 2


def is_through(output: Path) -> bool:
    if (output / "run.json").is_file():
        return any(event["step"] == 12 for event in read_metrics(output))
    return (output / "_report.html").exists() or len(list(output.glob("_commits/*.json"))) > 7


def run_half(name: str, settings: list[str], output: Path) -> None:
    """Kill the job when `is_half_done`; again from the start where it was faster than that."""
    for _ in range(20):
        job = subprocess.Popen(command(name, settings), cwd=ROOT)
        while job.poll() is None and not is_half_done(output):
            time.sleep(0.001)
        if job.poll() is None:
            # Its workers, too, which would go on for as long as they do not miss their raylet.
            children = psutil.Process(job.pid).children(recursive=True)
            for process in [job, *children]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.wait()
        if is_half_done(output) and not is_through(output):
            return
        shutil.rmtree(output)
    raise SystemExit(f"{name} could not be killed half-way")


def replace_home(folder: Path, home: str, by: str) -> None:
    """Write `by` in place of `home` into all texts below `folder`.

    But for a part's config.json: the fingerprint of a model is taken from its bytes.
    """
    for file in folder.rglob("*"):
        if file.name == "config.json":
            continue
        if file.is_file() and file.suffix in (".json", ".jsonl", ".yaml", ".md", ".html", ".csv"):
            text = file.read_text()
            if home in text:
                file.write_text(text.replace(home, by))


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} is there already: what is kept is never made again")
    home = Path(tempfile.mkdtemp(prefix="vlv-made-"))
    whole, killed = commands(home, home), commands(home, home / "killed")
    write_models(home / "models")
    write_web(home)

    def both(name: str, make: Callable[[], None] = lambda: None) -> None:
        run(name, whole[name])
        make()
        run_half(name, killed[name], home / "killed" / OUTPUT[name])

    with serve(home / "web", delay=0.2):
        both("ingest")
    both("precompute")
    both("stage1")
    run("export", [str(home / "encoder"), f"model.path={home / 'stage1'}", "parts=all"])
    both("stage2")
    run("export", [str(home / "captioner"), f"model.path={home / 'stage2'}"])
    both("recaption")
    both("reconstruct")
    (home / "settings").mkdir()
    for name in JOBS:
        printed = run(name, [*whole[name], "--print-config"])
        (home / "settings" / f"{name}.yaml").write_text(printed)
    replace_home(home, str(home), HOME)
    shutil.copytree(home, target)
    shutil.rmtree(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
