"""Regions without boxes: where a concept belongs is seen in the first steps, which are drawn with class words.

These steps lay the picture out. Then the UNet is asked once more for the same noisy pictures, with one concept's word in the
place of its class word at a time: where its prediction p changes, there this concept would be drawn,

    map_i(cell) = |p_i − p|²   (of the sides of guidance only the one with the prompt)

with p of class words alone. The maps are cut into places (`layout.py`), and the picture goes on from where it was, with a
region for each concept. With a LoRA for each region, p_i is drawn by concept i's own LoRA.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import RegionError, SettingsError, shown
from mixofshow.sampling.attention import INSIDE
from mixofshow.sampling.conditioning import (
    EncodedPrompt,
    OwnText,
    RegionAdapters,
    concepts_in,
    encode,
    without_concepts,
)
from mixofshow.sampling.denoising import noise_predictor
from mixofshow.sampling.inputs import Inputs
from mixofshow.sampling.layout import cut
from mixofshow.sampling.pictures import embedded
from mixofshow.sampling.regions import coverage, shape_of
from mixofshow.sampling.settings import AUTO, Region, SamplingSettings

logger = logging.getLogger(__name__)

MAX_CELLS: Final = 4096
"""Finer maps are made coarser; nobody draws things that small."""


@dataclass(frozen=True)
class Layout:
    """What was found: the prompt and the regions that draw the same picture, and the draft that it was found in.

    In the prompt, concepts that have regions are class words. The draft is latents, (1, channels, rows, columns).
    """

    prompt: str
    regions: tuple[Region, ...]
    draft: Tensor


def with_wanted(model: ConceptModel, prompt: str, regions: Sequence[Region], auto: bool) -> tuple[Region, ...]:
    """The regions, and with `auto` one without a place for each concept in the prompt that they do not name.

    Its own prompt is the whole one, with class words for the other concepts. Raises RegionError, SettingsError.
    """
    named = concepts_in(model, prompt)
    there = {name for region in regions for name in concepts_in(model, region.prompt)}
    for region in regions:
        if region.auto:
            _require_findable(region, concepts_in(model, region.prompt), named)
    rest = [name for name in named if name not in there] if auto else []
    if not rest and not any(region.auto for region in regions):
        known = ", ".join(f"<{name}>" for name, _, _ in model.class_words()) or "none"
        raise SettingsError(
            f"regions: {AUTO}: the prompt '{shown(prompt, 60)}' names no concept without a region, so there is no place to "
            f"find; this model knows {shown(known)}"
        )
    shared = {*there, *rest}
    others = {name: [one for one in named if one not in shared or one == name] for name in rest}
    return (*regions, *(Region(without_concepts(model, prompt, keep), auto=True) for keep in others.values()))


def _require_findable(region: Region, names: Sequence[str], named: Sequence[str]) -> None:
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise RegionError(f"{region.title}: expected one concept in its prompt, whose place is found, found {found}")
    if names[0] not in named:
        raise RegionError(
            f"{region.title}: the whole picture's prompt does not name <{names[0]}>, so that its place cannot be found; name it "
            "there, or give the region a box"
        )


class PlaceFinder:
    """Finds the places of one picture while it is drawn; see Relay. `layout` is there when it is done."""

    layout: Layout

    def __init__(
        self,
        pipeline: Any,
        model: ConceptModel,
        inputs: Inputs,
        own: Mapping[RegionAdapters, OwnText],
    ) -> None:
        """For inputs of one prompt, whose regions are those of `with_wanted`."""
        self.pipeline, self.model, self.inputs, self.own = pipeline, model, inputs, own
        first, last = inputs.steps
        inputs.settings.require_sizes()
        self.begin = first + _steps_before(inputs.settings, last - first + 1)
        for one in self._sought:
            one.require_its_steps(self.begin, last)
        placed = {name for one in inputs.regions for name in concepts_in(model, one.prompt)}
        self._whole = [name for name in concepts_in(model, inputs.prompts[0]) if name not in placed]
        self.prompt = without_concepts(model, inputs.prompts[0], self._whole)
        self._known = [one for one in inputs.regions if not one.auto]

    def encoded(self, regions: Sequence[Region] | None = None) -> EncodedPrompt:
        """What is read with these regions; without any, in the first pass, with those that have places already."""
        (width, height), inputs = self.inputs.size, self.inputs
        there = self._known if regions is None else regions
        how: dict[str, Any] = {"width": width, "height": height, "guided": inputs.guided, "steps": inputs.steps}
        return encode(self.model, [self.prompt], inputs.negatives, there, own=self.own, **how)

    def next(self, latents: Tensor, timestep: Tensor, beside: Tensor | None = None) -> EncodedPrompt:
        """Find the places, and read the concepts in them from here on."""
        predicted = self._predicted(latents, timestep, beside)
        maps = coarse((predicted[1:] - predicted[0]).square().sum(1)).double().cpu()
        rows, columns = maps.shape[1:]
        width, height = self.inputs.size
        shapes = [shape_of(one, width=width, height=height) for one in self._known]
        taken = torch.zeros(rows, columns, dtype=torch.bool)
        for shape in shapes:
            taken |= coverage(shape, columns=columns, rows=rows) >= INSIDE
        settings = self.inputs.settings
        places = cut(maps, smallest=settings.smallest_place, largest=settings.largest_place, taken=taken)
        regions = self._placed(places)
        self.layout = Layout(self.prompt, regions, clean(self.pipeline.scheduler, latents, predicted[:1], timestep))
        return self.encoded(regions)

    @property
    def _sought(self) -> list[Region]:
        return [one for one in self.inputs.regions if one.auto]

    def _predicted(self, latents: Tensor, timestep: Tensor, beside: Tensor | None = None) -> Tensor:
        """Without any concept, then with each that is sought: (1 + sought, channels, rows, columns)."""
        probes = [self.prompt, *(self._with_concept(one) for one in self._sought)]
        # A step is a text here: each probe is a region over all of the picture, which is there in a step of its own.
        regions = [
            Region(prompt, (0, 0, 1, 1), units="share", first_step=step, last_step=step, adapters=one.adapters)
            for step, (one, prompt) in enumerate(zip(self._sought, probes[1:], strict=True), 2)
        ]
        width, height = self.inputs.size
        encoded = encode(self.model, [self.prompt], "", regions, width=width, height=height, guided=False, own=self.own)
        with noise_predictor(self.pipeline, encoded, latents, beside=beside) as predict:
            return torch.cat([predict(latents, timestep, step, {}) for step in range(1, len(probes) + 1)])

    def _with_concept(self, region: Region) -> str:
        """The whole picture's prompt with this region's concept, and class words for the others that have regions."""
        keep = [*self._whole, *concepts_in(self.model, region.prompt)]
        return without_concepts(self.model, self.inputs.prompts[0], keep)

    def _placed(self, places: Tensor) -> tuple[Region, ...]:
        """All regions, those that found a place with it as a mask; what found none is said."""
        found, place = list[Region](), iter(places)
        for region in self.inputs.regions:
            if not region.auto:
                found.append(region)
            elif (cells := next(place)).any():
                mask = embedded(picture_of(cells, self.inputs.size))
                begin = max(self.begin, region.first_step or 1)
                found.append(replace(region, auto=False, mask=mask, first_step=begin))
            else:
                (name,) = concepts_in(self.model, region.prompt)
                logger.warning(
                    "<%s> found no place and is drawn as its class word; give it a box (%s), or make smallest_place or "
                    "largest_place smaller, or first_pass longer",
                    *(name, "a region of its own"),
                )
        return tuple(found)


def _steps_before(settings: SamplingSettings, done: int) -> int:
    """How many of the steps that are done are the first pass's."""
    after = max(1, round(settings.first_pass * done))
    if after >= done:
        raise SettingsError(
            f"first_pass: expected less than all of the {done} steps that are done, found {settings.first_pass}"
        )
    return after


def coarse(maps: Tensor) -> Tensor:
    """Maps, (…, rows, columns), halved until they have few enough cells."""
    while maps.shape[-2] * maps.shape[-1] > MAX_CELLS:
        maps = F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)
    return maps


def picture_of(cells: Tensor, size: tuple[int, int]) -> Image.Image:
    """Cells, bool, (rows, columns), as a mask of (width, height): white is inside."""
    small = Image.fromarray(255 * cells.numpy().astype(np.uint8))
    return small.resize(size, Image.Resampling.NEAREST)


def clean(scheduler: Any, latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """The picture without noise that a prediction amounts to; all of the shape of `latents`, which are scaled as the UNet's."""
    kind = scheduler.config.prediction_type
    kept = float(scheduler.alphas_cumprod[int(torch.as_tensor(timestep).round())])
    alpha, sigma = math.sqrt(kept), math.sqrt(1 - kept)
    if kind == "v_prediction":
        return alpha * latents - sigma * prediction
    return prediction if kind == "sample" else (latents - sigma * prediction) / max(alpha, 1e-4)
