"""The tiny world's trained weights, written by `benchmarks/pretraining` and stage 1.

models/   base models (float16 on disk); pretraining.json has the settings and metrics of their training
stage1/   a stage-1 checkpoint on these models, from which the demo starts
stage2/   a stage-2 checkpoint on stage1/: a captioner of drawn scenes

`model.path=tiny/models`, `tiny/stage1` and `tiny/stage2` name them (pipelines.execution.model).
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = "models"
STAGE1 = "stage1"
STAGE2 = "stage2"
