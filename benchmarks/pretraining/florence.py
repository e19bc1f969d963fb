"""Pretrains Florence-2's language model on regions and tags of training scenes, never on sentences.

Four tasks, each with its own prompt; the first two are those of the published model:

    <OD>                      circle<loc_1><loc_4><loc_7><loc_10>square<loc_9>…
    <DENSE_REGION_CAPTION>    red<loc_1><loc_4><loc_7><loc_10>blue<loc_9>…gray<loc_0><loc_0>…
    tags of shapes            circle square
    tags of colours           red blue gray

Boxes are x1 y1 x2 y2 in sixteenths of the image. Shapes and colours are separate tasks, so no target
pairs a colour with a shape; sizes and relations are not in any target.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerBase

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from benchmarks.pretraining.vision import features, grid_side
from pipelines.tiny_world import scenes
from pipelines.tiny_world.dataset import drawing_seed
from vlv_model.caption_tokens import IGNORED
from vlv_model.tiny import NUM_LOCATIONS

PROMPTS = {
    "<OD>": "Locate the objects with category name in the image.",
    "<DENSE_REGION_CAPTION>": "Locate the objects in the image, with their descriptions.",
    "shape tags": "Describe the objects in the image.",
    "colour tags": "Describe what is in the background and the objects.",
}
BATCH_SIZE = 32
WHOLE = (0.0, 0.0, scenes.SIDE, scenes.SIDE)


def train_florence(
    model: Florence2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train its BART in place, with a frozen vision tower."""
    language_model, head = model.model.language_model, model.lm_head
    seen = features(model, pictures, image_size)  # [n i m]
    batches = [batch(model, tokenizer, image_size, pictures, task) for task in PROMPTS]
    prompts = [tokens["input_ids"][:1, seen.shape[1] :] for tokens in batches]

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        task = int(torch.randint(len(PROMPTS), (), generator=generator))
        prompt = model.get_input_embeddings()(prompts[task]).expand(BATCH_SIZE, -1, -1)
        inputs = torch.cat([seen[rows], prompt], dim=1)
        return model(inputs_embeds=inputs, labels=batches[task]["labels"][rows]).loss

    models = [language_model, head]
    return fit("Florence-2", models, loss_of, steps=steps, learning_rate=1e-3, seed=seed)


def batch(
    model: Florence2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    pictures: Pictures,
    task: str,
) -> dict[str, Tensor]:
    """`input_ids` (image features, prompt) and `labels` of all images for one task, int64."""
    side = grid_side(model, image_size)
    inputs = [model.config.image_token_id] * (side**2 + 1) + tokenizer(PROMPTS[task]).input_ids
    labels = [tokenizer(annotation(pictures, i, task)).input_ids for i in range(pictures.count)]
    longest = max(map(len, labels))
    return {
        "input_ids": torch.tensor([inputs]).expand(pictures.count, -1),
        "labels": torch.tensor([ids + [IGNORED] * (longest - len(ids)) for ids in labels]),
    }


def annotation(pictures: Pictures, index: int, task: str) -> str:
    """The target of a task for an image: its regions, beginning with the one nearest the top left."""
    scene = pictures.scenes[index]
    things = (scene.first, scene.second)
    if task in ("<OD>", "shape tags"):
        labels = [thing.shape for thing in things]
    else:
        labels = [*(thing.colour for thing in things), scene.background]
    if task.endswith("tags"):
        return " ".join(labels)
    seed = drawing_seed(pictures.seed, pictures.split, index)
    boxes = [(x - r, y - r, x + r, y + r) for x, y, r in scenes.object_positions(scene, seed)]
    regions = zip(labels, [*boxes, WHOLE], strict=False)  # the background's box is the last
    return "".join(f"{label}{_box(box)}" for label, box in regions)


def _box(box: tuple[float, ...]) -> str:
    bins = (min(int(v * NUM_LOCATIONS / scenes.SIDE), NUM_LOCATIONS - 1) for v in box)
    return "".join(f"<loc_{i}>" for i in bins)
