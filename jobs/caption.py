"""Caption one image file with a trained captioner and print the caption. Does not start Ray.

FOLDER is a stage-2 run, one of its checkpoints, or an exported captioner.

    python jobs/caption.py IMAGE --model FOLDER
"""

import sys

from pipelines.cli.main import main
from pipelines.recaption.config import CaptionConfig
from pipelines.recaption.single import caption_file


def run(config: CaptionConfig) -> None:
    print(caption_file(config))


if __name__ == "__main__":
    sys.exit(main(CaptionConfig, run, __doc__, aliases={"": "image", "--model": "model.path"}))
