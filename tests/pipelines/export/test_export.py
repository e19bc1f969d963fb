"""Exports are self-contained, record their origin, and give the same captions."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, Florence2ForConditionalGeneration, Qwen2ForCausalLM

from pipelines.cli.config import load
from pipelines.execution.model import ModelSettings
from pipelines.export.card import model_card
from pipelines.export.config import ExportConfig
from pipelines.export.job import export
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.identity import caption_identity, fingerprint_of
from pipelines.tiny_world import scenes
from tests.jobs.conftest import Job, job  # noqa: F401
from tests.pipelines.export.conftest import Trained
from tests.vlv_model import published_layout
from tests.vlv_model.drawings import scenes as drawn
from tests.vlv_model.made_checkpoints import same_weights
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import read_checkpoint, stages_of
from vlv_model.config import ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import CheckpointError, ConfigError, ModelError, RunError
from vlv_model.precision import cast
from vlv_model.squares import Square

SQUARES = drawn(3, seed=1)  # uint8 [3 3 64 64]


def config(output: Path, model: Path, *more: str) -> ExportConfig:
    return load(ExportConfig, None, [f"output={output}", f"model.path={model}", *more])


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of stage 2 as a folder, at another place than it was written to."""
    folder = tmp_path_factory.mktemp("there")
    export(config(folder / "written", trained.run))
    (folder / "written").rename(folder / "captioner")
    return folder / "captioner"


@pytest.fixture
def alone(trained: Trained):
    """Takes everything away that the export was made of."""
    away = trained.home.with_name("away")
    trained.home.rename(away)
    yield
    away.rename(trained.home)


def test_the_folder_alone_gives_the_same_captioner(
    trained: Trained, exported: Path, alone: None
) -> None:
    captioner = VLVCaptioner.from_pretrained(exported)
    assert same_weights(captioner, trained.captioner)
    greedy = [m.generate(SQUARES, max_new_tokens=12) for m in (captioner, trained.captioner)]
    assert greedy[0] == greedy[1]
    beams = [m.generate(SQUARES, 3, 6) for m in (captioner, trained.captioner)]
    assert beams[0] == beams[1]
    assert same_weights(VLVEncoder.from_pretrained(exported), trained.captioner.encoder)


def test_jobs_take_it_as_model_path(
    trained: Trained,
    exported: Path,
    tmp_path: Path,
    job: Job,  # noqa: F811
) -> None:
    buffer = io.BytesIO()
    scenes.draw(next(iter(scenes.sample(seed=3, n=1))), 0).save(buffer, "PNG")
    (tmp_path / "scene.png").write_bytes(buffer.getvalue())
    captions = [
        job(
            "caption", tmp_path / "scene.png", f"model.path={path}", "generate.max_new_tokens=9"
        ).out
        for path in (trained.run, exported)
    ]
    assert captions[0] == captions[1] != ""
    model, checkpoint = ModelSettings(path=str(exported)).resolve()
    assert len(fingerprint_of(caption_identity(model, checkpoint, GenerateConfig()))) == 16
    assert stages_of(exported) == ["stage1", "stage2"]  # stage 2 may go on from it


def test_its_parts_are_ordinary_pretrained_folders(trained: Trained, exported: Path) -> None:
    florence, report = Florence2ForConditionalGeneration.from_pretrained(
        exported / "florence", output_loading_info=True
    )
    assert not any(report.values())
    assert same_weights(florence.model, trained.captioner.encoder.florence)
    language_model = Qwen2ForCausalLM.from_pretrained(exported / "language_model")
    assert same_weights(language_model, trained.captioner.language_model)
    words = "a large red circle"
    tokens = [
        AutoTokenizer.from_pretrained(p / "language_model")(words)
        for p in (trained.models, exported)
    ]
    assert tokens[0].input_ids == tokens[1].input_ids


def test_the_card_shows_the_run_and_no_local_path(trained: Trained, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other"
    assert header["pipeline_tag"] == "image-to-text"
    assert "base_model" not in header  # folders of this machine are no ids of the hub
    for text in ("98 rows to train on, 2 held out", "4.5000 at step 0, 3.5000 at step 7", "1e-05"):
        assert text in card
    assert "| stage1 | stage2 |" in card
    texts = [p.read_text() for p in exported.rglob("*") if p.suffix in (".json", ".md")]
    assert not any(str(trained.home) in text or "/secret" in text for text in texts)
    origin = read_checkpoint(exported).origin
    assert [training["stage"] for training in origin["trainings"]] == ["stage1", "stage2"]
    assert origin["base_models"]["florence"]["fingerprint"].startswith("opened-sha256:")


def test_the_card_links_base_models_of_the_hub(exported: Path) -> None:
    about = read_checkpoint(exported).model_dump()
    model, name = ModelConfig(), 'a: "b" # été'
    card = model_card(name, model, about, "apache-2.0")
    header = ModelCard(card).data.to_dict()  # as the hub's own library reads it
    assert f"from_pretrained({json.dumps(name, ensure_ascii=False)})" in card
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == sorted([model.language_model, model.florence, model.diffusion])


def test_a_damaged_base_model_is_detected(exported: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(exported, tmp_path / "spoilt")
    weights = spoilt / "florence" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="another florence"):
        VLVCaptioner.from_pretrained(spoilt)


def test_the_same_export_again_does_nothing_and_another_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    output = tmp_path / "captioner"
    export(config(output, trained.run))
    before = sorted((p, p.stat().st_mtime_ns) for p in output.rglob("*"))
    assert export(config(output, trained.run)) == "exported already: nothing to do"
    with pytest.raises(RunError, match=r"another run \(precision: float32 there, bfloat16 here"):
        export(config(output, trained.run, "precision=bfloat16"))
    with pytest.raises(RunError, match=r"another run \(weights: \["):
        export(config(output, trained.stage1))
    assert sorted((p, p.stat().st_mtime_ns) for p in output.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="holds no export"):
        export(config(tmp_path / "mine", trained.run))
    with pytest.raises(CheckpointError, match="no trained weights"):
        export(config(tmp_path / "x", trained.models))
    with pytest.raises(ConfigError, match=r"give model\.path .* or --from-reference"):
        export(load(ExportConfig, None, [f"output={tmp_path / 'x'}"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captioner", "mine"]


def test_an_export_that_fails_leaves_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "vlv_model.checkpoints.export.write_checkpoint_files", full
    )  # the last thing that is written
    with pytest.raises(OSError, match="No space left"):
        export(config(tmp_path / "captioner", trained.run))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_halves_it_and_changes_no_caption_of_that_precision(
    trained: Trained, exported: Path, tmp_path: Path
) -> None:
    output = tmp_path / "half"
    export(config(output, trained.run, "precision=bfloat16"))
    whole = cast(VLVCaptioner.from_pretrained(exported), "bfloat16")
    half = cast(VLVCaptioner.from_pretrained(output), "bfloat16")
    assert same_weights(whole, half)
    assert whole.generate(SQUARES, 1, 8) == half.generate(SQUARES, 1, 8)
    sizes = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (output, exported)]
    assert sizes[0] < 0.6 * sizes[1]


def test_an_encoder_of_stage_1_is_exported_with_its_decoder(
    trained: Trained, tmp_path: Path
) -> None:
    output = tmp_path / "encoder"
    export(config(output, trained.stage1))
    assert same_weights(VLVAutoEncoder.from_pretrained(output), trained.autoencoder)
    language_model = str(trained.models / "language_model")
    captioner = VLVCaptioner.from_pretrained(
        output, for_training=True, language_model=language_model
    )
    assert same_weights(captioner.encoder, trained.autoencoder.encoder)
    with pytest.raises(ModelError, match=r"language_model: .*set the model's 'language_model'"):
        VLVCaptioner.from_pretrained(output, for_training=True)
    assert "reconstruct" in (output / "README.md").read_text()


def test_an_export_with_all_parts_can_reconstruct(
    trained: Trained, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="vae: there is no folder"):
        VLVAutoEncoder.from_pretrained(exported)
    by_name = VLVAutoEncoder.from_pretrained(exported, diffusion=str(trained.models / "diffusion"))
    output = tmp_path / "all"
    export(config(output, trained.run, "parts=all"))
    autoencoder = VLVAutoEncoder.from_pretrained(output)
    assert same_weights(autoencoder.encoder, trained.captioner.encoder)
    decoder = trained.autoencoder.diffusion_decoder
    assert same_weights(autoencoder.diffusion_decoder, decoder)
    assert same_weights(by_name.diffusion_decoder, decoder)
    again = tmp_path / "again"
    export(config(again, output, "parts=all"))
    assert same_weights(VLVCaptioner.from_pretrained(again), trained.captioner)
    assert read_checkpoint(again).origin["before"] == read_checkpoint(output).origin


def test_a_published_checkpoint_is_imported(
    trained: Trained,
    tmp_path: Path,
    job: Job,  # noqa: F811
) -> None:
    file = tmp_path / "step_70" / "model.pt"
    file.parent.mkdir()
    torch.save(published_layout.stage2(trained.captioner, lacking_rows=2), file)
    base = f"model.path={trained.models}"
    ended = job("export", tmp_path / "imported", "--from-reference", file, base)
    assert ended.status == 0, ended.err
    assert "image_projection: transposed" in ended.out
    captioner = VLVCaptioner.from_pretrained(tmp_path / "imported")
    assert same_weights(captioner, trained.captioner)
    assert captioner.generate(SQUARES, 1, 8) == trained.captioner.generate(SQUARES, 1, 8)
    report = json.loads((tmp_path / "imported" / "import.json").read_text())
    assert report["parts"]["vision tower"]["different"] == 0
    info = read_checkpoint(tmp_path / "imported")
    assert (info.stage, info.step, info.merged_stages) == ("stage2", 70, ["stage1"])
    assert info.origin["reference"]["files"].keys() == {"model.pt"}
    card = (tmp_path / "imported" / "README.md").read_text()
    assert "published implementation" in card
    assert 'captioner.caption("photo.jpg")' in card
    assert captioner.encoder.square == Square(64, "reference")
    # Its squares are cut as those that it was trained on, wherever it is opened.
    assert info.model.preprocess == "reference"
    usual = info.model.model_copy(update={"preprocess": "default"})
    made = [
        fingerprint_of(caption_identity(m, tmp_path / "imported", GenerateConfig()))
        for m in (info.model, usual)
    ]
    assert made[0] != made[1]
    ended = job("export", tmp_path / "imported", "--from-reference", file, base)
    assert "imported already: nothing to do" in ended.out
    ended = job(
        "export", tmp_path / "imported", "--from-reference", file, base, "model.preprocess=default"
    )
    assert "another run (preprocess: reference there, default here)" in ended.last_line
    ended = job("export", tmp_path / "x", "--from-reference", file, base, "model.num_queries=5")
    assert ended.status == 2
    assert "query_embed [1, 16, 64] for [1, 5, 64]" in ended.last_line
    ended = job("export", tmp_path / "x", "--from-reference", file, f"model.path={trained.run}")
    assert ended.status == 2
    assert "give only base models" in ended.last_line
    assert not (tmp_path / "x").exists()
