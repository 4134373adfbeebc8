"""Region-wise LoRA: each region is drawn by its own concept's un-fused weights, the rest by the fused ones.

In every step the UNet predicts once more for each concept, with W0 + ΔW of that concept alone, and the predictions are
blended as the regions cover the latents. This costs as many times as there are concepts, and fusing cannot do better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, fitted, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.sampling.attention import RegionText, shares
from mixofshow.sampling.denoising import Predicting, shared_weights
from mixofshow.sampling.encoding import EncodedPrompt, concepts_in
from mixofshow.sampling.regions import Region, coverage


@dataclass(frozen=True)
class OwnModel:
    """A concept's own weights, (out, in) by layer, and the composition's prompts as its own text encoder reads them."""

    name: str
    weights: Mapping[str, Tensor]
    encoded: EncodedPrompt


def own_models(
    model: ConceptModel,
    concepts: Sequence[Concept],
    regions: Sequence[Region],
    encoding: Callable[[Vocabulary], EncodedPrompt],
) -> list[OwnModel]:
    """One for each concept that some region names; to be made while the pipeline has its base's weights.

    `encoding` encodes the composition with a vocabulary: the model's, but for the concept's words as they were tuned.
    Raises SettingsError when a region names several concepts, BadInputError when the pipeline's weights are not those
    of the concepts' base.
    """
    if model.baked:
        raise BadInputError(
            f"own_weights: this model has fused weights instead of those of base '{shown(model.base)}', which concepts "
            "change; load its folder by load_unfused, which keeps the two apart"
        )
    named: set[str] = set()
    for region in regions:
        found = concepts_in(model, region.prompt) if region.strength else ()
        if len(found) > 1:
            raise SettingsError(f"own_weights: expected one concept, found {found} in {region.title}")
        named |= set(found)
    if missing := named - {concept.info.name for concept in concepts}:
        raise SettingsError(
            f"own_weights: the concepts themselves are needed, not only a model made from them; missing {sorted(missing)}"
        )
    layers = dict.fromkeys([*model.weights, *(layer for one in concepts for layer in one.deltas)])
    made = []
    for concept in concepts:
        if concept.info.name in named:
            fitted(concept, model.pipeline, f"concept <{concept.info.name}>")
            weights = tuned_weights(model.pipeline, concept, layers)
            words = replace(
                model.vocabulary, embeddings={**model.vocabulary.embeddings, **vocabulary([concept]).embeddings}
            )
            with replaced(model.pipeline, weights):
                made.append(OwnModel(concept.info.name, weights, encoding(words)))
    return made


def own_weights(models: Sequence[OwnModel], *, isolate: int = 0) -> Predicting:
    """Predictions by the weights that the pipeline has, and by each concept's own in its regions."""

    @contextlib.contextmanager
    def predicting(pipeline: Any, encoded: EncodedPrompt, latents: Tensor) -> Iterator[Any]:
        """See Predicting."""

        def predict(latents: Tensor, timestep: Tensor, step: int, more: Mapping[str, Any]) -> Tensor:
            blend = _blend(models, encoded.regions, step, latents)
            with shared_weights(pipeline, encoded, latents, isolate=isolate) as fused:
                total = blend[0] * fused(latents, timestep, step, more)
            for one, share in zip(models, blend[1:], strict=True):
                with (
                    replaced(pipeline, one.weights),
                    shared_weights(pipeline, one.encoded, latents, isolate=isolate) as own,
                ):
                    total += share * own(latents, timestep, step, more)
            return total

        yield predict

    return predicting


def _blend(models: Sequence[OwnModel], regions: Sequence[RegionText], step: int, latents: Tensor) -> Tensor:
    """The share of the fused model (first) and of each concept's own in the latents: (models, rows, columns)."""
    rows, columns = latents.shape[-2:]
    there = [region for region in regions if region.holds(step)]
    covers = [coverage(region.shape, columns=columns, rows=rows) for region in there]
    weights = torch.tensor([1.0, *(region.weight for region in there)])
    share = shares(torch.stack([torch.zeros(rows, columns), *covers]), weights)
    own = [
        sum((share[k] for k, region in enumerate(there, 1) if one.name in region.concepts), torch.zeros(rows, columns))
        for one in models
    ]
    return torch.stack([1 - sum(own, torch.zeros(rows, columns)), *own]).to(latents)
