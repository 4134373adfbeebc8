"""Emojiland's judge: a small CLIP that takes the place that CLIP ViT-B/32 has in the paper's evaluation.

It is never used to train the generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from mixofshow.bases.emojiland.world import SIZE

JUDGE_FOLDER: Final = Path(__file__).parent / "judge"


@cache
def load(folder: Path = JUDGE_FOLDER) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped judge and its tokenizer."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def image_features(images: Sequence[Image.Image], folder: Path = JUDGE_FOLDER) -> Tensor:
    """Unit vectors of pictures, (pictures, dim); pictures are resized to what the judge sees."""
    clip, _ = load(folder)
    small = [
        image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) if image.size != (SIZE, SIZE) else image
        for image in images
    ]
    features = [clip.get_image_features(pixel_values=part).pooler_output for part in to_tensor(small).split(64)]
    return nn.functional.normalize(torch.cat(features), dim=-1)


@torch.no_grad()
def text_features(captions: Sequence[str], folder: Path = JUDGE_FOLDER) -> Tensor:
    """Unit vectors of captions, (captions, dim)."""
    clip, tokenizer = load(folder)
    return nn.functional.normalize(
        clip.get_text_features(input_ids=tokenize(tokenizer, captions)).pooler_output, dim=-1
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids padded to the tokenizer's length, (captions, tokens)."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """RGB pictures of one size as (pictures, 3, height, width) in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
