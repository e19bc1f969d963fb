"""Export a trained model as one self-contained folder, to keep, move or publish.

Input: model.path, a run or checkpoint of either stage; or --from-reference, a checkpoint of the
method's published implementation, imported with the base models in model.*.
Output: a folder with weights, base models, tokenizers and a model card. Every job accepts it as
model.path, and from_pretrained loads it.

    python jobs/export.py /data/captioner model.path=/data/stage2
    python jobs/export.py /data/captioner --from-reference model.pt
"""

import sys

from pipelines.cli.main import main
from pipelines.export.config import ExportConfig
from pipelines.export.job import export


def run(config: ExportConfig) -> None:
    if config.dry_run:
        from pipelines.export.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    print(export(config))
    print(f"model: {config.output}")


if __name__ == "__main__":
    aliases = {"": "output", "--from-reference": "from_reference"}
    sys.exit(main(ExportConfig, run, __doc__, aliases=aliases))
