"""Measure captions and pictures, and compare two captioners or models.

    python jobs/evaluate.py /data/vlv /data/florence data.originals=/data/originals output=/data/report

Each of the first words is a caption table, a feature table of jobs/embed.py, or a folder of such tables.
Writes report.html, report.json and scores.parquet into the output folder. Needs no GPU and no Ray.
"""

import sys

from pipelines.cli.main import main
from pipelines.evaluate.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    from pipelines.evaluate.job import evaluate

    print(evaluate(config))


if __name__ == "__main__":
    sys.exit(main(EvaluateConfig, run, __doc__, aliases={"": "input"}))
