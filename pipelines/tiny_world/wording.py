"""What a web page might say of a scene: the caption in other orders, with things left unsaid.

Text-to-image models are trained on such text. Only the parts that the tiny world takes as given
read it: the diffusion model and the language model. The pipeline's own teacher says one canonical
caption (`scenes.caption`).
"""

from __future__ import annotations

import numpy as np

from pipelines.tiny_world.scenes import Object, Scene, caption

CANONICAL = 0.4  # share of texts that are the canonical caption
UNSAID = 0.25  # share of words and phrases that one of the others leaves out
INVERSE = {"left of": "right of", "above": "below"}


def web_text(scene: Scene, rng: np.random.Generator) -> str:
    """A true text about the scene, of at most as many words as the longest caption."""
    if rng.random() < CANONICAL:
        return caption(scene)
    first, second = (_object(thing, rng) for thing in (scene.first, scene.second))
    match rng.choice(4, p=[0.4, 0.3, 0.2, 0.1]):
        case 0:
            text = f"a {first} {scene.relation} a {second}"
        case 1:
            text = f"a {second} {INVERSE[scene.relation]} a {first}"
        case 2:
            one, other = rng.permutation([first, second])
            text = f"a {one} and a {other}"
        case _:
            text = f"a {rng.choice([first, second])}"
    if rng.random() < UNSAID:
        return text
    background = f"on a {scene.background} background"
    return f"{background} {text}" if rng.random() < 0.3 else f"{text} {background}"


def _object(thing: Object, rng: np.random.Generator) -> str:
    said = rng.random(3) >= UNSAID
    words = (thing.size, thing.colour, thing.shape if said[2] else "object")
    return " ".join(word for word, is_said in zip(words, [*said[:2], True], strict=True) if is_said)
