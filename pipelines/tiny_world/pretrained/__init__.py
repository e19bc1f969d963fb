"""The tiny world's trained weights, written by `benchmarks/pretraining` and stage 1.

models/   base models (float16 on disk); pretraining.json has the settings and metrics of their training
stage1/   a stage-1 checkpoint on these models, from which the demo starts
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = "models"
STAGE1 = "stage1"
