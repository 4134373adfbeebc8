"""What can be said about a file of another tool when it is read or written: frozen tables, checked once when made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mixofshow.tables import Named, Settings


class ImportSettings(Settings):
    """What a file of another tool does not say, or what is to be different."""

    name: Annotated[str, Named(30)] | None = Field(
        None,
        description="What to call the concept; its words become <name>, or <name1> <name2> … Default: as in the file.",
    )
    words: str | None = Field(
        None,
        max_length=256,
        description="What draws it: of a LoRA without embeddings the trigger words as they are typed; else placeholders.",
    )
    class_word: str = Field("object", min_length=1, max_length=64, description="An ordinary word for what it is.")
    embeddings: Path | None = Field(None, description="Embedding file that belongs to the LoRA.")
    unet_alpha: float = Field(1.0, ge=0, le=100, description="Multiplies the changes of the UNet.")
    text_encoder_alpha: float = Field(1.0, ge=0, le=100, description="Multiplies those of the text encoder.")

    @property
    def says_scale(self) -> bool:
        """Whether somebody chose how strong the changes are."""
        return bool({"unet_alpha", "text_encoder_alpha"} & self.model_fields_set)


class ConvertSettings(ImportSettings):
    """How `mixofshow convert` does it."""

    to: Literal["concept", "diffusers", "kohya"] = Field(
        "concept",
        description="concept: a concept file. diffusers, kohya (A1111, ComfyUI …): a folder with LoRA and embeddings.",
    )
    rank: int | None = Field(None, ge=1, description="Cut changes that are exported to this rank; default: exactly.")
