"""Emojiland's judge: a small CLIP that knows all four icon sets and more classes than the generator.

It takes the place that CLIP ViT-B/32 has in the paper's evaluation and is never used to train the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from mixofshow.bases.emojiland.autoencoder import to_tensor
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.training import Stage, grid
from mixofshow.bases.emojiland.vocabulary import CLASSES, FURTHER_CLASSES, ICONS_OF_SET
from mixofshow.bases.emojiland.wordpieces import train_tokenizer
from mixofshow.bases.emojiland.world import CONCEPT_SCENE_PHRASES, KNOWN_SCENES, SIZE, Picture, article, compose

JUDGE_FOLDER: Final = Path(__file__).parent / "judge"
ALL_CLASSES: Final = {**CLASSES, **FURTHER_CLASSES}
ALL_SCENES: Final = {**KNOWN_SCENES, **CONCEPT_SCENE_PHRASES}
TINTS: Final = {"rosy": 1 / 8, "minty": 1 / 3, "azure": 1 / 2, "violet": 3 / 4}
"""Recoloured sprites by the word for their turn on the colour wheel; they teach the judge to see identity."""
MAX_TOKENS: Final = 24


def judged_picture(random: Random) -> Picture:
    """A picture whose caption also tells, half of the time, the drawing style and tint of its sprites."""
    words = random.sample(list(ALL_CLASSES), 1 if random.random() < 0.75 else 2)
    subjects, named = [], []
    detailed = random.random() < 0.6
    for word in words:
        style = random.choice(list(ICONS_OF_SET))
        tint = random.choice(list(TINTS)) if random.random() < 0.35 else ""
        image = sprite(style, ALL_CLASSES[word])
        subjects.append((word, recolour(image, TINTS[tint]) if tint else image))
        named.append(article(" ".join(filter(None, [tint, style.split("-")[0], word])) if detailed else word))
    scene = random.choice(list(ALL_SCENES))
    picture = compose(subjects, scene, random, scenes=ALL_SCENES)
    place = f" {scene}" if random.random() < 0.8 else ""
    return Picture(picture.image, f"a photo of {' and '.join(named)}{place}", picture.subjects, scene)


def build_tokenizer() -> CLIPTokenizer:
    """The judge's own tokenizer."""
    random = Random(1)
    return train_tokenizer([judged_picture(random).caption for _ in range(6000)], MAX_TOKENS)


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained judge: eight-pixel patches, two small towers."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


class _Similarity(nn.Module):
    """Scaled cosine similarities, pictures × captions, in one call that can be distributed."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        return self.clip(input_ids=ids, pixel_values=pictures).logits_per_image


def stage(clip: CLIPModel, tokenizer: CLIPTokenizer, *, steps: int, batch: int, learning_rate: float) -> Stage:
    """CLIP's contrastive loss, in which equal captions count as equal."""

    def loss(model: nn.Module, seed: int) -> Tensor:
        random = Random(seed)
        pictures = [judged_picture(random) for _ in range(batch)]
        captions = [picture.caption for picture in pictures]
        images = to_tensor(picture.image for picture in pictures)
        device = clip.device
        scores = model(images.to(device), tokenize(tokenizer, captions).to(device)).float()
        same = torch.tensor([[a == b for b in captions] for a in captions], device=device).float()
        wanted = same / same.sum(1, keepdim=True)
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(scores, wanted) + cross_entropy(scores.T, wanted)) / 2

    def preview(model: nn.Module) -> Image.Image:
        random = Random(-1)
        return grid([judged_picture(random).image for _ in range(16)], columns=16)

    return Stage("judge", _Similarity(clip), loss, preview, steps, learning_rate)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids padded to the tokenizer's length, (captions, tokens)."""
    ids: Tensor = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


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
