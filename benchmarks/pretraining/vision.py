"""Pretrains Florence-2's vision tower to classify the patches of an image.

The annotations are the box, shape, colour and size of each object, and the background's colour. Four
linear heads, discarded afterwards, predict them from the image features: per patch those of the object
whose box contains its centre, or none; from the spatial mean the background's colour. A tower of this size
learns from dense annotations in minutes what it does not learn from sequences in hours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Florence2ForConditionalGeneration

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from pipelines.tiny_world import scenes
from pipelines.tiny_world.dataset import drawing_seed
from vlv_model.preprocessing import encoder_pixels

BATCH_SIZE = 32
OBJECT_WEIGHT = 4.0  # of a patch of an object; most patches are background
KINDS = (scenes.SHAPES, tuple(scenes.COLOURS), scenes.SIZES)


def train_vision(
    model: Florence2ForConditionalGeneration,
    image_size: int,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train the tower and its projector in place, on images of side `image_size`."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    width = model.config.text_config.d_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList([nn.Linear(width, 1 + len(words)) for words in KINDS])
        background_head = nn.Linear(width, len(scenes.BACKGROUNDS))
    patches = patch_labels(pictures, grid_side(model, image_size))
    backgrounds = background_labels(pictures)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        pixels = encoder_pixels(pictures.squares[rows], image_size)
        found = model.get_image_features(pixels).pooler_output  # [b 1+p m]
        loss = F.cross_entropy(background_head(found[:, 0]), backgrounds[rows])
        labels = patches[rows]
        weight = torch.where(labels[..., 0] > 0, OBJECT_WEIGHT, 1.0)
        for kind, head in enumerate(heads):
            scores = head(found[:, 1:]).transpose(1, 2)  # [b classes p]
            error = F.cross_entropy(scores, labels[..., kind], reduction="none")
            loss = loss + (error * weight).sum() / weight.sum()
        return loss

    models = [tower, projector, heads, background_head]
    return fit("vision tower", models, loss_of, steps=steps, learning_rate=2e-3, seed=seed)


@torch.no_grad()
def features(
    model: Florence2ForConditionalGeneration, pictures: Pictures, image_size: int
) -> Tensor:
    """Image features of all images, `[n 1+p m]`."""
    parts = pictures.squares.split(256)
    return torch.cat(
        [model.get_image_features(encoder_pixels(part, image_size)).pooler_output for part in parts]
    )


def grid_side(model: Florence2ForConditionalGeneration, image_size: int) -> int:
    """Number of patches per side of the tower's output, for images of side `image_size`."""
    return image_size // math.prod(model.config.vision_config.patch_stride)


def patch_labels(pictures: Pictures, side: int) -> Tensor:
    """Shape, colour and size of each patch in row order, int64 `[n side*side 3]`; 0: background."""
    centres = (torch.arange(side) + 0.5) * scenes.SIDE / side
    labels = torch.zeros(pictures.count, side, side, len(KINDS), dtype=torch.int64)
    for i, scene in enumerate(pictures.scenes):
        seed = drawing_seed(pictures.seed, pictures.split, i)
        things = (scene.first, scene.second)
        for thing, (x, y, r) in zip(things, scenes.object_positions(scene, seed), strict=True):
            inside = ((centres - y).abs() < r)[:, None] & ((centres - x).abs() < r)[None]
            words = (thing.shape, thing.colour, thing.size)
            named = [1 + kinds.index(word) for kinds, word in zip(KINDS, words, strict=True)]
            labels[i][inside] = torch.tensor(named)
    return labels.flatten(1, 2)


def background_labels(pictures: Pictures) -> Tensor:
    """Index of each image's background, int64 `[n]`."""
    names = list(scenes.BACKGROUNDS)
    return torch.tensor([names.index(scene.background) for scene in pictures.scenes])
