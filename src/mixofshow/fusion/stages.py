"""Gradient fusion in the paper's order (Mix-of-Show §3.3): text encoder, then cross-attention keys and values, then the rest.

Each stage records what the layers see while every concept decodes its own prompt, and solves them; later stages
already see the fused layers of the earlier ones. Concepts are taken in the order of their hashes, so that the
order of the files does not matter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from mixofshow.bases.layers import cross_attentions, layer, matrix, tunable_layers
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, vocabulary
from mixofshow.concepts.encoding import Encode, encode_fully, encode_shared
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.prompts import encode_ids, layerwise
from mixofshow.concepts.words import Vocabulary, token_ids
from mixofshow.errors import BadInputError
from mixofshow.fusion.methods import METHODS, average, method_settings
from mixofshow.fusion.statistics import LayerSums, Moments, input_of
from mixofshow.progress import Progress, silent

PROMPTS: Final = ("photo of a {}", "{}")
_KEYS_AND_VALUES: Final = re.compile(r"attn2\.to_[kv]$")


@dataclass(frozen=True)
class FusionSettings:
    """How to fuse. `steps` and `seed` are of the pictures decoded for recording; `options` go to the method."""

    method: str = "gradient"
    prompts: tuple[str, ...] = PROMPTS
    steps: int = 20
    seed: int = 1234
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was fused: the objective of the base weight (no change), of the fused one, of the average."""

    rows: int
    unchanged: float
    fused: float
    average: float

    @property
    def residual(self) -> float:
        """What is left of the change that the concepts want, as a share in norm; 0 is perfect."""
        return float((self.fused / self.unchanged) ** 0.5) if self.unchanged > 0 else 0.0


@dataclass(frozen=True)
class Fused:
    """The fused model and how well each layer was fused."""

    model: ConceptModel
    layers: dict[str, LayerReport]


@dataclass(frozen=True)
class Center:
    """What all stages share: the base model, the concepts in their order, and all their words."""

    pipeline: Any
    concepts: Sequence[Concept]
    vocabulary: Vocabulary
    settings: FusionSettings

    def prompt_ids(self, concept: Concept, prompt: str, length: int | None = None) -> Tensor:
        """Token ids of a prompt template with the concept in it, (1, tokens); unpadded unless a length is given."""
        text = prompt.format(concept.prompt)
        first = self.pipeline.text_encoder.get_input_embeddings().num_embeddings
        ids = token_ids(text, self.pipeline.tokenizer, self.vocabulary, first, length)
        return torch.tensor([ids], device=self.pipeline.text_encoder.device)

    def encode(self, ids: Tensor, encode: Encode = encode_shared) -> Tensor:
        """(1, tokens) -> (layers, tokens, dim) through the text encoder as it is now."""
        vectors = self.vocabulary.vectors(len(cross_attentions(self.pipeline.unet)))
        return encode_ids(self.pipeline.text_encoder, ids, vectors, encode=encode)[0]


Stage = Callable[[Center, Concept, Sequence[str]], Moments]


@torch.no_grad()
def fuse(
    concepts: Sequence[Concept], pipeline: Any, settings: FusionSettings | None = None, *, progress: Progress = silent
) -> Fused:
    """Fuse concepts into one model; the pipeline is left as it was. Raises TokenError when two claim one word."""
    if not concepts:
        raise BadInputError("nothing to fuse: no concept was given")
    settings = settings or FusionSettings()
    options = method_settings(settings.method, settings.options)
    ordered = sorted(concepts, key=lambda concept: concept.hash)
    center = Center(pipeline, ordered, vocabulary(ordered), settings)
    weights: dict[str, Tensor] = {}
    reports: dict[str, LayerReport] = {}
    done, total = 0, len(STAGES) * len(ordered)
    for record, names in zip(STAGES, _layers_of_stages(center), strict=True):
        with replaced(pipeline, weights):
            sums = {name: LayerSums.zero(matrix(layer(pipeline, name))) for name in names}
            for concept in ordered:
                moments = record(center, concept, names)
                for name in names:
                    sums[name].add(
                        concept.deltas.get(name), moments.matrices[input_of(name)], moments.rows[input_of(name)]
                    )
                done += 1
                progress(done, total, {})
        for name in names:
            weights[name], reports[name] = _solve(center, name, sums.pop(name), options)
    manifest = {
        "method": settings.method,
        "options": options,
        "prompts": list(settings.prompts),
        "steps": settings.steps,
        "seed": settings.seed,
        "concepts": [{"name": concept.info.name, "hash": concept.hash} for concept in ordered],
    }
    return Fused(ConceptModel(pipeline, center.vocabulary, weights, manifest), reports)


def _layers_of_stages(center: Center) -> Iterator[list[str]]:
    """The changed layers, each in the stage where it is fused."""
    touched = [
        name for name in tunable_layers(center.pipeline) if any(name in concept.deltas for concept in center.concepts)
    ]
    yield [name for name in touched if name.startswith("text_encoder.")]
    yield [name for name in touched if _KEYS_AND_VALUES.search(name)]
    yield [name for name in touched if name.startswith("unet.") and not _KEYS_AND_VALUES.search(name)]


def _solve(center: Center, name: str, sums: LayerSums, options: Mapping[str, Any]) -> tuple[Tensor, LayerReport]:
    changes = [concept.deltas.get(name) for concept in center.concepts]
    change = METHODS[center.settings.method](changes, sums, **options)
    base = matrix(layer(center.pipeline, name))
    fused = (base.double() + change).to(base.dtype)
    report = LayerReport(
        sums.rows, sums.energy, sums.objective(fused.double() - base.double()), sums.objective(average(changes, sums))
    )
    return fused, report


def record_text(center: Center, concept: Concept, names: Sequence[str]) -> Moments:
    """Text encoder: all tokens of the concept's prompts, in every layer's variant, through its own text encoder.

    A token that variants share counts once in each, so each must pass the encoder in full.
    """
    moments = Moments()
    own = tuned_weights(center.pipeline, concept, names)
    with replaced(center.pipeline, own), moments.recording({name: layer(center.pipeline, name) for name in names}):
        for prompt in center.settings.prompts:
            center.encode(center.prompt_ids(concept, prompt), encode_fully)
    return moments


def record_keys_and_values(center: Center, concept: Concept, names: Sequence[str]) -> Moments:
    """Cross-attention keys and values: the concept's words and the end token, from the fused text encoder.

    Each cross-attention layer counts its own variant of the text.
    """
    moments = Moments()
    inputs = [f"unet.{path}.input" for path in cross_attentions(center.pipeline.unet)]
    end, first = (
        center.pipeline.tokenizer.eos_token_id,
        center.pipeline.text_encoder.get_input_embeddings().num_embeddings,
    )
    for prompt in center.settings.prompts:
        ids = center.prompt_ids(concept, prompt)
        telling = (ids[0] == end) | (ids[0] >= first)
        for name, text in zip(inputs, center.encode(ids), strict=True):
            moments.add(name, text[telling])
    return moments


def record_picture(center: Center, concept: Concept, names: Sequence[str]) -> Moments:
    """All other layers of the UNet: one picture of the first prompt, at every step, without guidance.

    Text encoder, keys and values are the fused ones already; the recorded layers are the concept's own.
    """
    pipeline, settings, moments = center.pipeline, center.settings, Moments()
    ids = center.prompt_ids(concept, settings.prompts[0], pipeline.text_encoder.config.max_position_embeddings)
    text = center.encode(ids)[None]
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(settings.steps, device=text.device)
    latents = _noise(pipeline, settings.seed) * scheduler.init_noise_sigma
    layers = {name: layer(pipeline, name) for name in names}
    with (
        replaced(pipeline, tuned_weights(pipeline, concept, names)),
        moments.recording(layers),
        layerwise(pipeline.unet),
    ):
        for timestep in scheduler.timesteps:
            made = pipeline.unet(scheduler.scale_model_input(latents, timestep), timestep, text).sample
            latents = scheduler.step(made, timestep, latents).prev_sample
    return moments


def _noise(pipeline: Any, seed: int) -> Tensor:
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return noise.to(pipeline.unet.device, pipeline.unet.dtype)


STAGES: Final[tuple[Stage, ...]] = (record_text, record_keys_and_values, record_picture)
