"""Refitting words: a concept's words make up for what the fused weights have lost of it.

The fused weights are a compromise that all concepts share. A concept's words are its own, so moving them touches no
other concept. They learn as in Textual Inversion (Gal et al. 2022), but from the concept's own model instead of
pictures, so that the center needs no training data here either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from mixofshow.bases.families import conditions
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import Concept, vocabulary
from mixofshow.concepts.prompts import EncodedText, encode_prompts, layerwise
from mixofshow.fusion.recording import Source, draw
from mixofshow.fusion.settings import FusionSettings
from mixofshow.progress import Progress, silent

PICTURES: Final = 4
"""Drawn of each prompt; every step of each is a lesson."""
BATCH: Final = 8
RATE: Final = 0.2
"""Adam's first learning rate, as a share of the root mean square of the concept's vectors."""

Told = Callable[[Mapping[str, float]], None]
"""Called with figures after every step of any concept."""


@dataclass(frozen=True)
class Lesson:
    """One step of a picture that a concept's own model drew: latents and its prediction, (channels, rows, columns)."""

    prompt: str
    latents: Tensor
    timestep: Tensor
    prediction: Tensor


def refit_words(
    pipeline: Any,
    concepts: Sequence[Concept],
    weights: Mapping[str, Tensor],
    settings: FusionSettings,
    *,
    progress: Progress = silent,
) -> tuple[Sequence[Concept], dict[str, tuple[float, float]]]:
    """The concepts with words that suit the fused `weights`, (out, in) by layer, and their losses before and after.

    The loss is the mean squared difference of the fused model's predictions from those of the concept's own model.
    Nothing is done in 0 steps, and for one concept alone, whose weights are its own.
    """
    if not settings.refit_words or len(concepts) == 1:
        return concepts, {}
    refitted, losses = [], {}
    steps = itertools.count(1)

    def told(info: Mapping[str, float]) -> None:
        progress(next(steps), len(concepts) * settings.refit_words, info)

    for concept in concepts:
        lessons = own_lessons(pipeline, Source.of(concept, settings), settings)
        with replaced(pipeline, weights), layerwise(pipeline.unet):
            learned, losses[concept.info.name] = _refit(pipeline, concept, lessons, settings, told)
        refitted.append(learned)
    return refitted, losses


@torch.no_grad()
def own_lessons(pipeline: Any, source: Source, settings: FusionSettings) -> list[Lesson]:
    """What the source's own model predicts while it draws the settings' prompts, without guidance."""
    with replaced(pipeline, source.weights(pipeline, None)), layerwise(pipeline.unet):
        return [
            lesson
            for number, prompt in enumerate(source.texts)
            for lesson in _lessons_of(pipeline, prompt, source, settings.steps, settings.seed + number)
        ]


def _lessons_of(pipeline: Any, prompt: str, source: Source, steps: int, seed: int) -> list[Lesson]:
    """The same for one prompt; the pipeline has the source's own weights."""
    lessons: list[Lesson] = []
    text = encode_prompts(pipeline, [prompt] * PICTURES, source.vocabulary)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        made = _predicted(pipeline, latents, timestep, text)
        lessons.extend(Lesson(prompt, one, timestep, its) for one, its in zip(latents, made, strict=True))
        return made

    draw(pipeline, predict, steps=steps, seed=seed, pictures=PICTURES)
    return lessons


def _refit(
    pipeline: Any, concept: Concept, lessons: Sequence[Lesson], settings: FusionSettings, told: Told
) -> tuple[Concept, tuple[float, float]]:
    """The concept with refitted words, or as it was where these are no better; and its loss before and after."""
    before = _mean_loss(pipeline, concept, lessons)
    learned = _learned(pipeline, concept, lessons, settings, told)
    after = _mean_loss(pipeline, learned, lessons)
    return (learned, (before, after)) if after < before else (concept, (before, before))


@torch.enable_grad()
def _learned(
    pipeline: Any, concept: Concept, lessons: Sequence[Lesson], settings: FusionSettings, told: Told
) -> Concept:
    """The concept after all steps of Adam on its word vectors; the pipeline has the fused weights."""
    steps, generator = settings.refit_words, torch.Generator().manual_seed(settings.seed)
    vectors = concept.embeddings.clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=RATE * float(concept.embeddings.square().mean().sqrt()))
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randperm(len(lessons), generator=generator)[:BATCH].tolist()
        loss = _loss(pipeline, replace(concept, embeddings=vectors), [lessons[k] for k in chosen])
        optimizer.zero_grad()
        loss.backward(inputs=[vectors])  # and to nothing else, whatever the model's parameters ask for
        optimizer.step()
        schedule.step()
        told({"loss": loss.item()})
    return replace(concept, embeddings=vectors.detach())


def _loss(pipeline: Any, concept: Concept, lessons: Sequence[Lesson]) -> Tensor:
    """How far the pipeline's predictions are from the lessons', with the concept's words as they are now."""
    text = encode_prompts(pipeline, [one.prompt for one in lessons], vocabulary([concept]))
    latents, timesteps = (torch.stack([getattr(one, name) for one in lessons]) for name in ("latents", "timestep"))
    wanted = torch.stack([one.prediction for one in lessons])
    return F.mse_loss(_predicted(pipeline, latents, timesteps, text).float(), wanted.float())


def _predicted(pipeline: Any, latents: Tensor, timesteps: Tensor, text: EncodedText) -> Tensor:
    told = conditions(pipeline, text.pooled, latents)
    made: Tensor = pipeline.unet(latents, timesteps, text.hidden, **told).sample
    return made


@torch.no_grad()
def _mean_loss(pipeline: Any, concept: Concept, lessons: Sequence[Lesson]) -> float:
    """The loss over all lessons."""
    batches = [lessons[first : first + BATCH] for first in range(0, len(lessons), BATCH)]
    return sum(len(batch) * _loss(pipeline, concept, batch).item() for batch in batches) / len(lessons)
