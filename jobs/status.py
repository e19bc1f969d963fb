"""Show the progress of an output, active or finished, and where its report is. Read-only.

Takes any job's output: a table, a training's run folder, an exported model, or a folder of outputs.

    python jobs/status.py /data/images
    python jobs/status.py /data
"""

import sys

from pipelines.admin.status import StatusConfig, status_text
from pipelines.cli.main import main


def run(config: StatusConfig) -> None:
    print(status_text(config))


if __name__ == "__main__":
    sys.exit(main(StatusConfig, run, __doc__, aliases={"": "table"}, continues=False))
