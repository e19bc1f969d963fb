"""Captions one image file, without Ray."""

from __future__ import annotations

from pathlib import Path

from pipelines.execution.connection import quiet_libraries
from pipelines.recaption.config import CaptionConfig
from vlv_model.errors import ConfigError, DataError


def caption_file(config: CaptionConfig) -> str:
    """Return the caption of `config.image`.

    Raises DataError for a file that is not an image, CheckpointError without a trained captioner.
    """
    quiet_libraries()
    import torch

    from pipelines.pictures.decode import DecodeError
    from pipelines.pictures.squares import square_of
    from pipelines.recaption.predictor import model_fingerprint, open_engine
    from vlv_model.captioner import VLVCaptioner
    from vlv_model.squares import Square

    model, checkpoint = config.model.resolve(VLVCaptioner.read_parts)
    try:
        square = square_of(Path(config.image).read_bytes(), Square.of(model))
    except (OSError, DecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{config.image} cannot be read as an image: {reason}") from None
    model_fingerprint(model, checkpoint, config.generate)  # raises for an untrained captioner
    if config.use_gpu and not torch.cuda.is_available():
        raise ConfigError("use_gpu=true, but this machine has no CUDA GPU: leave it out")
    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    device = torch.device("cuda" if use_gpu else "cpu")
    one = config.generate.model_copy(update={"batch_size": 1})
    engine = open_engine(model, checkpoint, one, device)
    (outcome,) = engine.captions([0], torch.from_numpy(square[None]))  # uint8 [1 3 s s]
    if outcome.caption is None:
        raise DataError(f"{config.image} cannot be captioned: {outcome.error}")
    return config.generate.postprocessed(outcome.caption.text)
