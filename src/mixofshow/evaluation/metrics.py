"""Scores of pictures, after Mix-of-Show §4.1: cosines of CLIP features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

TEXT_SCALE: Final = 2.5
"""CLIPScore's factor (Hessel et al., 2021)."""


@dataclass(frozen=True)
class Scorer:
    """Two towers of a CLIP: pictures and texts to unit vectors, (items, dim)."""

    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor]


def judge_scorer() -> Scorer:
    """Emojiland's own judge."""
    from mixofshow.bases.emojiland import judge

    return Scorer(judge.image_features, judge.text_features)


def clip_scorer(folder: Path) -> Scorer:
    """Any CLIP in a local folder, such as openai/clip-vit-base-patch32 (the paper's)."""
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=list(pictures), return_tensors="pt")
        return torch.nn.functional.normalize(clip.get_image_features(**inputs).pooler_output, dim=-1)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        inputs = processor(text=list(captions), return_tensors="pt", padding=True, truncation=True)
        return torch.nn.functional.normalize(clip.get_text_features(**inputs).pooler_output, dim=-1)

    return Scorer(images, texts)


def image_alignment(made: Tensor, references: Tensor) -> float:
    """Mean cosine of every made picture with every reference, (pictures, dim) and (references, dim) unit vectors."""
    return float((made @ references.T).mean())


def text_alignment(made: Tensor, texts: Tensor) -> float:
    """CLIPScore, the mean of 2.5 · max(cos, 0); row k of `texts` is what picture k was asked to show."""
    return float(TEXT_SCALE * (made * texts).sum(-1).clamp(min=0).mean())
