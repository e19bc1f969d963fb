"""Demo: the whole path on one machine without a GPU, from URLs to captions and a report.

Draws the tiny world's scenes (or takes photos=FOLDER), serves them with some broken URLs from a
local web server, and runs ingest, stage 1, stage 2, recaption and reconstruct on them as the jobs
of those names do, with the settings of jobs/configs/tiny. The same command continues a demo that
was killed.
"""

import sys
from pathlib import Path

from pipelines.cli.main import main
from pipelines.demo.config import DemoConfig
from pipelines.demo.job import run_demo


def run(config: DemoConfig) -> None:
    run_demo(config, Path(__file__).parent / "configs" / "tiny")


if __name__ == "__main__":
    sys.exit(main(DemoConfig, run, __doc__))
