"""Settings of extractors: which frozen model makes which features. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlv_model.config import Config, Precision
from vlv_model.squares import Framing, Resampling

ExtractorName = Literal["clip", "clip-text", "dinov2", "inception", "aesthetic"]
"""The keys of `vlv_model.features.extractors.EXTRACTORS`."""

Resize = Literal["pytorch", "tensorflow", "clean"]
"""Whose resizing enters Inception (`vlv_model.features.inception.inception_pixels`)."""

_OF_INCEPTION = ("image_size", "framing", "resampling", "resize")


class ExtractorConfig(Config):
    """An extractor, its weights, and what else decides its features."""

    extractor: ExtractorName = Field(
        description="clip: image embeddings; clip-text: those of captions; dinov2: the class token; "
        "inception: the last pool of FID's Inception v3; aesthetic: clip, and LAION's score of it"
    )
    weights: str | None = Field(
        None,
        description="a folder of transformers or a hub id (owner/name or owner/name@revision), for "
        "inception the file pt_inception-2015-12-05-6726825d.pth; default: "
        "openai/clip-vit-large-patch14, facebook/dinov2-large; inception has none",
    )
    head: str | None = Field(
        None,
        description="aesthetic: file of LAION's head, sac+logos+ava1-l14-linearMSE.pth (v2) or "
        "sa_0_4_vit_l_14_linear.pth (v1)",
    )
    image_size: int = Field(
        256, ge=32, description="inception: side of the square that is cut first, in pixels"
    )
    framing: Framing = Field(
        "stretch",
        description="inception: stretch the image to that square, as the published implementation "
        "does, or crop its centre",
    )
    resampling: Resampling = Field(
        "bilinear", description="inception: Pillow's filter that makes that square"
    )
    resize: Resize = Field(
        "pytorch",
        description="inception: whose resizing of that square to 299 pixels: pytorch-fid's, "
        "tensorflow's (torch-fidelity) or clean-fid's; features of different ones do not compare",
    )
    precision: Precision = Field("float32", description="compute precision")

    @model_validator(mode="after")
    def _fit_the_extractor(self) -> ExtractorConfig:
        if self.extractor != "inception":
            given = [name for name in _OF_INCEPTION if name in self.model_fields_set]
            if given:
                raise ValueError(
                    f"embed.{given[0]} belongs to embed.extractor=inception, got "
                    f"embed.extractor={self.extractor}: leave it out"
                )
        elif self.weights is None:
            raise ValueError(
                "embed.extractor=inception needs embed.weights: the file "
                "pt_inception-2015-12-05-6726825d.pth of pytorch-fid's release fid_weights"
            )
        if self.extractor == "inception" and self.precision != "float32":
            raise ValueError(
                "embed.extractor=inception computes in float32 alone, got embed.precision="
                f"{self.precision}: its distances are small differences of large sums"
            )
        if (self.extractor == "aesthetic") != (self.head is not None):
            raise ValueError(
                "embed.extractor=aesthetic and embed.head belong together: give both, or neither"
            )
        return self
