"""From an image to the pixels that each frozen part expects.

One square feeds both: scaled to [-1, 1] it enters the VAE; resized and normalised with ImageNet's
statistics it enters Florence-2's vision tower. Squares travel as uint8 `[b 3 h w]`, and the rest
happens on the device of the batch, so that no training step goes through the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlv_model.config import Preprocess
from vlv_model.errors import ModelError
from vlv_model.squares import Square

# ImageNet statistics, as in Florence-2's published preprocessor configuration. (transformers'
# CLIP image processor, which that configuration names, would fall back on CLIP's own statistics.)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def square_image(image: Image.Image, image_size: int, preprocess: Preprocess = "default") -> Tensor:
    """Resize the shorter side to `image_size` and crop the centre square (`Square.cut`).

    Returns uint8 `[3 image_size image_size]`. An image that is not RGB is converted; flattening
    transparency and applying EXIF orientation are the decoder's business, before this, and nobody's
    where `preprocess` is reference.
    """
    return torch.from_numpy(Square(image_size, preprocess).cut(image))


def check_squares(pixel_values: Tensor) -> None:
    """Raise ModelError unless `pixel_values` is a batch of square uint8 images `[b 3 s s]`."""
    shape = list(pixel_values.shape)
    if (
        pixel_values.dtype != torch.uint8
        or len(shape) != 4
        or shape[1] != 3
        or shape[2] != shape[3]
    ):
        raise ModelError(
            f"pixel_values are {pixel_values.dtype} {shape}, expected uint8 [b 3 s s]: "
            "make squares with vlv_model.preprocessing.square_image"
        )


def vae_pixels(pixel_values: Tensor) -> Tensor:
    """uint8 `[b 3 s s]` -> float32 `[b 3 s s]` in [-1, 1], what the VAE was trained on."""
    check_squares(pixel_values)
    # In place: new memory costs more than the sums.
    return pixel_values.float().div_(127.5).sub_(1.0)


def pixels_from_vae(images: Tensor) -> Tensor:
    """float `[b 3 s s]` in [-1, 1] (clamped) -> uint8 `[b 3 s s]`; the inverse of `vae_pixels`."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def resize_bicubic(pixel_values: Tensor, size: int) -> Tensor:
    """uint8 `[b 3 s s]` -> uint8 `[b 3 size size]`, as Pillow's bicubic filter would.

    torch's antialiased bicubic is the same filter (a = -0.5, support scaled when shrinking). Like
    Pillow we go width first and back to 8 bits between the passes: in one pass, values that
    overshoot are clamped once only, and sharp edges come out up to 17 levels of 255 off. What
    remains, from Pillow's fixed-point weights, is 1 level in fewer than 1 of 1,000 values of a
    photograph-sized image, and never more than 2 (tested).

    On the CPU torch has that filter on bytes, in Pillow's fixed-point arithmetic and much faster.
    Enlarging, the two agree; shrinking, it rounds its weights more, and we do not take it.
    """
    side = pixel_values.shape[-1]
    if side == size:
        return pixel_values
    if pixel_values.device.type == "cpu" and size > side:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # the faster way
        enlarged = F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
        return enlarged.contiguous()
    for shape in ((side, size), (size, size)):
        resized = F.interpolate(
            pixel_values.float(), size=shape, mode="bicubic", antialias=True, align_corners=False
        )
        pixel_values = (resized + 0.5).floor().clamp(0, 255).to(torch.uint8)  # halves go up
    return pixel_values


def encoder_pixels(pixel_values: Tensor, encoder_image_size: int) -> Tensor:
    """uint8 `[b 3 s s]` -> float32 `[b 3 e e]`, e = `encoder_image_size`, ImageNet-normalised."""
    check_squares(pixel_values)
    # In place, as in vae_pixels: on a CPU a third of the time.
    pixels = resize_bicubic(pixel_values, encoder_image_size).float().div_(255.0)
    mean = pixels.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = pixels.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return pixels.sub_(mean).div_(std)
