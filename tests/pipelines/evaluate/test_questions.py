"""Questions to a reader that answers slowly, wrongly, with 429 and with half a JSON."""

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.cli.config import load
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.job import evaluate
from pipelines.evaluate.questions.vqa import (
    exact_match,
    image_number,
    normalised_answer,
    soft_accuracy,
)
from pipelines.images.rows import CAPTION_ROW
from pipelines.storage.tables import Table
from vlv_model.errors import ConfigError, RunError

N = 24


class Reader:
    """Answers with the colour in the context, or grey; the first tries of a request may fail."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.seen: list[dict] = []
        self.faults = True
        reader = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reader.seen.append(body)
                text = body["messages"][0]["content"]
                reader.tries[text] += 1
                fault = sum(text.encode()) % 5 if reader.faults and reader.tries[text] == 1 else 9
                last = text.split("\n\n")[-1]
                colour = next(
                    (c for c in ("red", "blue") if c in last.split("Question:")[0]), "Grey"
                )
                content = "" if "of no answer" in last else f" {colour}.\nBecause it is."
                reply = json.dumps({"choices": [{"message": {"content": content}}]})
                if fault == 0:
                    return self.say(429, "{}", {"Retry-After": "0"})
                if fault == 1:
                    reply = reply[: len(reply) // 2]
                if fault == 2:
                    time.sleep(1.0)
                if fault == 3:
                    reply = '{"error": "wrong"}'
                self.say(500 if fault == 4 else 200, reply, {})

            def say(self, status: int, text: str, headers: dict[str, str]) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Captions that name the colour, captions that do so half of the time, and questions."""
    for name, every in (("knows", 1), ("half", 2)):
        table = Table(tmp_path / name)
        table.create("caption", {}, 1)
        rows = [
            {
                "key": i,
                "name": f"COCO_val2014_{i:012d}.jpg",
                "status": "ok",
                "caption": f"Image {i}: a {('red', 'blue')[i % 2] if i % every == 0 else 'dim'} dog",
            }
            for i in range(N)
        ]
        table.write(0, pa.Table.from_pylist(rows, schema=CAPTION_ROW))
        table.publish({})
    for split, images in (("val", range(N - 4)), ("train", range(N - 4, N))):
        questions = [
            {"question_id": 10 * i, "image_id": i, "question": f"Which colour has dog {i}?"}
            for i in images
        ]
        answers = [
            {"question_id": 10 * i, "answers": [{"answer": ("red", "blue")[i % 2]}] * 10}
            for i in images
        ]
        (tmp_path / f"{split}_q.json").write_text(json.dumps({"questions": questions}))
        (tmp_path / f"{split}_a.json").write_text(json.dumps({"annotations": answers}))
    return tmp_path


def config(files: Path, reader: Reader, *settings: str) -> EvaluateConfig:
    given = {"input": [str(files / "half"), str(files / "knows")]}
    asked = [f"ask.questions={files / 'val_q.json'}", f"ask.annotations={files / 'val_a.json'}"]
    shots = [
        f"ask.shot_questions={files / 'train_q.json'}",
        f"ask.shot_annotations={files / 'train_a.json'}",
    ]
    how = [f"output={files / 'report'}", f"ask.endpoint={reader.endpoint}", "ask.model=m", "ask.pause_seconds=0.01",
           "ask.timeout_seconds=30", "ask.shots=0,2", "measure.resamples=100"]  # fmt: skip
    return load(EvaluateConfig, None, [*asked, *shots, *how, *settings], given)


def test_a_hostile_reader_is_asked_until_it_answers(files: Path, reader: Reader) -> None:
    said = evaluate(config(files, reader, "ask.timeout_seconds=0.5"))
    report = json.loads((files / "report/report.json").read_text())
    values = {(f["subject"], f["measure"]): f["value"] for f in report["figures"]}
    for shots in (0, 2):
        for score in ("exact match", "VQA accuracy"):
            measure = f"{score}, {shots} shots"
            assert values["knows", measure] == 1
            assert values["half", measure] == 0.5
            assert values["no caption", measure] == 0
    assert "exact match, 0 shots: knows is better: 75 % of 20 pairs" in said
    # Equal captions make equal requests, which are sent once: ten of those without shots.
    assert len(reader.tries) == 20 * 3 * 2 - 10
    assert max(reader.tries.values()) > 1
    assert all("Image context" not in text or "dog" in text for text in reader.tries)
    assert evaluate(config(files, reader, "ask.concurrency=1")).startswith("evaluated already")


def test_a_rerun_asks_only_what_is_missing(files: Path, reader: Reader) -> None:
    reader.faults = False
    with pytest.raises(RunError, match=r"the budget ask.max_requests=50"):
        evaluate(config(files, reader, "ask.max_requests=50"))
    log = files / "report/answers.jsonl"
    log.write_text(log.read_text()[:-20])  # as a kill in the middle of a line
    assert len(reader.seen) == 50
    evaluate(config(files, reader))
    assert len(reader.seen) == 110 + 1  # the one whose line was cut
    assert {body["temperature"] for body in reader.seen} == {0}


def test_an_answer_that_does_not_come_is_a_row_with_a_status(files: Path, reader: Reader) -> None:
    reader.faults = False
    questions = json.loads((files / "val_q.json").read_text())
    questions["questions"][0]["question"] = "A question of no answer?"
    (files / "val_q.json").write_text(json.dumps(questions))
    evaluate(config(files, reader, "ask.shots=0", "ask.retries=1"))
    report = json.loads((files / "report/report.json").read_text())
    figure = next(f for f in report["figures"] if f["measure"] == "exact match, 0 shots"
                  and f["subject"] == "knows")  # fmt: skip
    assert figure["value"] == 0.95
    assert figure["made"]["failed"] == {"reader:empty": 1}


def test_a_server_that_is_down_is_no_reader_that_knows_nothing(files: Path, reader: Reader) -> None:
    reader.server.shutdown()
    reader.server.server_close()
    settings = config(files, reader, "ask.shots=0", "ask.retries=0")
    with pytest.raises(RunError, match=r"50 of 50 requests have no answer, .* reader:connection"):
        evaluate(settings)
    assert not (files / "report/report.json").exists()


def test_bad_settings_of_a_reader_are_one_line(files: Path, reader: Reader) -> None:
    with pytest.raises(ConfigError, match=r"needs ask.shot_questions"):
        evaluate(config(files, reader, "ask.shot_questions=none"))
    with pytest.raises(ConfigError, match=r"expected http:// or https://"):
        evaluate(config(files, reader, "ask.endpoint=localhost"))


def test_scores_of_answers() -> None:
    # VQA's own: an answer of 1, 2, 3 and 10 of ten annotators has 0.3, 0.6, 0.9 and 1.
    for equal, score in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["Two dogs!"] * equal + ["cat"] * (10 - equal)
        assert soft_accuracy("the 2 dogs", answers) == pytest.approx(score)
        assert exact_match("the 2 dogs", answers) == float(equal > 0)
    assert normalised_answer("It's 1,000.5 p.m., T-shirt") == "its 1000.5 pm t shirt"
    assert image_number("a/COCO_val2014_000000000042.jpg") == 42
    assert image_number("https://x.org/7/cat.jpg") is None
