"""A LoRA for each region in one pass: a concept's change acts on the cells of its regions, and on nothing else.

In every layer of the UNet that concepts change

    y = W x + Σ_i m_i ⊙ ΔW_i x

with m_i the share that region i has of the layer's cells. The factors are used as they are, those of all regions side by
side: one down, one multiplication by the shares, one up. Keys and values of a region's text come from W + ΔW_i, see
`attention.py`, and that text is read by the concept's own text encoder. Where the picture is drawn by a fused W, a
region also takes off what fusing made of the base: its ΔW_i has W0 − W in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixofshow.bases.layers import kind_of, layer, matrix
from mixofshow.bases.parts import adapters, plain
from mixofshow.concepts.adapters import attached_changes, summed_weights
from mixofshow.concepts.changes import Change, Full, LowRank
from mixofshow.concepts.concept import Concept, fitted, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import BadInputError, BaseModelError, SettingsError, shown
from mixofshow.sampling.attention import RegionalAttention
from mixofshow.sampling.conditioning import OwnText, RegionAdapters, adapters_of
from mixofshow.sampling.settings import Region

_TEXT_SIDE = (".attn2.to_k", ".attn2.to_v")
_OF_TIME = ("time_embedding", "add_embedding")
_DRAWING: Final[WeakSet[nn.Module]] = WeakSet()
"""The UNets that draw a picture with LoRAs of its regions."""


def own_texts(
    model: ConceptModel, concepts: Sequence[Concept], regions: Sequence[Region]
) -> dict[RegionAdapters, OwnText]:
    """What concepts and adapters bring to the regions that ask for them; made while the pipeline has its base's weights.

    Raises BadInputError for a model whose base is not there, SettingsError where a concept is not there itself.
    """
    if model.baked:
        raise BadInputError(
            f"regional_lora: this model has fused weights instead of those of base '{shown(model.base)}', which concepts "
            "change; load its folder by load_unfused, which keeps the two apart"
        )
    known = {one.info.name: fitted(one, model.pipeline, f"concept <{one.info.name}>") for one in concepts}
    attached = [name for name in adapters(model.pipeline) if name not in known]
    asked = dict.fromkeys(adapters_of(model, region) for region in regions)
    if missing := sorted({name for one in asked for name, _ in one} - {*known, *attached}):
        there = ", ".join([*known, *attached]) or "none"
        raise SettingsError(
            f"regional_lora: the concepts themselves are needed, not only a model made from them; missing "
            f"{shown(', '.join(missing))}; there are {shown(there)}"
        )
    changes = {name: one.deltas for name, one in known.items()} | {
        name: attached_changes(model.pipeline, name) for name in attached if any(name in dict(one) for one in asked)
    }
    unfused = {}
    for name, weight in model.weights.items():
        if kind_of(name) == "unet":
            base = matrix(layer(model.pipeline, name))
            unfused[name] = Full(base - weight.to(base))
    made = {}
    for one in filter(None, asked):
        words = vocabulary([known[name] for name, _ in one if name in known])
        vocabulary_there = replace(model.vocabulary, embeddings={**model.vocabulary.embeddings, **words.embeddings})
        made[one] = _own_text(model, [(changes[name], strength) for name, strength in one], vocabulary_there, unfused)
    return made


def _own_text(
    model: ConceptModel,
    tuned: Sequence[tuple[Mapping[str, Change], float]],
    words: Vocabulary,
    unfused: Mapping[str, Change],
) -> OwnText:
    text = [
        ({name: one for name, one in deltas.items() if kind_of(name) != "unet"}, strength) for deltas, strength in tuned
    ]
    changes: dict[str, list[Change]] = {name: [change] for name, change in unfused.items()}
    for deltas, strength in tuned:
        for name, change in deltas.items():
            if kind_of(name) == "unet":
                changes.setdefault(name, []).append(change.scaled(strength))
    fused = (name for name in model.weights if kind_of(name) != "unet")
    weights = summed_weights(model.pipeline, text, fused)
    return OwnText(words, weights, changes)


@contextlib.contextmanager
def regional_lora(pipeline: Any, attention: RegionalAttention) -> Iterator[None]:
    """Inside, every layer adds what the concepts of the regions change of it, where and when these are there.

    Raises SettingsError inside of another such picture, as from a callback: it would be drawn with that one's LoRAs too.
    """
    if plain(pipeline.unet) in _DRAWING:
        raise SettingsError("regional_lora: a picture is being drawn by it with these modules; draw others after it")
    changes: dict[str, list[tuple[int, Change]]] = {}
    for text, region in enumerate(attention.regions, 1):
        for name, of_region in region.changes.items():
            if not name.endswith(_TEXT_SIDE):
                changes.setdefault(name, []).extend((text, change) for change in of_region)
    with contextlib.ExitStack() as stack:
        times = _Times(attention)
        for name, of_layer in changes.items():
            module = layer(pipeline, name)
            if name.removeprefix("unet.").startswith(_OF_TIME):
                times.embedding(name, of_layer)
            elif name.endswith(".time_emb_proj"):
                times.projections[name] = of_layer
            else:
                stack.callback(module.register_forward_hook(_LayerChange(module, of_layer, attention)).remove)
        for handle in times.attached(pipeline):
            stack.callback(handle.remove)
        if changes:
            _DRAWING.add(plain(pipeline.unet))
            stack.callback(_DRAWING.discard, plain(pipeline.unet))
        yield


class _LayerChange:
    """Hook of a linear layer or convolution: adds what the regions' concepts change of its output, each on its cells."""

    def __init__(self, module: Any, changes: Sequence[tuple[int, Change]], attention: RegionalAttention) -> None:
        self.module, self.attention, like = getattr(module, "base_layer", module), attention, attention.like
        self.texts = {text for text, _ in changes}
        low = [(text, one) for text, one in changes if isinstance(one, LowRank)]
        self.down = torch.cat([one.down for _, one in low]).to(like) if low else None
        self.up = torch.cat([one.up for _, one in low], 1).to(like) if low else None
        self.owners = torch.tensor([text for text, one in low for _ in one.down], device=like.device)
        full = [(text, one) for text, one in changes if isinstance(one, Full)]
        shared: dict[int, tuple[Tensor, list[int]]] = {}
        for text, one in full:
            shared.setdefault(id(one), (one.change.to(like), []))[1].append(text)
        self.full = [(weight, torch.tensor(texts, device=like.device)) for weight, texts in shared.values()]

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output, and what is added to it: (batch, cells, out) or (batch, out, rows, columns)."""
        if not self.attention.reads_any(self.texts):
            return output
        states, spatial = given[0], output.ndim == 4
        share = self.attention.share(output.shape[-2:].numel() if spatial else output.shape[1])
        share, of = (share, 0) if spatial else (share.flatten(1).T, 1)
        if self.down is not None and self.up is not None:
            output = self._raised(output, self._product(states, self.down) * share.index_select(of, self.owners), self.up)
        for weight, texts in self.full:
            total = share.index_select(of, texts).sum(of)
            output = output + self._product(states, weight) * (total if spatial else total[:, None])
        return output

    def _product(self, states: Tensor, weight: Tensor) -> Tensor:
        if not isinstance(self.module, nn.Conv2d):
            return F.linear(states, weight)
        kernel = weight.unflatten(1, (-1, *self.module.kernel_size))
        return self.module._conv_forward(states, kernel, None)  # pads as the layer does, around the edge too

    def _raised(self, output: Tensor, states: Tensor, up: Tensor) -> Tensor:
        """The output and up · states, in one operation: most of the layers are small, and many."""
        if output.ndim == 4:
            places = up.expand(len(output), -1, -1)
            return torch.baddbmm(output.flatten(2), places, states.flatten(2)).view_as(output)
        return torch.addmm(output.flatten(0, 1), states.flatten(0, 1), up.T).view_as(output)


@dataclass
class _Times:
    """What concepts change of how the UNet is told the timestep: a vector for the whole picture, in regions their own.

    A resnet adds its projection of that vector to all cells, after its first convolution; here each region gets the
    difference that its concepts make, where its second norm takes the sum.
    """

    attention: RegionalAttention
    projections: dict[str, list[tuple[int, Change]]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, list[tuple[int, Change]]]] = field(default_factory=dict)
    shifts: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def embedding(self, name: str, changes: list[tuple[int, Change]]) -> None:
        """Note the change of a layer of an embedding."""
        _, part, inner = name.split(".")
        self.embeddings.setdefault(part, {})[inner] = changes

    def attached(self, pipeline: Any) -> Iterator[Any]:
        """Hooks on the embeddings and on every resnet that is told."""
        unet = plain(pipeline.unet)
        for part in self.embeddings:
            yield getattr(unet, part).register_forward_hook(self._note(part))
        names = list(self.projections)
        if self.embeddings:
            names = [f"unet.{path}" for path, _ in unet.named_modules() if path.endswith(".time_emb_proj")]
        for name in names:
            resnet: Any = unet.get_submodule(name.removeprefix("unet.").removesuffix(".time_emb_proj"))
            if resnet.time_embedding_norm != "default":
                raise BaseModelError(f"{name}: a resnet that scales by the timestep cannot be used with regional LoRA")
            told: list[Tensor] = []
            yield resnet.register_forward_pre_hook(self._keep(told), with_kwargs=True)
            yield resnet.norm2.register_forward_pre_hook(self._added(resnet, name, told))

    def _note(self, part: str) -> Any:
        def note(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            changes = self.embeddings[part]
            texts = {text for of_layer in changes.values() for text, _ in of_layer}
            self.shifts[part] = {text: self._own(module, given[0], changes, text) - output for text in texts}

        return note

    def _own(self, module: Any, sample: Tensor, changes: Mapping[str, list[tuple[int, Change]]], text: int) -> Tensor:
        for number, inner in enumerate(("linear_1", "linear_2")):
            sample = module.act(sample) if number else sample
            one = getattr(module, inner)
            sample = one(sample) + _sum(changes.get(inner, ()), text, sample, one)
        return sample

    def _keep(self, told: list[Tensor]) -> Any:
        def keep(module: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            told[:] = [given[1] if len(given) > 1 else named["temb"]]

        return keep

    def _added(self, resnet: Any, name: str, told: list[Tensor]) -> Any:
        changes = self.projections.get(name, [])
        texts = {text for text, _ in changes} | {
            text for of in self.embeddings.values() for layers in of.values() for text, _ in layers
        }
        project = resnet.time_emb_proj

        def add(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            states, base = given[0], resnet.nonlinearity(told[0])
            share = self.attention.share(states.shape[-2:].numel())
            for text in texts:
                moved = [of[text] for of in self.shifts.values() if text in of]
                own = resnet.nonlinearity(told[0] + sum(moved)) if moved else base
                difference = _sum(changes, text, own, project)
                if moved:
                    difference = difference + project(own) - project(base)
                states = states + difference[..., None, None] * share[text]
            return (states,)

        return add


def _sum(changes: Sequence[tuple[int, Change]], text: int, states: Tensor, module: Any) -> Tensor:
    """Σ ΔW x over the changes of one text, (rows, out)."""
    weight = torch.zeros_like(module.weight)
    for owner, change in changes:
        if owner == text:
            weight += change.matrix().to(weight)
    return F.linear(states, weight)
