"""generate.engine=vllm on the real library, in its build for CPUs. `make test-vllm` installs and runs it."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipelines.cli.config import build, load
from pipelines.recaption.config import (
    VLLM_TEMPERATURES,
    GenerateConfig,
    RecaptionConfig,
)
from pipelines.recaption.engine import Engine
from pipelines.recaption.job import recaption
from pipelines.recaption.predictor import open_captioner, open_engine
from pipelines.recaption.vllm_engine import VLLMEngine
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.recaption import fake_vllm
from tests.vlv_model.drawings import scenes
from vlv_model import tiny
from vlv_model.checkpoints.loading import resolve_checkpoint
from vlv_model.errors import ConfigError

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # of 32
CAPTION = ["key", "caption", "num_tokens", "finish_reason", "status", "error"]
TOKENS = 16
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # before vLLM changes this process's


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny base models whose language model has heads that vLLM has on a CPU; the usual ones have 24."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in HEADS.items():
            patch.setitem(tiny.QWEN, name, size)
        return tiny.write_tiny_models(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture(scope="session")
def checkpoint(tiny_models: Path, request: pytest.FixtureRequest) -> Path:
    """A stage-2 checkpoint of known weights, some of whose captions end by themselves."""
    torch.manual_seed(0)
    checkpoint = request.getfixturevalue("trained_captioner")
    captioner = open_captioner(*resolve_checkpoint(checkpoint), GenerateConfig(), CPU)
    sentences = [captioner.tokenizer.tokenize(c.text) for c in captioner.generate(scenes(24, 0))]
    often = [token for tokens in sentences for token in set(tokens[:TOKENS])]
    end = next(token for token in often if 4 < often.count(token) < 20)
    file = tiny_models / "language_model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": end}))
    return checkpoint


def settings(**more: Any) -> GenerateConfig:
    basic = {"num_beams": 1, "max_new_tokens": TOKENS, "batch_size": 3}
    return build(GenerateConfig, {**basic, **more})


Opened = Callable[..., Engine]


@pytest.fixture
def opened(checkpoint: Path) -> Iterator[Opened]:
    """Opens engines, and closes them after the test."""
    engines: list[Engine] = []

    def open(**more: Any) -> Engine:
        model, folder = resolve_checkpoint(checkpoint)
        engines.append(open_engine(model, folder, settings(**more), CPU))
        return engines[-1]

    yield open
    for engine in engines:
        engine.close()


def captions(engine: Engine, images: torch.Tensor, keys: Any = None) -> list[Any]:
    keys = keys or range(len(images))
    found = {outcome.id: outcome for outcome in engine.captions(keys, images)}
    return [found[i].caption or found[i].error for i in range(len(keys))]


def test_the_stand_in_has_the_real_interface():
    import vllm
    import vllm.sampling_params
    from vllm.v1.engine import FINISH_REASON_STRINGS

    def parameters(function: Any) -> set[str]:
        kinds = inspect.signature(function).parameters.values()
        return {p.name for p in kinds if p.kind is not inspect.Parameter.VAR_KEYWORD}

    real = inspect.signature(vllm.SamplingParams).parameters
    for field in fields(fake_vllm.SamplingParams):
        assert field.name in real
    defaults, ours = vllm.SamplingParams(), fake_vllm.SamplingParams()
    for name in ("temperature", "top_p", "seed", "max_tokens", "ignore_eos", "detokenize"):
        assert getattr(defaults, name) == getattr(ours, name)
    kinds = vllm.sampling_params.RequestOutputKind
    assert {kind.name: kind.value for kind in kinds} == {
        kind.name: kind.value for kind in fake_vllm.RequestOutputKind
    }
    accepted = parameters(vllm.LLM.__init__) | {field.name for field in fields(vllm.EngineArgs)}
    assert parameters(fake_vllm.LLM.__init__) <= accepted
    assert parameters(fake_vllm.LLMEngine.__init__) - {"self", "model"} <= accepted
    for name in ("add_request", "abort_request", "has_unfinished_requests", "step"):
        method = getattr(fake_vllm.LLMEngine, name)
        assert parameters(method) <= parameters(getattr(vllm.LLMEngine, name))
    # Another reason would have to be understood first.
    assert set(FINISH_REASON_STRINGS) == {"stop", "length", "abort", "error", "repetition"}


def test_the_temperatures_that_are_refused_are_those_that_vllm_changes():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    least, most = VLLM_TEMPERATURES
    assert SamplingParams(temperature=least).temperature == least
    assert SamplingParams(temperature=least / 2).temperature == least
    assert SamplingParams(temperature=most).temperature == most
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=most + 0.1)


def test_captions_match_the_other_engine(opened, checkpoint):
    """Greedy, in float32, with captions that end by themselves and captions that are cut."""
    images, before = scenes(24, seed=0), processes_below(os.getpid())
    expected = captions(opened(), images)
    assert {caption.finish_reason for caption in expected} == {"stop", "length"}
    engine = opened(engine="vllm")
    assert captions(engine, images) == expected
    assert captions(engine, images[:5]) == expected[:5]  # the engine has kept nothing of the others
    cache = engine.llm.vllm_config.cache_config
    assert (
        cache.num_gpu_blocks == 3 + 1
    )  # a block of 128 positions for each image, and an empty one
    assert cache.enable_prefix_caching is False
    assert processes_below(os.getpid()) == before  # vLLM runs in this process


def test_samples_depend_on_seed_and_key_alone(opened):
    images = scenes(6, seed=0)
    engine = opened(engine="vllm", temperature=1.5, top_p=0.95, seed=7)
    keys = [5, -6, 7, 8, 2**62, -(2**62)]
    first = captions(engine, images, keys)
    assert captions(engine, images.flip(0), keys[::-1])[::-1] == first
    assert [captions(engine, images[i : i + 1], keys[i : i + 1])[0] for i in range(6)] == first
    other = captions(engine, images, [key + 1 for key in keys])
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_captions_may_be_as_long_as_the_model_has_positions(opened):
    most = tiny.QWEN["max_position_embeddings"] - tiny.NUM_QUERIES
    (caption,) = captions(opened(engine="vllm", max_new_tokens=most), scenes(1, seed=0))
    assert caption.num_tokens <= most
    with pytest.raises(
        ConfigError, match="1024"
    ) as refused:  # the jobs say it before, in our words
        opened(engine="vllm", max_new_tokens=most + 1)
    assert "\n" not in str(refused.value)


def test_a_failing_image_does_not_affect_other_captions(opened, monkeypatch):
    images = scenes(9, seed=0)
    engine = opened(engine="vllm")
    expected, prefix = captions(engine, images), engine.captioner.prefix

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(square, images[7]) for square in pixels):
            raise RuntimeError("a bad day")
        return prefix(pixels)

    monkeypatch.setattr(engine.captioner, "prefix", failing)
    assert captions(engine, images) == [*expected[:7], "RuntimeError: a bad day", expected[8]]
    assert not engine.llm.has_unfinished_requests()


def test_a_model_that_vllm_does_not_run_is_one_line(checkpoint):
    """Heads of 24, as the usual tiny language model's."""
    captioner = open_captioner(*resolve_checkpoint(checkpoint), settings(), CPU)
    config = Qwen2Config(vocab_size=len(captioner.tokenizer), **tiny.QWEN)
    captioner.language_model = Qwen2ForCausalLM(config)
    with pytest.raises(ConfigError, match=r"generate\.engine=vllm does not start .*24") as refused:
        VLLMEngine(captioner, settings(engine="vllm"), CPU)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------- whole jobs


class Job:
    """A job in a process of its own; `left` are the processes that it started and that still run."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.mark = f"VLV_TEST_JOB={uuid.uuid4()}"
        environment = ENVIRONMENT | dict([self.mark.split("=")])
        command = [sys.executable, ROOT / "jobs" / f"{name}.py", *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment, text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def ended(self) -> tuple[int, str, str]:
        """Exit status, standard output, last line of standard error."""
        out, err = self.process.communicate(timeout=500)
        return self.process.returncode, out, err.rstrip("\n").rsplit("\n", 1)[-1]

    @property
    def left(self) -> dict[int, str]:
        """Process id -> command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = command
            except OSError:  # it has ended, or is not ours
                continue
        return {number: command for number, command in found.items() if command}  # not zombies

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`."""
        deadline = time.monotonic() + 500
        while not (value := condition()):
            assert self.process.poll() is None, self.ended()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return value


def processes_below(process: int) -> set[int]:
    """All descendants of a process."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    direct = {int(child) for file in children for child in file.read_text().split()}
    return direct.union(*map(processes_below, direct))


def assert_nothing_left(job: Job) -> None:
    deadline = time.monotonic() + 30
    while job.left and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not job.left


@pytest.fixture
def image(pair_table: Path, tmp_path: Path) -> Path:
    row = next(read_rows(parquet_files(str(pair_table)), ["image"]))
    (tmp_path / "scene.png").write_bytes(row["image"]["bytes"])
    return tmp_path / "scene.png"


def test_one_image_without_ray(checkpoint, image):
    arguments = [image, "--model", checkpoint, "use_gpu=false", "generate.num_beams=1"]
    arguments += [f"generate.max_new_tokens={TOKENS}"]
    job = Job("caption", *arguments, "generate.engine=vllm")
    status, expected, _ = Job("caption", *arguments).ended()
    assert status == 0
    assert job.ended()[:2] == (0, expected)  # vLLM's messages are not on standard output
    assert not job.left


def test_a_stopped_job_leaves_nothing_behind(checkpoint, image):
    job = Job("caption", image, "--model", checkpoint, "use_gpu=false", "generate.num_beams=1",
              "generate.engine=vllm", "generate.max_new_tokens=1000")  # fmt: skip
    job.wait_for(lambda: "/vllm/_C" in Path(f"/proc/{job.process.pid}/maps").read_text())
    job.process.send_signal(signal.SIGTERM)
    assert job.ended()[0] == 143
    assert not job.left


def rows_of(table: Path) -> dict[int, tuple[Any, ...]]:
    rows = read_rows(parquet_files(str(table), published=False), CAPTION)
    return {row["key"]: tuple(row[name] for name in CAPTION) for row in rows}


def test_a_killed_actor_changes_no_caption(checkpoint, pair_table, tmp_path):
    """The job on both engines; vLLM's actor is killed after the first commits."""
    common = [
        f"data.input={pair_table}", f"model.path={checkpoint}", "data.rows_per_chunk=8",
        "generate.num_beams=1", f"generate.max_new_tokens={TOKENS}", "generate.batch_size=4",
        "actors.use_gpu=false", "actors.num_actors=1",
    ]  # fmt: skip
    plain, output = tmp_path / "plain", tmp_path / "vllm"
    job = Job("recaption", *common, f"data.output={output}", "generate.engine=vllm",
              "ray.num_cpus=2", "ray.object_store_gb=0.2")  # fmt: skip
    table = Table(output)
    job.wait_for(lambda: table.exists and table.counts())
    actor = next(n for n, command in job.left.items() if "_ModelActor" in command)
    os.kill(actor, signal.SIGKILL)
    assert table.pending()
    more = [f"data.output={plain}", "ray.address=in-process"]
    recaption(load(RecaptionConfig, None, [*common, *more]))
    expected = rows_of(plain)
    ends = {row[CAPTION.index("finish_reason")] for row in expected.values()}
    assert ends == {"stop", "length"}
    status, _, line = job.ended()
    assert status == 0, line
    assert rows_of(output) == expected
    assert_nothing_left(job)
