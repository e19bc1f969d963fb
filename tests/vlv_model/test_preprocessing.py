import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlv_model.errors import ModelError
from vlv_model.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    encoder_pixels,
    pixels_from_vae,
    resize_bicubic,
    square_image,
    vae_pixels,
)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pillow_resize(square: torch.Tensor, size: int) -> torch.Tensor:
    image = Image.fromarray(square.permute(1, 2, 0).numpy())
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=150, deadline=None)
def test_resize_equals_pillows_up_to_rounding(side, size, seed, extreme):
    square = torch.from_numpy(np.array(noise_image(side, side, seed))).permute(2, 0, 1)
    if extreme:  # black and white only: the filter overshoots and has to be clamped
        square = (square > 127).to(torch.uint8) * 255
    ours = resize_bicubic(square[None], size)[0].int()
    assert (ours - pillow_resize(square, size).int()).abs().max() <= 2


def test_resize_at_full_size_differs_in_few_pixels():
    square = square_image(noise_image(500, 400), 384)
    difference = resize_bicubic(square[None], 768)[0].int() - pillow_resize(square, 768).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.001


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_square_image_is_the_centre_of_any_image(width, height, size):
    square = square_image(noise_image(width, height), size)
    assert square.shape == (3, size, size)
    assert square.dtype == torch.uint8


def test_square_image_keeps_the_centre_and_needs_no_resize_for_a_square():
    image = noise_image(96, 64)
    expected = np.array(image)[:, 16:80]
    assert np.array_equal(square_image(image, 64).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((501, 300), (213, 128), (42, 0)),  # 213.76 is cut off, 42.5 goes to the even number
        ((300, 503), (128, 214), (0, 43)),  # 214.6, and 43
        ((300, 511), (128, 218), (0, 45)),
        ((300, 506), (128, 215), (0, 44)),  # 43.5 does, too
        ((300, 300), (128, 128), (0, 0)),
        ((128, 200), (128, 200), (0, 36)),  # nothing to resize
        ((40, 31), (165, 128), (18, 0)),  # it grows
    ],
)
def test_the_references_square_is_torchvisions_resize_and_centre_crop(size, resized, corner):
    """`Resize(128)` and `CenterCrop(128)` of torchvision's documentation, on a Pillow image."""
    image = noise_image(*size)
    left, top = corner
    bilinear = image.resize(resized, Image.Resampling.BILINEAR)
    expected = np.array(bilinear.crop((left, top, left + 128, top + 128)))
    found = square_image(image, 128, "reference")
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_the_references_square_lies_within_any_image(width, height, size):
    white = Image.new("RGB", (width, height), "white")
    square = square_image(white, size, "reference")
    assert square.shape == (3, size, size)
    assert square.min() == 255  # a crop beyond the picture would be black


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_square_image_converts_other_modes(mode):
    assert square_image(noise_image(40, 30).convert(mode), 16).shape == (3, 16, 16)


def test_vae_pixels_reach_both_ends_and_come_back_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = levels.view(1, 1, 16, 16).expand(1, 3, 16, 16)
    scaled = vae_pixels(pixels)
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert torch.equal(pixels_from_vae(scaled), pixels)
    assert pixels_from_vae(scaled * 1e6).max() == 255  # overshoot is clamped, not wrapped


def test_encoder_pixels_agree_with_the_published_image_processor():
    square = square_image(noise_image(64, 64), 64)
    processor = CLIPImageProcessorPil(
        size={"height": 128, "width": 128},
        do_center_crop=False,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    image = Image.fromarray(square.permute(1, 2, 0).numpy())
    expected = processor(image, return_tensors="pt").pixel_values
    level = 1 / 255 / min(IMAGENET_STD)
    assert (encoder_pixels(square[None], 128) - expected).abs().max() <= level * 1.001


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 9, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("scale", [vae_pixels, lambda x: encoder_pixels(x, 16)])
def test_other_shapes_and_types_are_rejected_in_one_line(wrong, scale):
    with pytest.raises(ModelError, match=r"expected uint8 \[b 3 s s\]") as error:
        scale(wrong)
    assert "\n" not in str(error.value)
