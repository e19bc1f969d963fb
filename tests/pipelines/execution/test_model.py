"""`model.path` and the check of the models before a job starts anything."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipelines.execution.model import ModelSettings, shipped_models
from vlv_model.checkpoints.hub import HubId
from vlv_model.errors import ModelError

ROOT = Path(__file__).parents[3]


def test_the_shipped_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_models() == ["models", "stage1", "stage2"]
    _, checkpoint = ModelSettings(path="tiny/stage2").resolve(stage="stage2")
    assert checkpoint is not None
    assert checkpoint.parts[-2:] == ("pretrained", "stage2")
    assert ModelSettings(path="tiny/models").resolve(stage="stage1")[1] is None
    (tmp_path / "tiny" / "stage2").mkdir(parents=True)  # a folder of the user's wins
    assert ModelSettings(path="tiny/stage2").path == str(tmp_path / "tiny" / "stage2")


def test_a_missing_folder_names_the_shipped_models() -> None:
    with pytest.raises(ModelError, match=r"^model\.path=/no/run does not exist: .* tiny/stage2$"):
        ModelSettings(path="/no/run").resolve()


def test_parts_are_checked_without_loading_them(tiny_models: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(tiny_models, tmp_path / "models"))
    config = models / "florence" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"^florence: config\.json .* expected 'florence2'"):
        ModelSettings(path=str(models)).resolve(stage="stage2")
    config.write_text(json.dumps(content))
    (models / "florence" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^florence: cannot load .* lacks .* safetensors weights"):
        ModelSettings(path=str(models)).resolve(stage="stage2")
    ModelSettings(path=str(models)).resolve(["vae"])  # a job that does not read the other


def test_a_hub_that_takes_no_connection_is_found_out_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A firewall drops packets: the library would wait for each address in turn."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vlv_model.checkpoints.hub._CONNECT_SECONDS", 0.1)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]  # its queue is full: it answers no more
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        asked: list[HubId] = []
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: asked.append)
        with pytest.raises(
            ModelError, match=r"no connection within 0\.1 s.*model\.path is not set"
        ):
            ModelSettings().resolve(stage="stage1")
        pinned = {"florence": f"microsoft/x@{'a' * 40}"}  # a commit, of which no file is here
        with pytest.raises(ModelError, match=r"not in the local cache .* the hub does not answer"):
            ModelSettings(**pinned).resolve(["florence"])
        for one in waiting:
            one.close()
    assert asked == []


PROGRAM = """
import sys
from pipelines.cli.config import load
from pipelines.export.config import ExportConfig
from pipelines.export.job import export
from pipelines.precompute.config import PrecomputeConfig
from pipelines.precompute.job import precompute
from pipelines.recaption.caption_files import caption_files
from pipelines.recaption.config import CaptionConfig, RecaptionConfig
from pipelines.recaption.job import recaption
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.job import reconstruct
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.job import train
from vlv_model.errors import VLVError

IMAGES = ("data.input=images", "data.output=output")
RUN = ("data.input=images", "run_dir=run")
for run, cls, settings in [
    (recaption, RecaptionConfig, (*IMAGES, "model.path=no")),
    (recaption, RecaptionConfig, (*IMAGES, "model.path=tiny/stage1")),
    (recaption, RecaptionConfig, (*IMAGES, "model.path=tiny/stage2")),
    (reconstruct, ReconstructConfig, (*IMAGES, "model.path=tiny/stage1")),
    (precompute, PrecomputeConfig, (*IMAGES, "model.path=tiny/models")),
    (precompute, PrecomputeConfig, (*IMAGES, "actors.use_gpu=true")),
    (caption_files, CaptionConfig, ("image=no.jpg", "model.path=tiny/stage1")),
    (export, ExportConfig, ("output=export", "model.path=no")),
    (export, ExportConfig, ("output=export", "from_reference=no")),
    (train, Stage1Config, (*RUN, "model.path=tiny/models", "train.use_gpu=true")),
    (train, Stage1Config, (*RUN, "model.path=tiny/models")),
    (train, Stage2Config, (*RUN, "model.path=tiny/models")),
]:
    try:
        run(load(cls, None, settings))
    except VLVError as error:
        print(error)
    else:
        print("no error")
print(*{"torch", "ray", "transformers", "diffusers", "deepspeed"} & sys.modules.keys())
"""


def test_a_job_that_cannot_start_loads_neither_models_nor_ray(tmp_path: Path) -> None:
    """Each takes seconds to import, and the person at the terminal has mistyped a path."""
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.stderr == ""
    *errors, loaded = ended.stdout.split("\n")[:-1]
    assert loaded == ""
    images = f"data.input={tmp_path}/images does not exist"
    expected = [
        f"model.path={tmp_path}/no does", "model.path must be a stage-2", images, images, images,
        "actors.use_gpu=true: this",
        "model.path must be a stage-2", f"model.path={tmp_path}/no does", "--from-reference: there is",
        "train.use_gpu=true: this", images, "model.path must be a stage-1",
    ]  # fmt: skip
    assert [error[: len(start)] for error, start in zip(errors, expected, strict=True)] == expected
