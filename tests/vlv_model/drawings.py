"""Images to look at: one coloured rectangle on a plain background each."""

import torch


def scenes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 1, 1), generator=generator).repeat(1, 1, 64, 64)
    for image in images:
        top, left = torch.randint(0, 32, (2,), generator=generator).tolist()
        colour = torch.randint(0, 256, (3, 1, 1), generator=generator)
        image[:, top : top + 24, left : left + 24] = colour
    return images.to(torch.uint8)
