"""Settings that can never work together or on a device, and settings that do nothing beside the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, Final

from pydantic import BaseModel

from mixofshow.errors import SettingsError, shown
from mixofshow.images import colour_of
from mixofshow.tuning.adapters import METHODS
from mixofshow.tuning.settings import TuningSettings, dotted_keys

WORDS_ONLY: Final = ("p-plus", "textual-inversion")
_LAYERS: Final = ("rank", "alpha", "targets", "orthogonal_slice")


def tracker_of(settings: TuningSettings) -> str:
    """Where curves go, or "none"."""
    return {"auto": "tensorboard" if find_spec("tensorboard") else "none"}.get(settings.tracker, settings.tracker)


def refuse_impossible(settings: TuningSettings, device: str) -> None:
    """Raise SettingsError for what can never be done on a kind of device (cpu, cuda …), before anything is loaded."""
    if settings.precision == "fp16" and device == "cpu":
        raise SettingsError("precision fp16: needs a GPU, this run is on the CPU; take bf16 or fp32")
    colour_of(settings.pictures.background)
    if (tracker := tracker_of(settings)) != "none" and not find_spec(tracker):
        raise SettingsError(f"tracker {tracker} is not installed: pip install {tracker}")
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(settings.optimizer.name)
    if package and not find_spec(package):
        raise SettingsError(f"optimizer {settings.optimizer.name} is not installed: pip install {package}")
    _refuse_learning_nothing(settings)
    if settings.optimizer.name == "prodigy" and len(rates := _rates(settings)) > 1:
        raise SettingsError(
            f"optimizer prodigy: takes one rate for all, found {', '.join(f'{rate:g}' for rate in rates)}; set "
            "words.rate, text_encoder.rate and unet.rate to 1"
        )


def _rates(settings: TuningSettings) -> list[float]:
    """The different rates above 0 of what is trained."""
    parts = {"custom-diffusion": [settings.unet], **{method: [] for method in WORDS_ONLY}}  # beside the words
    trained = parts.get(settings.method, [settings.text_encoder, settings.unet])
    return sorted({settings.words.rate, *(part.rate for part in trained)} - {0})


def _refuse_learning_nothing(settings: TuningSettings) -> None:
    if not _rates(settings):
        raise SettingsError("words.rate, text_encoder.rate and unet.rate: all are 0, so nothing is trained; raise one")
    if settings.captions.dropout == 1:
        raise SettingsError("captions.dropout 1: no caption is ever shown, so no word is learned; give less than 1")
    if set("<>") & set(settings.class_word):
        raise SettingsError(
            f"class_word '{shown(settings.class_word)}': an ordinary word of the base's, which has no brackets; give "
            f"'{shown(settings.class_word.strip('<>'))}'"
        )


def slow_precision(settings: TuningSettings, device: str) -> str | None:
    """What there is to say of a precision that this CPU has no instructions for."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if settings.precision != "bf16" or device != "cpu" or "AVX512" in capability or "AMX" in capability:
        return None
    return (
        f"precision bf16: this CPU ({capability}) has no instructions for it; a product of matrices takes "
        f"{_times_as_long(torch.bfloat16):.1f} times as long here as in fp32"
    )


def _times_as_long(dtype: Any) -> float:
    """A product of matrices in a precision over the same in single, by the clock."""
    import torch

    def seconds(kind: Any) -> float:
        one, tried = torch.ones(256, 256, dtype=kind), []
        for _ in range(5):  # the first may prepare something, and others may be at work
            started = time.perf_counter()
            one @ one
            tried.append(time.perf_counter() - started)
        return min(tried)

    return seconds(dtype) / seconds(torch.float32)


_Idle = Callable[[TuningSettings], bool]
IDLE: Final[dict[str, tuple[str, _Idle]]] = {
    "steps": ("epochs say how long", lambda one: one.epochs is not None),
    "words.sigma": (
        "no word of method {method} starts at random",
        lambda one: "random" not in METHODS[one.method].starts,
    ),
    "loss.full_identity": ("loss.attention_weight is 0", lambda one: not one.loss.attention_weight),
    "pictures.crops": ("pictures.fit is {pictures.fit}", lambda one: one.pictures.fit != "crop"),
    "captions.keep": ("captions.shuffle is off", lambda one: not one.captions.shuffle),
    "captions.shuffle": ("captions.templates replace all captions", lambda one: one.captions.templates != "none"),
    "captions.synonyms": ("captions.templates replace all captions", lambda one: one.captions.templates != "none"),
    "instance_prompt": ("captions.templates replace all captions", lambda one: one.captions.templates != "none"),
    "prior.count": (
        "prior.weight is 0, or prior.data is given",
        lambda one: not one.prior.weight or bool(one.prior.data),
    ),
    "prior.data": ("prior.weight is 0", lambda one: not one.prior.weight),
    "prior.prompt": ("prior.weight is 0", lambda one: not one.prior.weight),
    "text_encoder.rate": ("method {method} leaves it as it is", lambda one: one.method not in ("ed-lora", "lora")),
    "unet.rate": ("method {method} leaves it as it is", lambda one: one.method in WORDS_ONLY),
    "unet.drop_kv": ("method {method} leaves them as they are", lambda one: one.method in WORDS_ONLY),
    **{
        f"{part}.{key}": ("method {method} trains no LoRA", lambda one: one.method not in ("ed-lora", "lora"))
        for part in ("text_encoder", "unet")
        for key in _LAYERS
    },
}
"""By setting, why it does nothing, and when."""


def idle(settings: TuningSettings) -> list[str]:
    """A line for each setting that was given, is not as without it, and does nothing beside the others."""
    found = []
    for key, field in dotted_keys():
        group, _, last = key.rpartition(".")
        owner: BaseModel = attrgetter(group)(settings) if group else settings
        given = last in owner.model_fields_set and getattr(owner, last) != field.default
        if key in IDLE and given and IDLE[key][1](settings):
            why = IDLE[key][0].replace("{method}", settings.method).replace("{pictures.fit}", settings.pictures.fit)
            found.append(f"{key} does nothing: {why}")
    return found
