"""The tiny world's trained weights, as `jobs/pretrain_tiny.py` and stage 1 wrote them.

models/   base models (float16 on disk): what the method takes as given and keeps frozen, and what
          it starts from; pretraining.json tells how they were trained and what they reached
stage1/   a checkpoint of stage 1 upon them, which the demo starts from
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = "models"
STAGE1 = "stage1"
