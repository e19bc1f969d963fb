"""Status: how a table or a training stands, while it is written or afterwards. Reads, and changes nothing.

Any output will do: images, latents, pairs, captions, pictures, the run folder of a training.

    python jobs/status.py /data/images
    python jobs/status.py /data/stage1
"""

import sys

from pipelines.admin.status import StatusConfig, status_text
from pipelines.cli.main import main


def run(config: StatusConfig) -> None:
    print(status_text(config))


if __name__ == "__main__":
    sys.exit(main(StatusConfig, run, __doc__, aliases={"": "table"}))
