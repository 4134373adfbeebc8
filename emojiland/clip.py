"""What Emojiland's judge learns from, and how: a small CLIP of the same things as the generator's, with some more names.

It never sees the sets that concepts are made of, nor anything that was drawn by a network. It is told not only what a
picture shows, but which pictures show the same, in whatever place: identity is what it will be asked for.
`mixofshow.bases.emojiland.judge` is what looks at pictures with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from emojiland.autoencoder import altered
from emojiland.backdrops import backdrop
from emojiland.library import Library
from emojiland.pictures import STYLES, Thing
from emojiland.tokenizer import train_tokenizer
from emojiland.training import Stage
from mixofshow.bases.emojiland.judge import to_tensor, tokenize
from mixofshow.bases.emojiland.scenes import article, listed
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, FURTHER_CLASSES, GENERATOR_SETS
from mixofshow.bases.emojiland.world import CONCEPT_SCENE_PHRASES, KNOWN_SCENES, SIZE, SOFTNESS, TINTS, compose
from mixofshow.grids import grid

ALL_CLASSES: Final = {**CLASSES, **FURTHER_CLASSES}
ALL_SCENES: Final = {**KNOWN_SCENES, **CONCEPT_SCENE_PHRASES}
WORD_OF_ICON: Final = {icon.replace("-", " "): word for word, icon in ALL_CLASSES.items()}
"""So that one thing has one name."""
MAX_TOKENS: Final = 32
ALONE_SHARE: Final = 0.8
CLASS_SHARE: Final = 0.4
TINTED_SHARE: Final = 0.25
ALTERED_SHARE: Final = 0.4


@dataclass(frozen=True)
class Judged:
    """A picture, a caption, what stands in it, all that is true of it and what the caption claims of it."""

    image: Image.Image
    caption: str
    subjects: tuple[str, ...]
    truths: frozenset[str]
    claims: frozenset[str]


def judged_pair(random: Random, library: Library) -> list[Judged]:
    """Two pictures of one thing, or of the same two: other places, poses and captions; what is drawn alike stays alike."""
    count = 1 if random.random() < ALONE_SHARE else 2
    things = [_thing(random, library) for _ in range(count)]
    return [_shown(things, random) for _ in range(2)]


def _thing(random: Random, library: Library) -> Thing:
    """One of the classes as often as any other, tinted, or altered without a word for it, as nobody else's is."""
    if random.random() < CLASS_SHARE:
        word, icon_set = random.choice(list(ALL_CLASSES)), random.choice(GENERATOR_SETS)
        name, picture = word, sprite(icon_set, ALL_CLASSES[word])
    else:
        icon = library.choose(random)
        name, icon_set, picture = WORD_OF_ICON.get(icon.name, icon.name), icon.icon_set, icon.picture
    tint = random.choice(list(TINTS)) if random.random() < TINTED_SHARE else ""
    if tint:
        picture = recolour(picture, TINTS[tint])
    elif random.random() < ALTERED_SHARE:
        picture = altered(picture, random)
    return Thing(name, picture, STYLES[icon_set], tint)


def _shown(things: Sequence[Thing], random: Random) -> Judged:
    """A picture of the things; its caption may tell or leave out drawing style, tint and place."""
    phrase, scene = random.choice(list(ALL_SCENES.items())) if random.random() < 0.8 else backdrop(random)
    softness = random.choice((0, 0, random.uniform(0, SOFTNESS)))
    pairs = [(thing.name, thing.sprite) for thing in things]
    picture = compose(pairs, phrase, random, scenes={phrase: scene}, softness=softness)
    styled, tinted, placed = random.random() < 0.5, random.random() < 0.5, random.random() < 0.35
    said = [_name(thing, styled, tinted) for thing in things]
    count = str(len(things))
    return Judged(
        picture.image,
        f"a photo of {listed(said)}" + (f" {phrase}" if placed else ""),
        picture.subjects,
        truths=frozenset(
            {count, phrase, *(_name(thing, a, b) for thing in things for a in (True, False) for b in (True, False))}
        ),
        claims=frozenset({*said, count, *([phrase] if placed else [])}),
    )


def _name(thing: Thing, styled: bool, tinted: bool) -> str:
    return " ".join(filter(None, [thing.tint * tinted, thing.style * styled, thing.name]))


def build_tokenizer(library: Library) -> CLIPTokenizer:
    """The judge's own tokenizer."""
    random = Random(1)
    captions = [one.caption for _ in range(3000) for one in judged_pair(random, library)]
    return train_tokenizer([*captions, *ALL_CLASSES, *ALL_SCENES, *(icon.name for icon in library.icons)], MAX_TOKENS)


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
    """Scaled cosine similarities of pictures with captions and with pictures, in one call that can be distributed."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        made = self.clip(input_ids=ids, pixel_values=pictures)
        return made.logits_per_image, self.clip.logit_scale.exp() * made.image_embeds @ made.image_embeds.T


def stage(
    clip: CLIPModel, tokenizer: CLIPTokenizer, library: Library, *, steps: int, batch: int, learning_rate: float
) -> Stage:
    """Three cross-entropies: pairing, naming, and telling things from one another.

    Pairing is CLIP's own, in which every caption that is true of a picture counts as its own. Naming is over the
    captions of all classes at once: a batch's own captions show few classes, differ in much else, and teach them
    slowly. Telling finds, for each picture, the other one of the same thing among all pictures, wherever it stands.
    """
    names = tokenize(tokenizer, [f"a photo of {article(word)}" for word in ALL_CLASSES])
    cross_entropy = nn.functional.cross_entropy

    def loss(model: nn.Module, seed: int) -> Tensor:
        random = Random(seed)
        pictures = [one for _ in range(batch // 2) for one in judged_pair(random, library)]
        count, device = len(pictures), clip.device
        images = to_tensor(picture.image for picture in pictures).to(device)
        ids = tokenize(tokenizer, [picture.caption for picture in pictures])
        scores, alike = (part.float() for part in model(images, torch.cat([ids, names]).to(device)))
        pairing, naming = scores[:, :count], scores[:, count:]
        true = torch.tensor([[one.claims <= shown.truths for one in pictures] for shown in pictures], device=device)
        named = torch.tensor([[word in shown.subjects for word in ALL_CLASSES] for shown in pictures], device=device)
        known = named.any(1)
        twin = torch.arange(count, device=device) ^ 1
        contrast = (cross_entropy(pairing, _shares(true)) + cross_entropy(pairing.T, _shares(true.T))) / 2
        telling = cross_entropy(alike.masked_fill(torch.eye(count, dtype=torch.bool, device=device), -1e4), twin)
        return contrast + cross_entropy(naming[known], _shares(named[known])) + telling

    def preview(model: nn.Module) -> Image.Image:
        random = Random(-1)
        return grid([one.image for _ in range(8) for one in judged_pair(random, library)], columns=16)

    return Stage("judge", _Similarity(clip), loss, preview, steps, learning_rate)


def _shares(true: Tensor) -> Tensor:
    return true / true.sum(1, keepdim=True)
