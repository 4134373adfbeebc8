"""How a concept is tuned: one frozen table in groups, checked once when made.

Every key has a dotted name (`unet.rank`); YAML, command line, printed configuration and JSON Schema are all made from
the models below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, Field

from mixofshow.errors import SettingsError, shown
from mixofshow.reading import named_in
from mixofshow.tables import Group, Named, Settings

DataPath = Annotated[Path, AfterValidator(partial(named_in, Path()))]
"""A path as it is named from the working folder."""
NOT_IN_FILES: Final = {
    *("name", "class_word", "data", "masks", "base", "instance_prompt", "skip_bad", "license", "author"),
    *("preview_every", "save_every", "tracker", "prior.data", "prior.prompt", "captions.synonyms"),
}
"""Settings that do not stand in a concept file by their dotted names."""
MAX_GROUPS: Final = 4
"""Dots in a key that count; there are no such depths."""


class WordSettings(Group):
    """The concept's words."""

    rate: float = Field(1e-3, ge=0, le=1, description="Learning rate of the words' vectors.")
    sigma: float = Field(0.013, ge=0, le=10, description="Spread of a random word's start.")
    norm_limit: float = Field(0.55, gt=0, description="The words stop moving once their mean length reaches this.")
    density_weight: float = Field(
        0.0, ge=0, description="Keeps the vectors where the base's own words are dense (the reference's: 2e-3)."
    )


class LoraSettings(Group):
    """The change of a part of the base."""

    rate: float = Field(1e-5, ge=0, le=1, description="Learning rate.")
    rank: int = Field(4, ge=1, le=256, description="Rank of the LoRA; of small layers, as much as they have.")
    alpha: float = Field(1.0, gt=0, le=100, description="Scale of the LoRA: W0 + alpha · up · down (not alpha / rank).")
    targets: str
    orthogonal_slice: int | None = Field(
        None,
        ge=0,
        description="Fix the down matrices to this slice of the shared orthogonal basis, one per concept; for fusion "
        "by the method orthogonal.",
    )


class TextEncoderSettings(LoraSettings):
    """The change of the text encoder."""

    targets: Literal["attention", "layers"] = Field(
        "attention", description="Attention only, or whole layers (with their feed-forward)."
    )


class UNetSettings(LoraSettings):
    """The change of the UNet."""

    rate: float = Field(1e-4, ge=0, le=1, description="Learning rate.")
    targets: Literal["keys-and-values", "attention", "feed-forward", "projections", "convolutions", "all"] = Field(
        "attention",
        description="Attention; or with the feed-forward; or with that and proj_in and proj_out; or with all that and the "
        "convolutions of resnets and samplers (LoCon); or every layer. keys-and-values: only what cross-attention makes "
        "of the words, where many concepts fit into one small model.",
    )
    drop_kv: float = Field(
        0.0, ge=0, le=1, description="Share of steps without the change of cross-attention's keys and values."
    )


class LossSettings(Group):
    """What is minimized."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="What the UNet says; auto: as its scheduler's configuration tells."
    )
    noise_offset: float = Field(0.01, ge=0, le=1, description="Shift of whole channels of noise.")
    min_snr: float | None = Field(None, gt=0, description="Gamma of min-SNR weighting (5 is usual); none: all equal.")
    masked: bool = Field(True, description="Where a picture has a mask, only what it covers counts.")
    attention_weight: float = Field(
        0.0, ge=0, description="Weight of attention regularization, for pictures with masks (the reference's: 0.01)."
    )
    full_identity: bool = Field(
        True, description="Regularized attention of the class word matches the mask; false: it only stays inside."
    )


class PictureSettings(Group):
    """How pictures are brought to size."""

    size: int | None = Field(None, ge=8, le=4096, description="Side in pixels; none: what the base was trained on.")
    fit: Literal["crop", "pad", "bucket"] = Field(
        "crop", description="Cut to a square, pad to one (padding does not count), or keep the shape in buckets."
    )
    crops: int = Field(
        1,
        ge=0,
        le=64,
        description="Cuts kept of each picture: 1 around the middle, more at random, 0 a new one every step.",
    )
    flip: bool = Field(False, description="Use mirrored pictures too.")
    alpha: Literal["fill", "mask"] = Field("fill", description="Transparency is filled with a colour, or is the mask.")
    background: str = Field("white", description="The colour that fills transparency.")


class CaptionSettings(Group):
    """How captions vary."""

    templates: Literal["none", "character", "object", "style", "scene"] = Field(
        "none", description="Replace captions by random ones for this kind of concept, as 'a rendering of a <name>'."
    )
    dropout: float = Field(0.0, ge=0, le=1, description="Share of pictures shown without any caption.")
    shuffle: bool = Field(False, description="Shuffle what stands between commas.")
    keep: int = Field(1, ge=0, description="How many of the first parts stay in place when shuffled.")
    synonyms: str | None = Field(
        None,
        max_length=1000,
        description="More words that captions may have for the class word, with commas between: dogs, puppy.",
    )


class OptimizerSettings(Group):
    """How the numbers move."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = Field(
        "adamw", description="adamw8bit needs bitsandbytes, prodigy needs prodigyopt (set all rates to 1 for it)."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's mean.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the mean of its squares.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="Share by which numbers shrink, times the rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this length.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Linear and cosine fall to 0.")
    warmup: int = Field(0, ge=0, description="Steps over which the rates rise from 0.")
    accumulate: int = Field(1, ge=1, le=1024, description="Batches per step.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of the running mean that is saved; 0: the last numbers.")


class PriorSettings(Group):
    """Pictures of the class word, which keep the base from forgetting it (Custom Diffusion §3.2, DreamBooth)."""

    weight: float = Field(0.0, ge=0, description="Weight of their loss; 0: none are used.")
    count: int = Field(50, ge=1, le=10_000, description="How many the base draws before the first step.")
    data: DataPath | None = Field(None, description="Folder of pictures to use instead.")
    prompt: str | None = Field(None, description="Their caption; default: a photo of a CLASS_WORD.")


class TuningSettings(Settings):
    """Settings of one concept. The defaults are the reference's for Stable Diffusion 1.x (Mix-of-Show §4.1)."""

    name: Annotated[str, Named(31)] = Field(description="The concept; prompts call it <name>.")
    class_word: str = Field(max_length=64, description="An ordinary word for what it is.")
    data: DataPath = Field(
        description="Folder of pictures, captions in .txt or .caption files beside them, metadata.jsonl or metadata.csv."
    )
    masks: DataPath | None = Field(None, description="Folder of masks with the pictures' names; default: DATA/../masks.")
    base: str = Field(
        "emojiland",
        description="Embedded base, diffusers folder, or hub id in the local cache, for the command line to load.",
    )
    instance_prompt: str | None = Field(
        None, description="Caption of pictures that have none; default: a photo of a <name>."
    )
    skip_bad: bool = Field(False, description="Leave out pictures that cannot be read instead of stopping.")

    method: Literal["ed-lora", "lora", "p-plus", "textual-inversion", "custom-diffusion"] = Field(
        "ed-lora", description="What is trained: words, and with them LoRA, or keys and values in full."
    )
    steps: int = Field(1000, ge=1, le=1_000_000, description="Steps of the optimizer.")
    epochs: int | None = Field(None, ge=1, le=1_000_000, description="Passes over all pictures; instead of steps.")
    batch_size: int = Field(4, ge=1, le=1024, description="Pictures per batch and process.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of everything random.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Of the base's weights and of what is computed; fp16 needs a GPU. What is trained is fp32."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time; on by default for SDXL.")

    words: WordSettings = WordSettings()
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    unet: UNetSettings = UNetSettings()
    loss: LossSettings = LossSettings()
    pictures: PictureSettings = PictureSettings()
    captions: CaptionSettings = CaptionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    prior: PriorSettings = PriorSettings()

    preview_every: int = Field(0, ge=0, description="Steps between preview grids; 0 for none.")
    save_every: int = Field(200, ge=0, description="Steps between checkpoints; 0 for none.")
    tracker: Literal["auto", "none", "tensorboard", "wandb", "trackio"] = Field(
        "auto", description="Where curves go; auto: tensorboard if installed."
    )

    license: str | None = Field(None, max_length=4000, description="Your terms, for the concept file.")
    author: str | None = Field(None, max_length=1000, description="Who made it, for the concept file.")

    @classmethod
    def known_keys(cls, problem: Mapping[str, Any]) -> Iterable[str]:
        """All keys, with their groups and without."""
        return {*(key for key, _ in dotted_keys()), *cls.model_fields}

    @property
    def placeholder(self) -> str:
        """How prompts call the concept."""
        return f"<{self.name}>"

    def steps_for(self, pictures: int, processes: int = 1) -> int:
        """Steps of a run over so many pictures: as given, or as many as make the epochs."""
        if self.epochs is None:
            return self.steps
        return max(1, -(-self.epochs * pictures // (self.batch_size * self.optimizer.accumulate * processes)))

    def for_file(self) -> dict[str, bool | int | float | str | None]:
        """The settings that may stand in a concept file, by dotted name: how it was trained, not where or by whom."""
        return {key: attrgetter(key)(self) for key, _ in dotted_keys() if key not in NOT_IN_FILES}


BASE_PRESETS: Final[dict[str, dict[str, Any]]] = {
    # A small model with large token vectors learns with larger steps, and knows too little to draw a new shape with
    # changed attention alone: details are made by the convolutions around it.
    "emojiland": {
        "steps": 250,
        "batch_size": 8,
        "words": {"rate": 5e-3, "sigma": 0.05, "norm_limit": 100.0},
        "text_encoder": {"rate": 3e-4},
        "unet": {"rate": 1.5e-3, "rank": 4, "targets": "convolutions"},
        "loss": {"noise_offset": 0.0},
        "optimizer": {"max_grad_norm": 8.0},  # of a loss that is summed over 8 channels
    },
}
"""What some bases need instead of the defaults."""

FAMILY_PRESETS: Final[dict[str, dict[str, Any]]] = {
    # 28 GB without, 9 with it, at a batch of four in half precision.
    "stable-diffusion-xl": {"gradient_checkpointing": True},
}
"""What bases of a family need instead of the defaults."""

METHOD_PRESETS: Final[dict[str, dict[str, Any]]] = {
    # Words alone have to carry everything, and learn without a limit.
    "p-plus": {"words": {"norm_limit": 1e4}},
    "textual-inversion": {"words": {"norm_limit": 1e4}},
    "custom-diffusion": {"prior": {"weight": 1.0}},
}
"""What some methods need instead of the defaults."""


def make_settings(table: Mapping[str, Any], source: str = "settings") -> TuningSettings:
    """Settings from a table of nested or dotted keys. Raises SettingsError naming the field and the nearest one.

    They hold what was given; what the base and the method need comes below it where the base is known, see
    `with_presets`.
    """
    return TuningSettings.of(nested(table), source)


def with_presets(settings: TuningSettings, base: str, family: str = "") -> TuningSettings:
    """The settings on top of what the method, and the base of this name and family, need.

    Presets hold where nothing was given. What is not known before a base is loaded is its family.
    """
    of_base = merged(FAMILY_PRESETS.get(family, {}), BASE_PRESETS.get(base, {}))
    preset = merged(of_base, METHOD_PRESETS.get(settings.method, {}))
    return TuningSettings(**merged(preset, settings.model_dump(exclude_unset=True)))


def several(
    table: Mapping[str, Any], options: Mapping[str, Any] | None = None, *, source: str = "settings"
) -> list[TuningSettings]:
    """The settings of each entry of the table's `concepts`, or else of the table itself; the options go on top of all.

    Raises SettingsError.
    """
    above = nested(options or {})
    if "concepts" not in table:
        return [make_settings(merged(nested(table), above), source)]
    shared = nested({key: value for key, value in table.items() if key != "concepts"})
    entries = table["concepts"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise SettingsError(f"{source}: 'concepts': expected a list of tables, found {shown(entries)}")
    made = [
        make_settings(merged(merged(shared, nested(entry)), above), f"{source}: concept {number}")
        for number, entry in enumerate(entries, 1)
    ]
    names = [one.name for one in made]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"{source}: two concepts are called {', '.join(sorted(twice))}")
    return made


def nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys opened up: {"unet.rank": 8} -> {"unet": {"rank": 8}}."""
    opened: dict[str, Any] = {}
    for key, value in table.items():
        *groups, last = str(key).split(".", MAX_GROUPS)
        entry: Any = {last: dict(value) if isinstance(value, Mapping) else value}
        for group in reversed(groups):
            entry = {group: entry}
        opened = merged(opened, entry)
    return opened


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables, the second on top of the first."""
    table = dict(below)
    for key, value in above.items():
        under = table.get(key)
        table[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return table


def dotted_keys(model: type[BaseModel] = TuningSettings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name with its pydantic field."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from dotted_keys(field.annotation, f"{prefix}{key}.")
        else:
            yield prefix + key, field


def printed(settings: TuningSettings) -> str:
    """The whole configuration as YAML with a comment on every key; reading it back gives equal settings."""
    import yaml

    lines: list[str] = []

    def add(group: BaseModel, indent: str) -> None:
        for key, field in type(group).model_fields.items():
            value = getattr(group, key)
            if isinstance(value, BaseModel):
                lines.append(f"{indent}{key}:")
                add(value, indent + "  ")
                continue
            plain = str(value) if isinstance(value, Path) else value
            text = yaml.safe_dump({key: plain}, allow_unicode=True, width=1000).strip()
            lines.append(f"{indent}{text}" + (f"  # {field.description}" if field.description else ""))

    add(settings, "")
    return "\n".join(lines) + "\n"


def schema() -> str:
    """JSON Schema of a configuration, for editors; `concepts` may list several."""
    table = TuningSettings.model_json_schema()
    table["properties"]["concepts"] = {"type": "array", "description": "Several concepts, each on top of the rest."}
    table["required"] = []  # they may stand in each entry of `concepts`, or on the command line
    return json.dumps(table, indent=1) + "\n"
