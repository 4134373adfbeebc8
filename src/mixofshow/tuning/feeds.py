"""What a run is fed with. What only some steps would meet, in one order or template, is found before the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixofshow.bases.families import text_encoders
from mixofshow.concepts.prompts import Ids, prompt_ids
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import DatasetError, TokenError, listed, shown
from mixofshow.progress import Progress
from mixofshow.tuning.batches import Order, Source
from mixofshow.tuning.captions import TEMPLATES, Naming, whole_in_any_order
from mixofshow.tuning.dataset import Example
from mixofshow.tuning.methods import word_names
from mixofshow.tuning.objective import Feed
from mixofshow.tuning.prior import prior_examples
from mixofshow.tuning.settings import CaptionSettings, TuningSettings

logger = logging.getLogger(__name__)


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


def make_feeds(
    settings: TuningSettings,
    pipeline: Any,
    examples: Sequence[Example],
    *,
    total: int,
    processes: int,
    progress: Progress,
) -> list[Feed]:
    """The concept's pictures, and those of its class word if the prior counts. Raises DatasetError, TokenError."""
    names, naming = word_names(settings), naming_for(settings)
    known = Vocabulary(dict.fromkeys(names, torch.empty(0)), {settings.placeholder: names} if len(names) > 1 else {})

    def tokenize(captions: Sequence[str]) -> Ids:
        return prompt_ids(pipeline, captions, known, quiet=True)

    def feed(own: TuningSettings, chosen: Sequence[Example], captions: Sequence[str]) -> Feed:
        checked = _checked(own, chosen, captions, tokenize)
        texts, keep = [text for text, _ in checked], [kept for _, kept in checked]
        _say_what_is_cut(pipeline, known, chosen, texts)
        source = Source(chosen, own.pictures, pipeline, seed=own.seed)
        batches = total * own.optimizer.accumulate * processes
        order = Order(source.groups, own.batch_size, batches=batches, seed=own.seed)
        return Feed(source, order, texts, keep, own, tokenize)

    feeds = [feed(settings, examples, [naming.named(one.caption) if naming else one.caption for one in examples])]
    if prior := prior_examples(settings, pipeline, progress):
        plain = settings.model_copy(update={"captions": CaptionSettings()})  # these pictures keep their caption
        feeds.append(feed(plain, prior, [one.caption for one in prior]))
    return feeds


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
