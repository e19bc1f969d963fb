"""Caption image files with a trained captioner and print the captions. Does not start Ray.

FOLDER is a stage-2 run, one of its checkpoints, or an exported captioner. An image without a caption is a
line on standard error; the others are captioned, and the exit status is 2 at the end.

    python jobs/caption.py photo.jpg model.path=FOLDER
    python jobs/caption.py photos/ more/*.png model.path=FOLDER > captions.tsv
    python jobs/caption.py photos/ model.path=FOLDER --format json > captions.json
"""

import sys

from pipelines.cli.main import main
from pipelines.recaption.caption_files import caption_files
from pipelines.recaption.config import CaptionConfig

if __name__ == "__main__":
    aliases = {"": "image", "--format": "format"}
    sys.exit(main(CaptionConfig, caption_files, __doc__, aliases, continues=False))
