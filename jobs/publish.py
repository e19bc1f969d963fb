"""Give a table away: as WebDataset shards, or on the Hugging Face hub.

Input: a table that a job has finished, such as the captions of recaption.
Output: a folder of .tar shards with each image, its caption and its row; or a data set on the hub with
the table and its card, private unless private=false.
Repeat the command to continue an interrupted run.

    python jobs/publish.py /data/captions output=/data/shards images=/data/images
    python jobs/publish.py /data/captions repo=me/captions
"""

import sys

from pipelines.cli.main import main
from pipelines.publish.config import PublishConfig


def run(config: PublishConfig) -> None:
    if config.repo:
        from pipelines.publish.hub import push  # the hub's library would delay --help

        print(f"pushed: {push(config.table, config.repo, config.private)}")
    elif config.output:
        from pipelines.publish.shards import summary, write_shards

        counts = write_shards(config.table, config.output, config.images, config.rows_per_shard)
        print(summary(counts, config.output))


if __name__ == "__main__":
    sys.exit(main(PublishConfig, run, __doc__, aliases={"": "table"}))
