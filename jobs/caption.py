"""Caption: prints the trained captioner's caption of one image file.

    python jobs/caption.py IMAGE --model FOLDER

FOLDER is a stage-2 run, one of its checkpoints, or an exported captioner. Runs without Ray.
"""

import sys

from pipelines.cli.main import main
from pipelines.recaption.config import CaptionConfig
from pipelines.recaption.single import caption_file


def run(config: CaptionConfig) -> None:
    print(caption_file(config))


if __name__ == "__main__":
    sys.exit(main(CaptionConfig, run, __doc__, aliases={"": "image", "--model": "model.path"}))
