"""What a suite compares: one frozen table, checked once when made. Paths in a YAML are relative to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, model_validator

from mixofshow.bases.emojiland import concepts as emojiland
from mixofshow.bases.loading import EMBEDDED
from mixofshow.concepts.concept import load_concept
from mixofshow.errors import BadInputError, SettingsError, field_problem, nearest, shown
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import check_method, check_weights
from mixofshow.reading import named_in, parse_table, read_table
from mixofshow.sampling.settings import STEPS
from mixofshow.tables import Group, Named
from mixofshow.tuning.adapters import METHODS
from mixofshow.tuning.settings import TuningSettings, make_settings, merged, nested

GROUPS: Final = {"character": "characters", "object": "objects", "scene": "scenes"}
"""What results call the concepts of a kind together."""
MEAN: Final = "mean"
OWN_FUSION: Final[Mapping[str, Mapping[str, Any]]] = {
    "p-plus": {"method": "average", "steps": 1},  # words only: there is nothing to fuse but the vocabulary
    "textual-inversion": {"method": "average", "steps": 1},
    "custom-diffusion": {"method": "custom-diffusion"},
}
"""How concepts of a tuning method are put together where nothing is said."""
ByCategory = Mapping[str, Sequence[str]]
"""Prompts; `{}` stands for the concept."""


def usual_prompts(base: str) -> Mapping[str, Any]:
    """Of prompts.yaml, what suits a base: for "subject" and "scene" by category, and those "without" a concept."""
    return _usual_prompts()["emojiland" if base == "emojiland" else "general"]


@cache
def _usual_prompts() -> dict[str, Any]:
    return parse_table(files(__package__).joinpath("prompts.yaml").read_text(encoding="utf-8"), "prompts.yaml")


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return named_in(Path((info.context or {}).get("folder", "")), path)


File = Annotated[Path, AfterValidator(_beside_the_file)]


class ConceptEntry(Group):
    """A concept: one of Emojiland's own by its name alone, or a folder with `train` and `reference` pictures."""

    name: Annotated[str, Named(32)]
    kind: Literal["character", "object", "scene"]
    class_word: str = Field(min_length=1, max_length=64)
    folder: File | None = Field(None, description="Pictures in train/ and reference/; default: Emojiland's own.")
    references: File | None = Field(None, description="Held-out pictures, where they lie elsewhere.")
    files: Mapping[str, File] = Field(
        {}, description="Concept files that are there already, by what results call the method or by how it tunes."
    )

    @model_validator(mode="before")
    @classmethod
    def _emojilands_own(cls, value: Any) -> Any:
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or "folder" in table or "references" in table:
            return table
        name = table.get("name")
        if name not in emojiland.ALL:
            hint = nearest(str(name), emojiland.ALL)
            raise ValueError(f"emojiland has no such concept{hint}; give a folder of pictures for one of your own")
        kind = "scene" if name in emojiland.SCENES else "character" if name in emojiland.CHARACTERS else "object"
        return {"kind": kind, "class_word": emojiland.class_word(name), **table}

    @property
    def noun(self) -> str:
        """What stands for it in prompts."""
        return f"<{self.name}>"

    @property
    def prompt_kind(self) -> str:
        """Whose prompts it is asked with: "subject" or "scene"."""
        return "scene" if self.kind == "scene" else "subject"


class MethodEntry(Group):
    """A way to tune concepts and a way to fuse them; in YAML also as "ed-lora+gradient"."""

    tuning: str
    fusion: str | None = Field(None, description="Needed for methods that have no fusion of their own.")
    name: str | None = Field(None, max_length=64, description="What results call it; default: tuning+fusion.")
    tune: Mapping[str, Any] = Field({}, description="Settings of tuning, on top of the suite's.")
    fuse: Mapping[str, Any] = Field({}, description="Settings of fusion, on top of the suite's.")
    fused: File | None = Field(None, description="A delta file of all the concepts fused that is there already.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        tuning, _, fusion = value.partition("+")
        return {"tuning": tuning, "fusion": fusion or None}

    @model_validator(mode="after")
    def _known(self) -> MethodEntry:
        if self.tuning not in METHODS:
            raise ValueError(f"no tuning method '{shown(self.tuning)}'{nearest(self.tuning, METHODS)}")
        if self.fusion is None and self.tuning not in OWN_FUSION:
            raise ValueError(f"{self.tuning} has no fusion of its own; say which, as {self.tuning}+average")
        return self

    @property
    def key(self) -> str:
        """What results call it."""
        return self.name or (f"{self.tuning}+{self.fusion}" if self.fusion else self.tuning)


class Compositions(Group):
    """Wide pictures of several concepts, each in a region of its own, or all by one prompt."""

    together: tuple[tuple[str, ...], ...] = Field((), description="Names of concepts from left to right, per picture.")
    places: tuple[str, ...] = Field(("",), min_length=1, description="Said at the end of prompts, in turn.")
    images: int = Field(2, ge=1, le=1000, description="Pictures of each.")
    regions: bool = Field(True, description="Without, one prompt draws them, and equal shares are their places.")


class Suite(Group):
    """Everything that a suite's pictures and numbers depend on."""

    base: str = "emojiland"
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="What the base's weights are kept as.")
    variant: str | None = Field(None, max_length=64, description="Which of the base's weight files, such as fp16.")
    concepts: tuple[ConceptEntry, ...] = Field(min_length=1)
    methods: tuple[MethodEntry, ...] = Field(min_length=1)
    tune: Mapping[str, Any] = Field({}, description="Settings of tuning for all methods.")
    fuse: Mapping[str, Any] = Field({}, description="Settings of fusion for all methods.")
    words_only: tuple[str, ...] = Field(
        (), description="Methods whose single concepts are also drawn with alpha 0 (the paper's Figure 3)."
    )
    prompts: Mapping[Literal["subject", "scene"], Mapping[str, tuple[str, ...]]] = Field(
        {}, description="By kind of concept and category; default: twenty that suit the base."
    )
    prompts_per_category: int | None = Field(None, ge=1, description="Only the first so many of each.")
    prior_prompts: tuple[str, ...] | None = Field(None, description="Prompts without concepts, for prior drift.")
    images_per_prompt: int = Field(4, ge=1, le=1000)
    seed: int = Field(100, ge=0, lt=2**62, description="Picture k of every prompt is made from seed + k.")
    steps: int = Field(STEPS, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    compositions: Compositions = Compositions()
    clip: str | None = Field(None, description="CLIP by folder or hub name; default: Emojiland's judge.")
    dino: str | None = Field(None, description="DINO by folder or hub name, for one more image alignment.")
    imagenet: bool | None = Field(
        None, description="One more image alignment, by a network of photographs; default: where the extra is there."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names, keys = [concept.name for concept in self.concepts], [method.key for method in self.methods]
        for what, listed in (("concepts", names), ("methods", keys)):
            if twice := sorted(one for one, count in Counter(listed).items() if count > 1):
                raise ValueError(f"two {what} are called {', '.join(twice)}; give one of them a name of its own")
        for where, what, used, known in (
            ("compositions.together", "concept", chain(*self.compositions.together), names),
            ("words_only", "method", self.words_only, keys),
        ):
            for one in used:
                if one not in known:
                    raise ValueError(f"{where}: no {what} '{shown(one)}'{nearest(one, known)}")
        for kind in {concept.prompt_kind for concept in self.concepts}:
            for category, prompts in self.prompts_of(kind).items():
                _check_prompts(f"prompts.{kind}", category, prompts)
        return self

    def prompts_of(self, kind: str) -> ByCategory:
        """The prompts of a kind of concept, "subject" or "scene", by category."""
        own: Mapping[str, ByCategory] = dict(self.prompts)  # type: ignore[arg-type]
        found = own.get(kind) or usual_prompts(self.base)[kind]
        return {category: prompts[: self.prompts_per_category] for category, prompts in found.items()}

    def without_concepts(self) -> Sequence[str]:
        """The prompts for prior drift."""
        return usual_prompts(self.base)["without"] if self.prior_prompts is None else self.prior_prompts

    def tuning(self, method: MethodEntry, concept: ConceptEntry, data: Path) -> TuningSettings:
        """How a method tunes a concept on the pictures in `data`. Raises SettingsError."""
        own = {
            "name": concept.name,
            "class_word": concept.class_word,
            "data": data,
            "base": self.base,
            "method": method.tuning,
        }
        table = merged(nested(self.tune), nested(method.tune))
        return make_settings(merged(table, own), f"method {method.key}: tune")

    def fusion(self, method: MethodEntry) -> FusionSettings:
        """How a method fuses. Raises BadInputError."""
        own = {"method": method.fusion} if method.fusion else OWN_FUSION[method.tuning]
        below, above = ({key: one[key] for key in ("options",) if key in one} for one in (self.fuse, method.fuse))
        table = {**self.fuse, **own, **method.fuse, **merged(below, above)}
        settings = FusionSettings.of(table, f"method {method.key}: fuse")
        check_method(settings)
        check_weights(settings, [concept.name for concept in self.concepts])
        return settings

    @property
    def loading(self) -> dict[str, Any]:
        """The options of `load_base` that it says."""
        return self.model_dump(include={"dtype", "variant"}, exclude_none=True)

    @property
    def inputs(self) -> list[Path]:
        """The files and folders of others that a run reads."""
        of_concepts = [path for one in self.concepts for path in (one.folder, one.references, *one.files.values())]
        base = [] if self.base in EMBEDDED else [Path(self.base)]
        return [path for path in (*of_concepts, *(one.fused for one in self.methods), *base) if path]


def _check_prompts(where: str, category: str, prompts: Iterable[str]) -> None:
    if category in (MEAN, *GROUPS.values()):
        raise ValueError(f"{where}: '{category}' is no name for a category, results use it already")
    for prompt in prompts:
        rest = prompt.replace("{}", "", 1)
        if rest == prompt or "{" in rest or "}" in rest:
            raise ValueError(f"{where}.{category}: expected one {{}} for the concept, found '{shown(prompt)}'")


def read_suite(path: Path, over: Mapping[str, Any] | None = None) -> Suite:
    """A suite from a YAML file, with some keys `over` its own. Raises SettingsError naming the file and the field."""
    table = read_table(path) | dict(over or {})
    for key in ("base", "clip", "dino"):  # each a folder or a name
        if isinstance(named := table.get(key), str) and named_in(path.parent, named).is_dir():
            table[key] = str(named_in(path.parent, named))
    return make_suite(table, source=str(path), folder=path.parent)


def suite_of_files(
    pairs: Sequence[str], methods: Sequence[str] = ("gradient", "average"), kind: str = "subject", **settings: Any
) -> Suite:
    """Concept files, each with a folder of held-out pictures as "FILE=FOLDER", by methods of fusion; more `settings`.

    Raises SettingsError, ConceptFileError.
    """
    concepts = []
    for pair in pairs:
        file, _, folder = pair.partition("=")
        if not (file and folder):
            raise SettingsError(
                f"'{shown(pair)}': expected FILE=FOLDER, a concept file and a folder of held-out pictures of it"
            )
        info = load_concept(file).info
        named = {"name": info.name, "class_word": info.class_word, "kind": "scene" if kind == "scene" else "character"}
        concepts.append({**named, "references": folder, "files": {"ed-lora": file}})
    ways = [{"tuning": "ed-lora", "fusion": method, "name": method} for method in methods]
    return make_suite({"concepts": concepts, "methods": ways, "prior_prompts": [], **settings}, "evaluate")


def make_suite(table: Mapping[str, Any], source: str = "suite", *, folder: Path = Path()) -> Suite:
    """A checked suite; paths in it are relative to `folder`. Raises SettingsError naming the field."""
    try:
        suite = Suite.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        raise SettingsError(f"{source}: {_problem(error.errors()[0])}") from error
    for method in suite.methods:  # before anything is drawn
        try:
            suite.fusion(method)
            suite.tuning(method, suite.concepts[0], folder)
        except BadInputError as error:
            raise SettingsError(f"{source}: {error}") from error
    return suite


def _problem(error: Mapping[str, Any]) -> str:
    """In one line; for an unknown key deep in the table, the nearest that may stand there."""
    *place, key = error["loc"] or ("suite",)
    if error["type"] == "value_error":
        where = ".".join(map(str, error["loc"]))
        found = f", found {shown(error['input'])}" if isinstance(error.get("input"), str) else ""
        return f"{where + ': ' if where else ''}{error['ctx']['error']}{found}"
    if error["type"] == "extra_forbidden" and place:
        models: tuple[type[BaseModel], ...] = (ConceptEntry, MethodEntry, Compositions)
        names = chain.from_iterable(model.model_fields for model in models)
        return f"{'.'.join(map(str, place))}: {field_problem({**error, 'loc': (key,)}, names)}"
    return field_problem(error, Suite.model_fields)
