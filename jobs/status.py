"""Status: how a table stands, while a job writes it or afterwards. Reads, and changes nothing.

Any table will do: images, latents, pairs, captions, pictures.

    python jobs/status.py /data/images
"""

import sys

from pipelines.admin.status import StatusConfig, status_text
from pipelines.cli.main import main


def run(config: StatusConfig) -> None:
    print(status_text(config))


if __name__ == "__main__":
    sys.exit(main(StatusConfig, run, __doc__, aliases={"": "table"}))
