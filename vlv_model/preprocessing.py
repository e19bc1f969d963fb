"""From an image to the pixels of the VAE and of the vision tower.

Both get the same square: scaled to [-1, 1] for the VAE; resized and normalised with ImageNet's
statistics for Florence-2's vision tower. Batches hold uint8 squares `[b 3 s s]`; the rest runs on
the batch's device, so no training step goes through the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlv_model.config import Preprocess
from vlv_model.errors import ModelError
from vlv_model.squares import Square

# From Florence-2's published preprocessor configuration. (transformers' CLIP image processor, which
# that configuration names, defaults to CLIP's statistics.)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def square_image(image: Image.Image, image_size: int, preprocess: Preprocess = "default") -> Tensor:
    """Resize the shorter side to `image_size` and crop the centre square (`Square.cut`).

    Returns uint8 `[3 image_size image_size]`. An image that is not RGB is converted. The image
    decoder has already applied EXIF orientation and flattened alpha, unless `preprocess` is
    reference.
    """
    return torch.from_numpy(Square(image_size, preprocess).cut(image))


def check_squares(pixel_values: Tensor, size: int | None = None) -> None:
    """Raise ModelError unless `pixel_values` is a batch of square uint8 images `[b 3 s s]`, s = `size`.

    A square of another size than the model was trained with has other detail, and other captions.
    """
    shape = list(pixel_values.shape)
    side = size or shape[-1]
    if pixel_values.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != [3, side, side]:
        raise ModelError(
            f"pixel_values are {pixel_values.dtype} {shape}, expected uint8 [b 3 {size or 's'} "
            f"{size or 's'}]: make squares with vlv_model.preprocessing.square_image"
        )


def vae_pixels(pixel_values: Tensor) -> Tensor:
    """uint8 `[b 3 s s]` -> float32 `[b 3 s s]` in [-1, 1], what the VAE was trained on."""
    check_squares(pixel_values)
    # In place: allocating memory costs more than the arithmetic.
    return pixel_values.float().div_(127.5).sub_(1.0)


def pixels_from_vae(images: Tensor) -> Tensor:
    """float `[b 3 s s]` in [-1, 1] (clamped) -> uint8 `[b 3 s s]`; the inverse of `vae_pixels`."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def resize_bicubic(pixel_values: Tensor, size: int) -> Tensor:
    """uint8 `[b 3 s s]` -> uint8 `[b 3 size size]`, equal to Pillow's bicubic up to rounding.

    torch's antialiased bicubic is the same filter (a = -0.5, support scaled when shrinking). Like
    Pillow, it resizes the width first and rounds to 8 bits between the passes: one pass clamps
    overshooting values only once, and sharp edges differ by up to 17 of 255 levels. The remaining
    difference, from Pillow's fixed-point weights, is 1 level in fewer than 1 of 1,000 values of a
    photograph-sized image, and never more than 2 (tested).

    On the CPU, torch has a much faster uint8 kernel with Pillow's fixed-point arithmetic. It agrees
    when enlarging; when shrinking it rounds its weights more, so it is not used there.
    """
    side = pixel_values.shape[-1]
    if side == size:
        return pixel_values
    if pixel_values.device.type == "cpu" and size > side:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # faster
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
    # In place, as in vae_pixels: three times as fast on a CPU.
    pixels = resize_bicubic(pixel_values, encoder_image_size).float().div_(255.0)
    mean = pixels.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = pixels.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return pixels.sub_(mean).div_(std)
