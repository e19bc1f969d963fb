"""Run the whole pipeline on one machine without a GPU, from URLs to captions and a report.

Draws simple scenes (or takes photos=FOLDER) and serves them, with some broken URLs, from a local web
server. Then runs ingest, stage 1, stage 2, recaption and reconstruct with the settings in
jobs/configs/tiny. Repeat the command to continue an interrupted demo.

    python jobs/demo.py
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
