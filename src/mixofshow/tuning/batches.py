"""What a run is fed with: pictures and captions as tensors, batch by batch.

Everything random in batch k is drawn from a generator seeded with (seed, k), and so is the order of the pictures: a
resumed run needs to know nothing but k. What only some steps would meet, in one order or template, is found before the
first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mixofshow.bases.families import autoencoder, text_encoders
from mixofshow.bases.memory import coded_at_once, drawn_at_once, sliced
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.prompts import Ids, prompt_ids
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BaseModelError, DatasetError, ResourceError, TokenError, listed, shown
from mixofshow.progress import Progress
from mixofshow.tuning.adapters import word_names
from mixofshow.tuning.captions import TEMPLATES, Naming, varied, whole_in_any_order
from mixofshow.tuning.dataset import Example, read_folder
from mixofshow.tuning.losses import Batch, Pictures, offset_noise
from mixofshow.tuning.settings import CaptionSettings, PictureSettings, TuningSettings
from mixofshow.tuning.transforms import Fitted, fit, variants

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE: Final = 8
DRAWN_AT_ONCE: Final = 8
"""At most, of the prior's pictures."""


@dataclass(frozen=True)
class Encoded:
    """A picture for the UNet: mean and spread of its latents, (channels, height, width), and masks, (1, height, width).

    `mask` is where the concept is, everywhere unless it is `masked`; `valid` is what is not padding.
    """

    mean: Tensor
    spread: Tensor
    mask: Tensor
    valid: Tensor
    masked: bool


def batch_generator(seed: int, number: int) -> torch.Generator:
    """The randomness of batch `number`."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class LatentDataset:
    """The pictures of a data set, encoded once; `crops` 0 encodes a new cut every time instead."""

    def __init__(self, examples: Sequence[Example], settings: PictureSettings, pipeline: Any, *, seed: int) -> None:
        self.examples, self.settings, self.pipeline = examples, settings, pipeline
        scale = pipeline.vae_scale_factor
        self.size = settings.size or pipeline.unet.config.sample_size * scale
        # Every level of the UNet halves the latents.
        self.multiple = scale * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        generator = batch_generator(seed, -1)
        cuts = [
            variants(one, settings, size=self.size, multiple=self.multiple, generator=generator) for one in examples
        ]
        flat = iter(self._encode([cut for of_one in cuts for cut in of_one]))
        self.encoded = [[next(flat) for _ in of_one] for of_one in cuts]
        for example, of_one in zip(examples, self.encoded, strict=True):
            if not all((one.mean.isfinite() & one.spread.isfinite()).all() for one in of_one):
                raise BaseModelError(
                    f"{shown(example.name)}: its latents are not finite; load the base's autoencoder in fp32"
                )

    @property
    def groups(self) -> list[list[int]]:
        """The pictures by shape: only those of one shape fit into one batch."""
        return _by_shape(cuts[0].mean for cuts in self.encoded)

    def draw(self, indices: Sequence[int], generator: torch.Generator) -> Pictures:
        """Latents of these pictures: one of the cuts of each, sampled anew around its mean."""
        if self.settings.crops == 0 and self.settings.fit == "crop":
            chosen = self._encode([self._new_cut(self.examples[index], generator) for index in indices])
        else:
            chosen = [self._pick(self.encoded[index], generator) for index in indices]
        mean, spread = torch.stack([one.mean for one in chosen]), torch.stack([one.spread for one in chosen])
        return Pictures(
            mean + spread * torch.randn(mean.shape, generator=generator).to(mean),
            torch.stack([one.mask for one in chosen]),
            torch.stack([one.valid for one in chosen]),
            torch.tensor([one.masked for one in chosen], device=mean.device),
        )

    @staticmethod
    def _pick(kept: Sequence[Encoded], generator: torch.Generator) -> Encoded:
        return kept[int(torch.randint(len(kept), (), generator=generator))] if len(kept) > 1 else kept[0]

    def _new_cut(self, example: Example, generator: torch.Generator) -> Fitted:
        flip = self.settings.flip and bool(torch.rand((), generator=generator) < 0.5)
        return fit(example, self.settings, size=self.size, multiple=self.multiple, generator=generator, flip=flip)

    @torch.no_grad()
    def _encode(self, cuts: Sequence[Fitted]) -> list[Encoded]:
        """Mean and spread are kept, so that sampling the latents stays random."""
        encoded, scale = dict[int, Encoded](), self.pipeline.vae.config.scaling_factor
        for part in _alike(cuts):
            pictures = torch.stack([cuts[index].picture for index in part])
            with autoencoder(self.pipeline) as vae:
                posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
            means, spreads = (scale * one.float() for one in (posterior.mean, posterior.std))
            for index, mean, spread in zip(part, means, spreads, strict=True):
                mask, valid = cuts[index].mask, cuts[index].valid
                encoded[index] = Encoded(mean, spread, _small(mask, mean), _small(valid, mean), mask is not None)
        return [encoded[index] for index in range(len(cuts))]


def _by_shape(tensors: Iterable[Tensor]) -> list[list[int]]:
    """The places of tensors of each shape."""
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    return list(places.values())


def _alike(cuts: Sequence[Fitted]) -> Iterator[list[int]]:
    """Small groups of pictures of one shape."""
    for indices in _by_shape(cut.picture for cut in cuts):
        height, width = cuts[indices[0]].picture.shape[-2:]
        many = min(ENCODED_AT_ONCE, coded_at_once(width, height))
        for start in range(0, len(indices), many):
            yield indices[start : start + many]


def _small(mask: Tensor | None, latents: Tensor) -> Tensor:
    """A picture's mask at the latents' size; without one, ones."""
    if mask is None:
        return torch.ones_like(latents[:1])
    return functional.interpolate(mask[None], size=latents.shape[-2:], mode="nearest")[0].to(latents)


class BucketSampler:
    """Which pictures come in which batch: within a group, each once before any comes twice.

    Groups take turns at random, in proportion to their sizes.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int, *, batches: int, seed: int) -> None:
        self.groups, self.size, self.seed = groups, size, seed
        shares = torch.tensor([float(len(group)) for group in groups])
        self.turns = torch.multinomial(shares, batches, replacement=True, generator=batch_generator(seed, -2))

    def batch(self, number: int) -> list[int]:
        """The pictures of batch `number`."""
        turn = int(self.turns[number])
        group = self.groups[turn]
        start = int((self.turns[:number] == turn).sum()) * self.size
        return [group[self._place(turn, place)] for place in range(start, start + self.size)]

    def _place(self, turn: int, place: int) -> int:
        round_, rest = divmod(place, len(self.groups[turn]))
        generator = batch_generator(self.seed, -3 - round_ * len(self.groups) - turn)
        return int(torch.randperm(len(self.groups[turn]), generator=generator)[rest])


@dataclass(frozen=True)
class Batches:
    """Pictures with captions, in their order. `tokenize` turns captions into ids.

    With each caption goes how many of its first parts stay when it is shuffled.
    """

    dataset: LatentDataset
    sampler: BucketSampler
    captions: Sequence[tuple[str, int]]
    settings: TuningSettings
    tokenize: Callable[[Sequence[str]], Ids]

    def batch(self, number: int, scheduler: Any) -> Batch:
        """Batch `number`, always the same."""
        generator = batch_generator(self.settings.seed, number)
        indices = self.sampler.batch(number)
        pictures = self.dataset.draw(indices, generator)
        noise = offset_noise(pictures.latents, self.settings.loss.noise_offset, generator)
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(indices),), generator=generator).to(noise.device)
        captions = [
            varied(text, self.settings.placeholder, self.settings.captions, generator, keep)
            for text, keep in (self.captions[index] for index in indices)
        ]
        return Batch(pictures, noise, timesteps, self.tokenize(captions))


def naming_for(settings: TuningSettings) -> Naming | None:
    """How captions must name the concept; None where templates replace them. Raises DatasetError."""
    if settings.captions.templates != "none":
        return None
    naming = Naming(settings.placeholder, word_names(settings), settings.class_word, settings.captions.synonyms)
    if settings.instance_prompt:
        try:
            naming.named(settings.instance_prompt)
        except DatasetError as error:
            raise DatasetError(f"instance_prompt: {error}") from error
    return naming


def make_batches(
    settings: TuningSettings, pipeline: Any, examples: Sequence[Example], *, count: int, progress: Progress
) -> list[Batches]:
    """The concept's pictures in `count` batches, and those of its class word if the prior counts.

    Raises DatasetError, TokenError.
    """
    names, naming = word_names(settings), naming_for(settings)
    known = Vocabulary(dict.fromkeys(names, torch.empty(0)), {settings.placeholder: names} if len(names) > 1 else {})

    def tokenize(captions: Sequence[str]) -> Ids:
        return prompt_ids(pipeline, captions, known, quiet=True)

    def batches(own: TuningSettings, chosen: Sequence[Example], captions: Sequence[str]) -> Batches:
        checked = _checked(own, chosen, captions, tokenize)
        _say_what_is_cut(pipeline, known, chosen, [text for text, _ in checked])
        dataset = LatentDataset(chosen, own.pictures, pipeline, seed=own.seed)
        sampler = BucketSampler(dataset.groups, own.batch_size, batches=count, seed=own.seed)
        return Batches(dataset, sampler, checked, own, tokenize)

    made = [batches(settings, examples, [naming.named(one.caption) if naming else one.caption for one in examples])]
    if prior := prior_examples(settings, pipeline, progress):
        plain = settings.model_copy(update={"captions": CaptionSettings()})  # these pictures keep their caption
        made.append(batches(plain, prior, [one.caption for one in prior]))
    return made


@torch.no_grad()
def prior_examples(settings: TuningSettings, pipeline: Any, progress: Progress) -> list[Example]:
    """The folder's pictures, or as many as asked for, drawn by the base with its own scheduler; none without weight.

    They keep the base from forgetting the class word (Custom Diffusion §3.2, DreamBooth §3.2).
    """
    prompt = settings.prior.prompt or f"a photo of a {settings.class_word}"
    if not settings.prior.weight:
        return []
    if settings.prior.data:
        return read_folder(settings.prior.data, instance_prompt=prompt, skip_bad=settings.skip_bad, with_masks=False)
    images: list[Any] = []
    count, guidance = settings.prior.count, ConceptModel(pipeline).usual_guidance
    many, side = min(DRAWN_AT_ONCE, drawn_at_once(pipeline)), pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    while len(images) < count:
        part = range(len(images), min(len(images) + many, count))
        generators = [torch.Generator().manual_seed(settings.seed + number) for number in part]
        how = {"generator": generators, "guidance_scale": guidance, "output_type": "np"}
        with sliced(pipeline.vae, len(part), width=side, height=side):
            drawn = pipeline([prompt] * len(part), **how).images
        if not np.isfinite(drawn).all():
            raise ResourceError(f"prior: the base draws '{shown(prompt)}' with values that are not finite; try fp32")
        images += pipeline.image_processor.numpy_to_pil(drawn)
        progress(len(images), count, {})
    return [Example(image, prompt, f"prior {number}") for number, image in enumerate(images)]


def _checked(
    settings: TuningSettings, examples: Sequence[Example], captions: Sequence[str], tokenize: Callable[..., Ids]
) -> list[tuple[str, int]]:
    """The captions, and how many of their first parts stay when they are shuffled; none can lose the concept's words.

    Raises DatasetError naming the pictures whose captions would, TokenError for a template that would.
    """
    own = settings.captions
    if own.templates != "none":
        tokenize([template.format(settings.placeholder) for template in TEMPLATES[own.templates]])
        return [(caption, own.keep) for caption in captions]

    def fits(text: str) -> bool:
        try:
            tokenize([text])
        except TokenError:
            return False
        return True

    found, problems = [], []
    words = {settings.placeholder, *word_names(settings)}
    for example, caption in zip(examples, captions, strict=True):
        found.append(whole_in_any_order(caption, words, own.keep, fits) if own.shuffle else (caption, own.keep))
        try:
            tokenize([found[-1][0]])
        except TokenError as error:
            problems.append(f"{shown(example.name)}: its caption: {error}")
    if problems:
        raise DatasetError(listed(problems))
    return found


def _say_what_is_cut(pipeline: Any, known: Vocabulary, examples: Sequence[Example], captions: Sequence[str]) -> None:
    """Once, and not at every step."""
    length = min(one.length for one in text_encoders(pipeline))
    cut = [
        shown(example.name)
        for example, caption in zip(examples, captions, strict=True)
        if max(len(ids[0]) for ids in prompt_ids(pipeline, [caption], known, padded=False)) > length
    ]
    if cut:
        what = "caption is longer than the text encoder's %d tokens: its end is not read"
        logger.warning("%d of %d: " + what + " (%s)", len(cut), len(captions), length, listed(cut))
