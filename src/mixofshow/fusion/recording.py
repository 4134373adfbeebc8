"""Recording: a concept's own model draws the concept's prompts, and what its layers see is counted.

Three stages in the paper's order (Mix-of-Show §3.3): text encoder, then cross-attention keys and values, then the
rest of the UNet.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from mixofshow.bases.families import conditions, text_encoders
from mixofshow.bases.layers import count_groups, kind_of, layer, text_groups
from mixofshow.bases.memory import drawn_at_once
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.concepts.concept import Concept, vocabulary
from mixofshow.concepts.encoding import encode_fully, encode_shared
from mixofshow.concepts.prompts import (
    EncodedText,
    Ids,
    encode_plain,
    encode_variants,
    joined,
    layerwise,
    prompt_ids,
    unprompted,
)
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BadInputError
from mixofshow.fusion.settings import FusionSettings, RecordingSettings
from mixofshow.fusion.statistics import LayerStatistics, MomentAccumulator, input_of

Stage = Literal["text", "keys-and-values", "picture"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
_KEYS_AND_VALUES: Final = re.compile(r"attn2\.to_[kv]$")


def stage_of(layer_name: str) -> Stage:
    """The stage in which a layer is fused."""
    if kind_of(layer_name) == "text_encoder":
        return "text"
    return "keys-and-values" if _KEYS_AND_VALUES.search(layer_name) else "picture"


@dataclass(frozen=True)
class Source:
    """Whose inputs are recorded: a concept, or the base model itself (`concept` None), with what it reads and draws."""

    concept: Concept | None
    texts: tuple[str, ...]
    pictures: tuple[str, ...]

    @classmethod
    def of(cls, concept: Concept, settings: RecordingSettings) -> Source:
        """A concept with the settings' prompts."""
        texts, pictures = (
            tuple(prompt.replace("{}", concept.prompt) for prompt in prompts)
            for prompts in (settings.prompts, settings.picture_prompts)
        )
        return cls(concept, texts, pictures)

    @classmethod
    def of_base(cls, settings: FusionSettings) -> Source:
        """The base model with the settings' own prompts, which it reads and draws."""
        return cls(None, settings.prior_prompts, settings.prior_prompts)

    @property
    def name(self) -> str:
        """For people."""
        return self.concept.info.name if self.concept else "the base"

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that its prompts use."""
        return vocabulary([self.concept] if self.concept else [])

    def weights(self, pipeline: Any, own: Collection[str] | None) -> dict[str, Tensor]:
        """Its own weights of the layers it changes, or of those among them that are in `own`, (out, in)."""
        if self.concept is None:
            return {}
        names = [name for name in self.concept.deltas if own is None or name in own]
        return tuned_weights(pipeline, self.concept, names)


@torch.no_grad()
def record(
    pipeline: Any,
    source: Source,
    names: Sequence[str],
    settings: RecordingSettings,
    *,
    own: Collection[str] | None = None,
    keep_inputs: bool = False,
    exact: bool = True,
) -> dict[str, LayerStatistics]:
    """What the named layers see while the source's own model draws its prompts, by input name.

    Layers that are not in `own` (None: all are) stay as the pipeline has them. `exact`: see MomentAccumulator.
    """
    recorder = _Recorder(pipeline, source, settings, names, MomentAccumulator(keep_inputs=keep_inputs, exact=exact))
    try:
        weights = source.weights(pipeline, own)
        with replaced(pipeline, weights, parked=True):
            weights.clear()  # so that each goes when the layer's own comes back
            recorder.run()
    except BadInputError as error:
        raise BadInputError(f"{source.name}: {error}") from error
    return recorder.moments.seen()


@dataclass(frozen=True)
class _Recorder:
    """Counts the inputs of some layers; the pipeline has the source's own weights already."""

    pipeline: Any
    source: Source
    settings: RecordingSettings
    names: Sequence[str]
    moments: MomentAccumulator

    def run(self) -> None:
        for stage, record_stage in zip(STAGES, (self._text, self._keys_and_values, self._pictures), strict=True):
            if any(stage_of(name) == stage for name in self.names):
                record_stage()

    def _text(self) -> None:
        """All tokens of the prompts, in every layer's variant.

        A token that variants share counts once in each, so each must pass the encoder in full.
        """
        for text in self.source.texts:
            self._observe("text", partial(self._encode, self._ids(text, padded=False), encode_fully))

    def _keys_and_values(self) -> None:
        """The concept's words and the end token. Each cross-attention layer counts its own variant of the text.

        Of the base's prompts all tokens, with their padding.
        """
        wanted = {input_of(name) for name in self.names}
        groups = {f"unet.{path}.input": group for path, group in text_groups(self.pipeline.unet).items()}
        encoder = text_encoders(self.pipeline)[0]
        for text in self.source.texts:
            ids = self._ids(text, padded=self.source.concept is None)
            rows = (ids[0][0] == encoder.tokenizer.eos_token_id) | (ids[0][0] >= encoder.first_id)
            if self.source.concept is None:
                rows = torch.ones_like(rows)
            hidden = self._encode(ids).hidden[0]
            for name, group in groups.items():
                if name in wanted:
                    self.moments.add(name, hidden[group, rows])

    def _pictures(self) -> None:
        """The rest of the UNet, on each picture at every step; small pictures are drawn side by side."""
        at_once = drawn_at_once(self.pipeline)
        with layerwise(self.pipeline.unet):
            for start in range(0, len(self.source.pictures), at_once):
                texts = [self._texts(prompt) for prompt in self.source.pictures[start : start + at_once]]
                seeds = [self.settings.seed + start + number for number in range(len(texts))]
                draw(self.pipeline, partial(self._predict, joined(texts)), steps=self.settings.steps, seeds=seeds)

    def _predict(self, texts: EncodedText, noisy: Tensor, timestep: Tensor) -> Tensor:
        """What the source's own model predicts, while inputs are counted; with guidance if there are two texts each."""
        each = len(texts.hidden) // len(noisy)
        latents = noisy.repeat_interleave(each, 0)
        made = self._observe("picture", partial(predicted, self.pipeline, latents, timestep, texts))
        if each == 1:
            return made
        empty, text = made[::2], made[1::2]
        return empty + self.settings.guidance_scale * (text - empty)

    def _texts(self, prompt: str) -> EncodedText:
        """The padded prompt, after the empty one if there is guidance, (1 or 2, layers, tokens, dim)."""
        text = self._encode(self._ids(prompt))
        if self.settings.guidance_scale == 1:
            return text
        return joined([unprompted(self.pipeline, "", self._encode(self._ids(""))), text])

    def _observe(self, stage: Stage, call: Callable[[], Any]) -> Any:
        """The call's result, while what the stage's layers see is counted."""
        with self.moments.recording(self._layers[stage]):
            return call()

    @cached_property
    def _layers(self) -> Mapping[Stage, Mapping[str, nn.Module]]:
        """By stage; looked up once, not in every step."""
        layers = {name: layer(self.pipeline, name) for name in self.names}
        return {stage: {name: one for name, one in layers.items() if stage_of(name) == stage} for stage in STAGES}

    def _ids(self, text: str, *, padded: bool = True) -> Ids:
        """(1, tokens) for each text encoder."""
        return prompt_ids(self.pipeline, [text], self.source.vocabulary, padded=padded)

    def _encode(self, ids: Ids, encode: Any = encode_shared) -> EncodedText:
        """(1, tokens) to text in every layer's variant, through the text encoders as they are now."""
        layers = count_groups(self.pipeline.unet)
        if self.source.concept is None:
            return encode_plain(self.pipeline, ids).for_layers(layers)
        return encode_variants(self.pipeline, ids, self.source.vocabulary.vectors(layers), encode=encode)


def predicted(pipeline: Any, latents: Tensor, timestep: Tensor, text: EncodedText) -> Tensor:
    """What the UNet predicts; `text` is that of each picture, in every layer's variant."""
    return pipeline.unet(latents, timestep, text.hidden, **conditions(pipeline, text.pooled, latents)).sample


def draw(pipeline: Any, predict: Callable[[Tensor, Tensor], Tensor], *, steps: int, seeds: Sequence[int]) -> None:
    """Draw a picture from each seed's noise; in each step `predict` is given their latents, (pictures, …), and the time."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps, device=pipeline.unet.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([_noise(pipeline, one) for one in generators]) * scheduler.init_noise_sigma
    # Some schedulers draw noise in every step.
    source = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        made = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(made, timestep, latents, **source).prev_sample


def _noise(pipeline: Any, generator: torch.Generator) -> Tensor:
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = torch.randn(1, channels, side, side, generator=generator)
    return noise.to(pipeline.unet.device, pipeline.unet.dtype)
