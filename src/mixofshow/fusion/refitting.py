"""Refitting: the fused weights and everybody's words learn to make up for what fusing lost of each concept.

Fusing fits each layer by itself; what counts is the picture. So all concepts' own models, in turns, teach the fused one
what they predict while they draw (distillation, Hinton et al. 2015, arXiv:1503.02531). The pictures are drawn here, so
that the center needs no training data. Where the fusion has a prior, the base is one more teacher, of its own prompts.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR

from mixofshow.bases.families import text_encoders
from mixofshow.bases.layers import layer
from mixofshow.bases.memory import drawn_at_once, has_large_pictures, recomputing
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.concept import Concept, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.prompts import EncodedText, encode_prompts, layerwise, unprompted
from mixofshow.concepts.words import Vocabulary
from mixofshow.fusion.recording import Source, draw, predicted
from mixofshow.fusion.settings import FusionSettings
from mixofshow.progress import Progress, silent

PICTURES: Final = 4
"""Drawn of each of a concept's prompts; every step of each is a lesson. Of the base's prompts, which are more, one."""
BATCH: Final = 8
PLAIN_BATCH: Final = 4
"""Lessons of a concept in a step, and of the base beside them."""
WORD_RATE: Final = 0.05
WEIGHT_RATE: Final = 0.004
"""Adam's first learning rates, as shares of the root mean square of what learns."""


@dataclass(frozen=True)
class DistillationSample:
    """One step of a picture that a teacher drew: latents and its prediction, (channels, rows, columns).

    Above a `guidance` of 1 both are the guided ones, for pictures are drawn with guidance.
    """

    prompt: str
    latents: Tensor
    timestep: Tensor
    prediction: Tensor
    guidance: float


@dataclass(frozen=True)
class Refitted:
    """Concepts with their words, weights (out, in) by layer, and each concept's loss before and after.

    The loss is the mean squared difference of the model's predictions from those that would, with guidance, give what
    the concept's own model gives.
    """

    concepts: Sequence[Concept]
    weights: Mapping[str, Tensor]
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def refit(
    pipeline: Any,
    concepts: Sequence[Concept],
    weights: Mapping[str, Tensor],
    settings: FusionSettings,
    *,
    progress: Progress = silent,
) -> Refitted:
    """Words and fused `weights`, (out, in) by layer, after `settings.refit` steps for each concept.

    Nothing is done in 0 steps, for no concepts, and for one alone, whose weights are its own. What does not lower the concepts'
    mean loss is thrown away. Progress is counted in steps.
    """
    before = Refitted(concepts, weights)
    if not settings.refit or len(concepts) <= 1:
        return before
    lessons = [teacher_samples(pipeline, Source.of(concept, settings), settings) for concept in concepts]
    after = _trained(pipeline, before, lessons, settings, progress)
    losses = [_losses(pipeline, one, lessons) for one in (before, after)]
    if not sum(losses[1]) < sum(losses[0]):
        after, losses = before, [losses[0]] * 2
    return replace(after, losses=dict(zip((one.info.name for one in concepts), zip(*losses, strict=True), strict=True)))


@torch.no_grad()
def teacher_samples(
    pipeline: Any, source: Source, settings: FusionSettings, *, pictures: int = PICTURES
) -> list[list[DistillationSample]]:
    """What the source's own model predicts while it draws the settings' prompts; by prompt.

    A concept's pictures are drawn with the base's usual guidance. The base's are not, since its empty prompt, which
    guidance builds on, is a lesson itself.
    """
    guidance = ConceptModel(pipeline).usual_guidance if source.concept else 1.0
    with replaced(pipeline, source.weights(pipeline, None)), layerwise(pipeline.unet):
        return [
            _samples_of(
                pipeline,
                source,
                prompt,
                guidance,
                steps=settings.steps,
                seed=settings.seed + number * pictures,
                pictures=pictures,
            )
            for number, prompt in enumerate(source.texts)
        ]


def _samples_of(
    pipeline: Any, source: Source, prompt: str, guidance: float, *, steps: int, seed: int, pictures: int
) -> list[DistillationSample]:
    """The same for one prompt; the pipeline has the source's own weights."""
    lessons: list[DistillationSample] = []
    text, empty = encode_prompts(pipeline, [prompt] * pictures, source.vocabulary), _empty(pipeline, pictures)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        made = predicted(pipeline, latents, timestep, text)
        if guidance > 1:
            made = torch.lerp(predicted(pipeline, latents, timestep, empty), made, guidance)
        lessons.extend(
            DistillationSample(prompt, *one, guidance)
            for one in zip(latents, timestep.expand(pictures), made, strict=True)
        )
        return made

    draw(pipeline, predict, steps=steps, seeds=range(seed, seed + pictures))
    return lessons


@torch.enable_grad()
def _trained(
    pipeline: Any,
    taught: Refitted,
    lessons: Sequence[Sequence[Sequence[DistillationSample]]],
    settings: FusionSettings,
    progress: Progress,
) -> Refitted:
    """Words and weights after all steps. In each one concept, in turns, teaches some lessons of one of its prompts."""
    words = [concept.embeddings.clone().requires_grad_() for concept in taught.concepts]
    weights = {name: weight.detach().float().clone().requires_grad_() for name, weight in taught.weights.items()}
    by_prompt = teacher_samples(pipeline, Source.of_base(settings), settings, pictures=1) if settings.prior else []
    plain = [lesson for lessons_of_prompt in by_prompt for lesson in lessons_of_prompt]
    total = settings.refit * len(words)
    optimizer = torch.optim.Adam(
        {"params": [one], "lr": rate * float(one.detach().square().mean().sqrt())}
        for rate, learning in ((WORD_RATE, words), (WEIGHT_RATE, weights.values()))
        for one in learning
    )
    schedule = LambdaLR(optimizer, lambda step: 1 - step / total)
    chance = random.Random(settings.seed)
    many, large = drawn_at_once(pipeline), has_large_pictures(pipeline)
    encoders = [one.model for one in text_encoders(pipeline)]
    with _computing_with(pipeline, weights), recomputing(pipeline.unet, encoders, on=large), layerwise(pipeline.unet):
        for step in range(total):
            if step % len(words) == 0:
                turns = chance.sample(range(len(words)), len(words))
            number = turns[step % len(words)]
            prompt = chance.choice(lessons[number])
            batch = chance.sample(prompt, min(BATCH, len(prompt))) + chance.sample(plain, min(PLAIN_BATCH, len(plain)))
            pupil, loss = replace(taught.concepts[number], embeddings=words[number]), 0.0
            optimizer.zero_grad()
            for first in range(0, len(batch), many):
                piece = batch[first : first + many]
                part = _loss(pipeline, pupil, piece) * (len(piece) / len(batch))
                part.backward(inputs=[words[number], *weights.values()])  # and to no parameter of the pipeline's
                loss += part.item()
            optimizer.step()
            schedule.step()
            progress(step + 1, total, {"loss": loss})
    return Refitted(
        [replace(one, embeddings=own.detach()) for one, own in zip(taught.concepts, words, strict=True)],
        {name: weight.detach().to(taught.weights[name].dtype) for name, weight in weights.items()},
    )


class _Given(nn.Module):
    """In place of a layer's own weight: another, (out, in), in its shape and precision."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # a plain attribute, so that it is no parameter of the pipeline

    def forward(self, own: Tensor) -> Tensor:
        return self.weight.to(own).view_as(own)


@contextlib.contextmanager
def _computing_with(pipeline: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named layers compute with these weights, and gradients flow to them."""
    modules = {name: layer(pipeline, name) for name in weights}
    for name, module in modules.items():
        parametrize.register_parametrization(module, "weight", _Given(weights[name]))
    try:
        yield
    finally:
        for module in modules.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def _loss(pipeline: Any, concept: Concept, lessons: Sequence[DistillationSample]) -> Tensor:
    """How far the pipeline's predictions are from the lessons', with the concept's words as they are now.

    The empty prompt is the same for all concepts, so each has to make up for what differs from its own model there.
    """
    text = encode_prompts(pipeline, [one.prompt for one in lessons], vocabulary([concept]))
    latents, timesteps = (torch.stack([getattr(one, name) for one in lessons]) for name in ("latents", "timestep"))
    guided = torch.stack([one.prediction for one in lessons]).float()
    shares = guided.new_tensor([1 / one.guidance for one in lessons]).view(-1, 1, 1, 1)
    with torch.no_grad():
        empty = predicted(pipeline, latents, timesteps, _empty(pipeline, len(lessons)))
    target = torch.lerp(empty.float(), guided, shares)
    return F.mse_loss(predicted(pipeline, latents, timesteps, text).float(), target)


def _empty(pipeline: Any, count: int) -> EncodedText:
    """The empty prompt, `count` times, as guidance reads it."""
    return unprompted(pipeline, "", encode_prompts(pipeline, [""] * count, Vocabulary()))


@torch.no_grad()
def _losses(pipeline: Any, model: Refitted, lessons: Sequence[Sequence[Sequence[DistillationSample]]]) -> list[float]:
    """Each concept's loss, over a batch of each of its prompts' lessons, from the first step to the last."""
    with replaced(pipeline, model.weights), layerwise(pipeline.unet):
        return [
            sum(_loss(pipeline, concept, one[:: max(1, len(one) // BATCH)][:BATCH]).item() for one in prompts)
            / len(prompts)
            for concept, prompts in zip(model.concepts, lessons, strict=True)
        ]
