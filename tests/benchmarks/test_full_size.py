"""The full-size run at its smallest, and what is particular to the full size: ids, refusals."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import tokenizers
from benchmarks.full_size.__main__ import main, shortage
from benchmarks.full_size.folders import LANGUAGE_MODEL
from benchmarks.full_size.measuring import JobFailedError, run
from benchmarks.full_size.parts import PARTS, Work
from benchmarks.full_size.predicting import Predicted
from vlv_model.checkpoints.published import QWEN_25


@pytest.mark.faults
def test_parts_run_to_their_end_and_a_killed_training_continues(tmp_path, capsys):
    folder = tmp_path / "work"
    parts = ["stage1", "recaption", "export"]
    assert main(["--size", "tiny", "--folder", str(folder), *parts]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert list(figures) == parts
    assert all(part["peak_gb"] >= part["largest_gb"] > 0 for part in figures.values())
    assert all(part["predicted_gb"] > 0 for part in figures.values())
    # Beside the weights: a JSON file in the checkpoint; configurations and tokenizers in the export.
    for name, beside in (("stage1", 0.001), ("export", 0.003)):
        part = figures[name]
        assert 0 <= part["disk_gb"] - part["predicted_disk_gb"] <= beside, name
    assert not folder.exists()  # without --keep


def test_tokenizers_have_the_published_sizes_and_special_ids():
    florence, clip = tokenizers.florence_tokenizer(), tokenizers.clip_tokenizer()
    assert (len(florence), florence.bos_token_id, florence.mask_token_id) == (51_289, 0, 50_264)
    assert (florence.pad_token_id, florence.eos_token_id) == (1, 2)
    prompt = florence("Describe with a paragraph what is shown in the image.").input_ids
    assert len(prompt) == 13
    assert (len(clip), clip.bos_token_id, clip.eos_token_id) == (49_408, 49_406, 49_407)
    assert clip.pad_token_id == 0
    assert clip("a red circle").input_ids[0] == 49_406


@pytest.mark.faults  # a vocabulary of 150,000 words
def test_the_caption_tokenizer_ends_texts_with_the_models_id():
    qwen = tokenizers.qwen_tokenizer()
    end = QWEN_25[LANGUAGE_MODEL]["eos_token_id"]
    assert (len(qwen), qwen.eos_token_id, qwen.pad_token_id) == (151_665, end, end)
    assert len(qwen("a large red circle").input_ids) == 4
    assert qwen.decode([151_000]) == " word151000"  # any id that a random model writes has a text


def test_a_machine_that_is_too_small_is_told_what_fits(tmp_path):
    work = Work(tmp_path, "tiny")
    line = shortage(work, {"stage1": [Predicted(1e6)], "export": [Predicted(-3.0)]})
    assert line.startswith("stage1 needs")
    assert line.endswith("give the parts that fit (export)")
    assert "of disk" in shortage(work, {"export": [Predicted(-3.0, disk_gb=1e9)]})
    assert shortage(work, {"export": [Predicted(-3.0)]}) is None


def test_jobs_differ_in_their_output_and_open_the_model_they_need(tmp_path):
    work = Work(tmp_path, "full")
    jobs = [job for name, jobs in PARTS.items() for job in jobs(work, name)]
    assert len({job.output for job in jobs}) == len(jobs)
    opened = {job.script: job.model.name for job in jobs}
    assert opened == {
        "stage1": "models",
        "precompute": "models",
        "stage2": "encoder",
        "recaption": "captioner",
        "reconstruct": "encoder",
        "export": "captioner",
    }


def test_a_command_is_measured_killed_and_its_failure_reported(tmp_path):
    def python(program: str) -> list[str]:
        return [sys.executable, "-c", program]

    flag = tmp_path / "flag"
    waits = f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(60)"
    assert run(python(waits), tmp_path, 30, kill_when=flag.exists).seconds < 30
    allocates = "import time; held = bytearray(200_000_000); time.sleep(1)"
    assert 0.2 <= run(python(allocates), tmp_path, 30).peak_gb < 0.4
    with pytest.raises(JobFailedError, match=r"status 3 after(.|\n)*the cause"):
        run(python("print('the cause'); raise SystemExit(3)"), tmp_path, 30)
    with pytest.raises(JobFailedError, match="ended before"):
        run(python("pass"), tmp_path, 30, kill_when=lambda: False)
    with pytest.raises(JobFailedError, match="took over"):
        run(python("import time; time.sleep(60)"), tmp_path, 0.2)


def test_a_folder_with_other_files_is_refused_and_kept(capsys, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path), "export"])
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_an_unknown_part_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path / "work"), "stage3"])
    assert "unknown part 'stage3'" in capsys.readouterr().err
    assert not Path(tmp_path / "work").exists()
