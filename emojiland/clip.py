"""What Emojiland's judge learns from, and how: a small CLIP that knows all four icon sets and more classes than the generator.

`mixofshow.bases.emojiland.judge` is what looks at pictures with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from emojiland.tokenizer import train_tokenizer
from emojiland.training import Stage
from mixofshow.bases.emojiland.judge import to_tensor, tokenize
from mixofshow.bases.emojiland.scenes import article
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, FURTHER_CLASSES, ICONS_OF_SET
from mixofshow.bases.emojiland.world import CONCEPT_SCENE_PHRASES, KNOWN_SCENES, SIZE, TINTS, compose
from mixofshow.grids import grid

ALL_CLASSES: Final = {**CLASSES, **FURTHER_CLASSES}
ALL_SCENES: Final = {**KNOWN_SCENES, **CONCEPT_SCENE_PHRASES}
MAX_TOKENS: Final = 24


@dataclass(frozen=True)
class Judged:
    """A picture, a caption, all that is true of the picture and what the caption claims of it."""

    image: Image.Image
    caption: str
    subjects: tuple[str, ...]
    truths: frozenset[str]
    claims: frozenset[str]


def judged_picture(random: Random) -> Judged:
    """A picture of any set and tint; its caption may tell or leave out drawing style, tint and place."""
    words = random.sample(list(ALL_CLASSES), 1 if random.random() < 0.8 else 2)
    styles = [random.choice(list(ICONS_OF_SET)) for _ in words]
    tints = [random.choice(list(TINTS)) if random.random() < 0.35 else "" for _ in words]
    scene = random.choice(list(ALL_SCENES))
    kinds = list(zip(words, styles, tints, strict=True))
    picture = compose(
        [(word, _tinted(style, tint, word)) for word, style, tint in kinds], scene, random, scenes=ALL_SCENES
    )
    detail, placed = random.choice(["", "style", "tint", "style tint"]), random.random() < 0.35
    said = [
        _name(word, style if "style" in detail else "", tint if "tint" in detail else "") for word, style, tint in kinds
    ]
    count = str(len(words))
    every_name = {_name(word, a, b) for word, style, tint in kinds for a in ("", style) for b in ("", tint)}
    return Judged(
        picture.image,
        f"a photo of {' and '.join(map(article, said))}" + (f" {scene}" if placed else ""),
        picture.subjects,
        truths=frozenset({*every_name, scene, count}),
        claims=frozenset({*said, count, *([scene] if placed else [])}),
    )


def _name(word: str, style: str, tint: str) -> str:
    return " ".join(filter(None, [tint, style.split("-", maxsplit=1)[0], word]))


@cache
def _tinted(style: str, tint: str, word: str) -> Image.Image:
    image = sprite(style, ALL_CLASSES[word])
    return recolour(image, TINTS[tint]) if tint else image


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
    """CLIP's contrastive loss, in which every caption that is true of a picture counts as its own, plus naming.

    Naming is the cross-entropy over the captions of all classes at once: a batch's own captions show few classes,
    differ in much else, and teach them slowly.
    """
    names = tokenize(tokenizer, [f"a photo of {article(word)}" for word in ALL_CLASSES])

    def loss(model: nn.Module, seed: int) -> Tensor:
        random = Random(seed)
        pictures = [judged_picture(random) for _ in range(batch)]
        images = to_tensor(picture.image for picture in pictures)
        ids = tokenize(tokenizer, [picture.caption for picture in pictures])
        device = clip.device
        scores = model(images.to(device), torch.cat([ids, names]).to(device)).float()
        pairing, naming = scores[:, :batch], scores[:, batch:]
        true = torch.tensor([[one.claims <= shown.truths for one in pictures] for shown in pictures], device=device)
        named = torch.tensor([[word in shown.subjects for word in ALL_CLASSES] for shown in pictures], device=device)
        cross_entropy = nn.functional.cross_entropy
        contrast = (cross_entropy(pairing, _shares(true)) + cross_entropy(pairing.T, _shares(true.T))) / 2
        return contrast + cross_entropy(naming, _shares(named))

    def preview(model: nn.Module) -> Image.Image:
        random = Random(-1)
        return grid([judged_picture(random).image for _ in range(16)], columns=16)

    return Stage("judge", _Similarity(clip), loss, preview, steps, learning_rate)


def _shares(true: Tensor) -> Tensor:
    return true / true.sum(1, keepdim=True)
