"""Settings of an evaluation."""

from __future__ import annotations

from pydantic import Field

from pipelines.cli.config import InputPathOrUrl, OutputPath
from vlv_model.config import Config, Precision


class EvaluateData(Config):
    """What captions and pictures are held against."""

    originals: InputPathOrUrl | None = Field(
        None,
        description="feature table of the images that captions or pictures were made of, or a folder "
        "of such tables, one per extractor",
    )
    references: InputPathOrUrl | None = Field(
        None,
        description="Parquet with key and caption: references of BLEU and CIDEr-D, several rows a key "
        "where an image has several",
    )
    images: InputPathOrUrl | None = Field(
        None,
        description="Parquet with key and image, shown in the gallery; default: the images that the "
        "caption table was made of, where they lie in Parquet",
    )


class ClipConfig(Config):
    """The CLIP that scores captions sentence by sentence."""

    weights: str | None = Field(
        None,
        description="folder or hub id of the CLIP that embedded data.originals; with it each sentence "
        "of a caption is scored by itself, in this process; none: not scored",
    )
    precision: Precision = Field("float32", description="compute precision")
    batch_size: int = Field(64, ge=1, description="sentences embedded at once")


class MeasureConfig(Config):
    """How figures and their intervals are computed."""

    seed: int = Field(0, ge=0, description="of subsamples, subsets and bootstraps")
    sample_rows: int = Field(
        30_000,
        ge=2,
        description="rows of a table held in memory, those of the least hashes of their keys: the "
        "population of subsamples, KID and CMMD; FID reads all rows",
    )
    subsamples: int = Field(10, ge=2, description="subsamples whose FID shows its spread")
    subsample_rows: int | None = Field(
        None,
        ge=2,
        description="rows of each; none: half of the smaller table, at most 2,000. FID of few rows is "
        "larger than that of many, so it compares with FID at the same number only",
    )
    kid_subsets: int = Field(100, ge=1, description="subsets of KID")
    kid_subset_rows: int = Field(
        1000, ge=2, description="rows of each; at most half of the smaller table"
    )
    resamples: int = Field(2000, ge=100, description="resamples of a bootstrap")


class AskConfig(Config):
    """Questions that a language model answers from captions (VQAv2, OK-VQA, yes/no sets)."""

    questions: InputPathOrUrl | None = Field(
        None, description="file of questions as VQAv2 and OK-VQA publish it; none: nothing is asked"
    )
    annotations: InputPathOrUrl | None = Field(None, description="file of their answers")
    shot_questions: InputPathOrUrl | None = Field(
        None, description="questions of the train split, from which shots are drawn"
    )
    shot_annotations: InputPathOrUrl | None = Field(None, description="their answers")
    shots: tuple[int, ...] = Field(
        (0,), description="shots of a request, each number a figure: 0,4,32"
    )
    endpoint: str = Field(
        "http://127.0.0.1:8000/v1", description="an OpenAI-compatible server (vLLM, …), up to /v1"
    )
    model: str = Field("", description="the reader, by the server's name of it")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable with the key, if any"
    )
    limit: int | None = Field(
        None, ge=1, description="seeded sample of so many questions; none: all"
    )
    concurrency: int = Field(16, ge=1, description="requests at once")
    timeout_seconds: float = Field(120, gt=0, description="of a request")
    retries: int = Field(5, ge=0, description="after 429, an error, a timeout, or a broken reply")
    pause_seconds: float = Field(1, ge=0, description="before the first retry; doubles with each")
    max_requests: int | None = Field(
        None, ge=1, description="requests of this run, retries included; answers that came are kept"
    )
    max_failed: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of requests that may stay without an answer, as wrong ones",
    )
    max_tokens: int = Field(16, ge=1, description="longest answer")


class EvaluateConfig(Config):
    """All settings of `jobs/evaluate.py`."""

    input: tuple[InputPathOrUrl, ...] = Field(
        min_length=1,
        description="what is evaluated: for each captioner or model a caption table, a feature table, "
        "or a folder of such tables",
    )
    output: OutputPath = Field(description="folder of report.html, report.json and scores.parquet")
    data: EvaluateData = EvaluateData()
    clip: ClipConfig = ClipConfig()
    ask: AskConfig = AskConfig()
    measure: MeasureConfig = MeasureConfig()
    gallery: int = Field(6, ge=0, description="images shown at each end of a comparison")
    dry_run: bool = Field(False, description="only list the figures, rows and memory")
