"""One image file, one caption: the captioner without Ray, for a look at a model."""

from __future__ import annotations

from pathlib import Path

from pipelines.recaption.config import CaptionConfig
from pipelines.runtime import quiet_libraries
from vlv_model.errors import DataError


def caption_file(config: CaptionConfig) -> str:
    """The caption of `config.image`.

    Raises DataError for a file that is no image, CheckpointError without a trained captioner.
    """
    quiet_libraries()
    import torch
    from PIL import Image

    from pipelines.recaption.predictor import model_fingerprint
    from vlv_model.captioner import VLVCaptioner
    from vlv_model.preprocessing import square_image

    try:
        with Image.open(Path(config.image)) as image:
            model, checkpoint = config.model.resolve()
            square = square_image(image, model.image_size)
    except FileNotFoundError:
        raise DataError(f"there is no file {config.image}: give the path of an image") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{config.image} cannot be read as an image: {error}") from None
    model_fingerprint(model, checkpoint, config.generate)  # refuses an untrained captioner
    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    captioner = VLVCaptioner.from_pretrained(model, checkpoint)
    captioner.to("cuda" if use_gpu else "cpu")
    pixel_values = square[None].to("cuda" if use_gpu else "cpu")  # uint8 [1 3 s s]
    (caption,) = captioner.generate(
        pixel_values, config.generate.num_beams, config.generate.max_new_tokens
    )
    return caption.text
