"""Show the progress of a table or training run, active or finished. Read-only.

Takes any job's output: images, latents, captions, pictures, or a training's run folder.

    python jobs/status.py /data/images
    python jobs/status.py /data/stage1
"""

import sys

from pipelines.admin.status import StatusConfig, status_text
from pipelines.cli.main import main


def run(config: StatusConfig) -> None:
    print(status_text(config))


if __name__ == "__main__":
    sys.exit(main(StatusConfig, run, __doc__, aliases={"": "table"}, continues=False))
