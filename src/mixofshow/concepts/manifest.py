"""What a saved model says of itself, and the concepts that lie beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixofshow.concepts.concept import MADE_FOR, Concept, load_concept
from mixofshow.errors import ConceptFileError, field_problem
from mixofshow.outputs import restore
from mixofshow.reading import parse_json, read_bytes

MANIFEST: Final = "concepts.json"
CONCEPTS: Final = "concepts"
SUFFIX: Final = ".safetensors"


class Entry(BaseModel):
    """A concept in a model; one of an older version does not say its words and class word.

    `made_for` is the base that a concept was made for which was taken for a sister of this one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    hash: str = ""
    words: tuple[str, ...] = ()
    class_word: str = ""
    made_for: str = ""

    @classmethod
    def of(cls, concept: Concept) -> Self:
        """What there is to say of a concept."""
        info = concept.info
        made_for = str(info.settings.get(MADE_FOR) or "")
        return cls(
            name=info.name, hash=concept.hash, words=info.words, class_word=info.class_word, made_for=made_for
        )


class Manifest(BaseModel):
    """What a model was made from: the base's name, how it was fused, its concepts, and the words that it knows.

    `guidance_scale` is the one that suits the base. `settings` are those of fusion, and empty where nothing was fused;
    `threads` is how many computed it, which decides how sums are rounded.
    """

    model_config = ConfigDict(frozen=True)

    base: str = Field("", max_length=128)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    settings: dict[str, Any] = {}
    threads: int | None = Field(None, ge=1)
    concepts: tuple[Entry, ...] = ()
    words: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = {}

    @property
    def hashes(self) -> dict[str, str]:
        """The content hash of each concept, by name."""
        return {one.name: one.hash for one in self.concepts}

    def of_concepts(self, concepts: Iterable[Concept]) -> Self:
        """The same with what its concepts say now, which they may be of another base."""
        entries = {one.info.name: Entry.of(one) for one in concepts}
        return self.model_copy(update={"concepts": tuple(entries[one.name] for one in self.concepts)})


def make_manifest(table: Any, name: str) -> Manifest:
    """A checked manifest; `name` is for messages. Raises ConceptFileError."""
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        problem = field_problem(error.errors()[0], Manifest.model_fields)
        raise ConceptFileError(f"{name}: not the expected table ({problem})") from error


def read_manifest(folder: Path) -> Manifest:
    """What a saved model's folder says of itself. Raises ConceptFileError."""
    restore(folder)
    path = folder / MANIFEST
    return make_manifest(parse_json(read_bytes(path), str(path), ConceptFileError), str(path))


def read_concepts(folder: Path, hashes: Mapping[str, str], pipeline: Any = None) -> tuple[Concept, ...]:
    """The concepts in a model's folder, which must be those of its manifest; none if it keeps none.

    With a pipeline, also checks that they fit. Raises ConceptFileError.
    """
    files = sorted((folder / CONCEPTS).glob(f"*{SUFFIX}"))
    concepts = tuple(load_concept(path, pipeline) for path in files)
    if concepts and {one.info.name: one.hash for one in concepts} != hashes:
        raise ConceptFileError(f"{folder / CONCEPTS}: its {len(files)} files are not the concepts of {MANIFEST}")
    return concepts


class StoredConcepts(Sequence[Concept]):
    """The concepts in a model's folder, read when they are first asked for. Raises as `read_concepts` does."""

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self._folder, self._hashes = folder, hashes

    @cached_property
    def _read(self) -> tuple[Concept, ...]:
        return read_concepts(self._folder, self._hashes)

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: Any) -> Any:
        return self._read[index]
