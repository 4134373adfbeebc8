"""The fusing step of a secure round: words from each client, sums from all, and one solution."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Message

from mixofshow.bases.loading import base_name
from mixofshow.concepts.concept import Concept, read_concept, vocabulary
from mixofshow.concepts.manifest import Entry, Manifest
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError
from mixofshow.federation import messages
from mixofshow.federation.messages import PROTOCOL, content_of, file_of, values_of
from mixofshow.federation.secure import summed
from mixofshow.federation.sums import SumsShape, solved
from mixofshow.files import parse_tensors

if TYPE_CHECKING:
    from mixofshow.federation.rounds import Round


@dataclass
class SecureStep:
    """What clients have said in a secure round: words, and which layers they change."""

    round: Round
    words: dict[str, Concept] = field(default_factory=dict)
    layers: dict[str, Sequence[str]] = field(default_factory=dict)

    def run(self) -> ConceptModel:
        """The model. Raises BadInputError where too few take part."""
        plan = self.round.plan
        asked = {"fingerprint": self.round.fingerprint, "tune": json.dumps(plan.tune)}
        there = {node: name for node, name in self.round.names.items() if name in self.round.report.answered}
        self.round.ask(messages.WORDS, dict.fromkeys(there, content_of(asked)), self._take_words)
        if len(self.words) < plan.least:
            raise BadInputError(f"{len(self.words)} clients take part, the plan wants {plan.least} at least")
        shape = SumsShape.of(self.round.pipeline, [name for names in self.layers.values() for name in names])
        how = {"fuse": json.dumps(plan.fusion.model_dump(mode="json")), "layers": "\n".join(shape.layers)}
        nodes = [node for node, name in there.items() if name in self.words]
        sums, stayed = summed(
            self.round.grid, self.round.context, nodes, {"protocol": PROTOCOL, **asked, **how}, timeout=plan.patience
        )
        for name in sorted(self.words.keys() - {there[node] for node in stayed}):
            self.round.report.refused[name] = "did not take part in the sums to their end"
            del self.words[name]
        return self._model(shape, sums, len(stayed))

    def _model(self, shape: SumsShape, sums: Sequence[torch.Tensor], count: int) -> ConceptModel:
        weights = solved(shape, shape.unpacked(sums), count, self.round.plan.fusion)
        entries = tuple(Entry(name=c.info.name, words=c.info.words, class_word=c.info.class_word) for c in self.words.values())
        model = ConceptModel(self.round.pipeline, vocabulary(self.words.values()), weights)
        stored = Manifest(base=base_name(self.round.pipeline), guidance_scale=model.usual_guidance, concepts=entries)
        return ConceptModel(self.round.pipeline, model.vocabulary, weights, stored=stored)

    def _take_words(self, name: str, reply: Message) -> None:
        layers = values_of(reply, {"layers": str})["layers"].splitlines()
        data = file_of(reply, "words", messages.MAX_CONCEPT)
        found = read_concept(*parse_tensors(data, name), name, self.round.pipeline)
        if found.deltas:
            raise BadInputError("sent changes, which in a secure round nobody sends")
        SumsShape.of(self.round.pipeline, layers)
        vocabulary([*self.words.values(), found])
        self.round.report.received[name] = len(data)
        self.words[name], self.layers[name] = found, layers


def summary(words: Mapping[str, Concept]) -> dict[str, Any]:
    """What the report says of the members of a secure round: nothing but what their words are."""
    return {name: {"concept": one.info.name, "hash": "", "class_word": one.info.class_word} for name, one in words.items()}
