"""From prompts and regions to what the UNet's attention reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mixofshow.bases.families import text_encoders
from mixofshow.concepts.adapters import replaced
from mixofshow.concepts.changes import Change
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.prompts import EncodedText, encode_prompts, joined, prompt_ids, unprompted
from mixofshow.concepts.syntax import write_prompt
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import SettingsError, shown
from mixofshow.sampling.attention import RegionText
from mixofshow.sampling.regions import require_a_cell, shape_of
from mixofshow.sampling.settings import Region


@dataclass(frozen=True)
class EncodedPrompt:
    """Text of some prompts, (sides · prompts, layers, tokens, dim); with guidance the negative ones come first.

    `pooled` is that of the text, (sides · prompts, dim), where the base has it. A region has one text for all prompts.
    """

    text: Tensor
    regions: tuple[RegionText, ...]
    guided: bool
    pooled: Tensor | None = None

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.text) // (2 if self.guided else 1)


RegionAdapters = tuple[tuple[str, float], ...]
"""Names and strengths of the LoRAs by which a region is drawn."""


@dataclass(frozen=True)
class OwnText:
    """How a region's concepts are read and drawn as they were tuned: words, text encoders' weights, changes of the UNet."""

    vocabulary: Vocabulary
    weights: Mapping[str, Tensor]
    changes: Mapping[str, Sequence[Change]]


def encode(
    model: ConceptModel,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    regions: Sequence[Region],
    *,
    width: int,
    height: int,
    guided: bool,
    steps: tuple[int, int] | None = None,
    own: Mapping[RegionAdapters, OwnText] | None = None,
) -> EncodedPrompt:
    """All prompts of a composition, layer by layer; `steps` are the first and last to be done, from 1.

    There is one negative prompt for all, or one for each prompt; a region without one has that of the prompt. Regions
    that name concepts are read by these concepts' `own` text encoders, where they are given.
    Raises RegionError, TokenError, SettingsError.
    """
    if steps:
        for region in regions:
            region.require_its_steps(*steps)
    factor = model.pipeline.vae_scale_factor
    shapes = [shape_of(region, width=width, height=height) for region in regions]
    for shape in shapes:
        require_a_cell(shape, columns=width // factor, rows=height // factor)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    given = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    negatives = given if len(set(given)) > 1 else given[:1]

    def sides(positive: Sequence[str], negative: Sequence[str], words: Vocabulary = model.vocabulary) -> EncodedText:
        text = encode_prompts(model.pipeline, positive, words)
        if not guided:
            return text
        without = [unprompted(model.pipeline, one, encode_prompts(model.pipeline, [one], words)) for one in negative]
        return joined([*without, text])

    known, plain = own or {}, OwnText(model.vocabulary, {}, {})
    texts = []
    for region, shape in zip(regions, shapes, strict=True):
        without = negatives if region.negative_prompt is None else [region.negative_prompt]
        for one, tuned in _stages(region, model):
            how = known.get(adapters_of(model, region), plain) if tuned else plain
            with replaced(model.pipeline, how.weights):
                text = sides([one.prompt] * len(without), without, how.vocabulary).hidden
            when = (one.first_step or 1, one.last_step)
            words = concept_places(model, one.prompt)
            texts.append(RegionText(shape, text, one.weight, region.front, *when, words, how.changes))
    whole = sides(prompts, negatives * (len(prompts) // len(negatives)))
    return EncodedPrompt(whole.hidden, tuple(texts), guided, whole.pooled)


def _stages(region: Region, model: ConceptModel) -> Iterator[tuple[Region, bool]]:
    """What a region reads, and whether its concepts are there.

    It is its prompt, and the same with class words, for as much and as long as it asks for these.
    """

    def plain(**changes: Any) -> tuple[Region, bool]:
        return replace(region, prompt=without_concepts(model, region.prompt), **changes), False

    first, last, start = region.first_step or 1, region.last_step, region.concept_from or 1
    if start > first:
        yield plain(last_step=start - 1 if last is None else min(start - 1, last))
        first = start
    if last is not None and first > last:
        return
    if region.strength < 1:
        yield plain(first_step=first, weight=region.weight * (1 - region.strength))
    if region.strength > 0:
        yield replace(region, first_step=first, weight=region.weight * region.strength), True


def adapters_of(model: ConceptModel, region: Region) -> RegionAdapters:
    """The LoRAs by which a region is drawn, where each is by its own: those it says, else the concepts in its prompt."""
    if region.adapters is not None:
        return tuple(sorted(region.adapters.items()))
    return tuple((name, 1.0) for name in concepts_in(model, region.prompt) if region.strength)


def concepts_in(model: ConceptModel, prompt: str) -> tuple[str, ...]:
    """The names of the concepts that a prompt speaks of, each once."""
    owners = {word: name for name, words, _ in model.class_words() for word in words}
    return tuple(dict.fromkeys(owners[piece] for piece in model.vocabulary.split(prompt) if piece in owners))


def without_concepts(model: ConceptModel, prompt: str, keep: Collection[str] = ()) -> str:
    """The prompt with each concept, but those to `keep`, replaced by its class word.

    Raises SettingsError if that is not known.
    """
    known = {word: (name, class_word) for name, words, class_word in model.class_words() for word in words}
    found, before = [], None
    for piece, weight in model.vocabulary.pieces(prompt):
        name, class_word = known.get(piece, (None, ""))
        if name is None and piece in model.vocabulary.embeddings:
            raise SettingsError(f"the class word of {shown(piece)} is not known to this model; fuse its concept anew")
        if name is None or name in keep:
            found.append((piece if name is None else f" {piece} ", weight))
        elif name != before:
            found.append((f" {class_word} ", weight))
        before = name
    return model.vocabulary.shortened(" ".join(write_prompt(found, model.vocabulary.syntax).split()))


def concept_places(model: ConceptModel, prompt: str) -> tuple[int, ...]:
    """Where the words of concepts stand among a prompt's tokens."""
    first = text_encoders(model.pipeline)[0].first_id
    (ids,) = prompt_ids(model.pipeline, [prompt], model.vocabulary)[0]
    return tuple((ids >= first).nonzero().flatten().tolist())
