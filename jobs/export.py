"""Export: a trained model as one folder that needs nothing else, to keep, move or publish.

Needs, as model.path, a run or checkpoint of either stage; or, as --from-reference, a checkpoint of
the method's published implementation, which is imported upon the base models of model.*. Leaves
a folder with weights, base models, tokenizers and a model card, which every job takes as model.path
and from_pretrained opens.

    python jobs/export.py /data/captioner model.path=/data/stage2
    python jobs/export.py /data/captioner --from-reference model.pt
"""

import sys

from pipelines.cli.main import main
from pipelines.export.config import ExportConfig
from pipelines.export.job import export


def run(config: ExportConfig) -> None:
    print(export(config))
    print(f"model: {config.output}")


if __name__ == "__main__":
    aliases = {"": "output", "--from-reference": "from_reference"}
    sys.exit(main(ExportConfig, run, __doc__, aliases=aliases))
