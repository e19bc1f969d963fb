"""Settings of `jobs/publish.py`."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from pipelines.cli.config import InputPathOrUrl, OutputPathOrUrl
from vlv_model.checkpoints.hub import HubId
from vlv_model.config import Config


class PublishConfig(Config):
    """All settings of `jobs/publish.py`."""

    table: InputPathOrUrl = Field(description="table to publish, such as what recaption wrote")
    output: OutputPathOrUrl | None = Field(
        None, description="folder of WebDataset shards with the images and their captions"
    )
    images: InputPathOrUrl | None = Field(
        None,
        description="the images of the captions, as recaption read them; default: the column `image` of "
        "the table (join=true)",
    )
    rows_per_shard: int = Field(10_000, ge=1, description="images in a shard")
    repo: str | None = Field(
        None,
        description="data set on the Hugging Face hub, OWNER/NAME, to push the table with its card to; "
        "needs a token: HF_TOKEN or `hf auth login`",
    )
    private: bool = Field(
        True,
        description="who sees a repository that the push creates: only you, or (false) everybody",
    )

    @field_validator("repo")
    @classmethod
    def _is_repo(cls, repo: str | None) -> str | None:
        if repo is not None and ((found := HubId.parse(repo)) is None or found.revision):
            raise ValueError(f"'{repo}': expected OWNER/NAME")
        return repo

    @model_validator(mode="after")
    def _one_target(self) -> PublishConfig:
        if (self.output is None) == (self.repo is None):
            raise ValueError(
                "give either output=FOLDER (WebDataset shards) or repo=OWNER/NAME (the hub)"
            )
        if self.images and not self.output:
            raise ValueError("images belong to output: the hub gets the table as it is")
        return self
