"""How much a layer's adapter counts: alpha over rank, as its own tensor says or peft's configuration does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mixofshow.errors import ConceptFileError, shown
from mixofshow.reading import parse_json, read_bytes

METADATA: Final = "lora_adapter_metadata"
"""Where diffusers notes peft's configuration, each key with its part in front, as `unet.lora_alpha`."""
WEIGHTS, BESIDE = "adapter_model", "adapter_config.json"
"""What peft calls a folder's weights and the configuration beside them."""
LARGEST: Final = 1e6
_MOVES_THE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that also take from the base what the factors begin with, as it is in no file."""
_LITERAL: Final = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")


@dataclass(frozen=True)
class Scales:
    """What is known of peft's configuration, by part of the pipeline; that of "" holds for every part."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def said(self) -> bool:
        """Whether any configuration says an alpha."""
        return any({"alpha", "lora_alpha"} & config.keys() for config in self.configs.values())

    def of(self, layer: str, parts: Mapping[str, Tensor], rank: int | None) -> float:
        """The scale of our layer: by its own alpha, else the configuration's, else 1. Raises ValueError."""
        if "alpha" in parts:
            return _own(parts["alpha"]) / rank if rank else 1.0
        part, path = layer.split(".", 1)
        config = self.configs.get(part) or self.configs.get("", {})
        divisor = rank or _number(config, "r", 1)
        alpha = _number(config, "lora_alpha" if "lora_alpha" in config else "alpha", divisor)
        patterns = config.get("alpha_pattern") or {}
        for pattern in patterns if isinstance(patterns, dict) else ():
            if _matches(pattern, path):
                alpha = _number(patterns, pattern, divisor)
                break
        return alpha / (math.sqrt(divisor) if config.get("use_rslora") is True else divisor)


def scales_of(file: str, texts: Mapping[str, str]) -> Scales:
    """From a file's metadata, or for peft's own files from the configuration beside it. Raises ConceptFileError."""
    scales = _read_scales(file, texts)
    for config in scales.configs.values():
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.startswith(_MOVES_THE_BASE):
            raise ConceptFileError(
                f"{file}: its factors began as parts of the base ({shown(begun)}), which they change less than they say; have "
                "peft save it with `path_initial_model_for_weight_conversion`, as a LoRA for any base"
            )
    return scales


def _read_scales(file: str, texts: Mapping[str, str]) -> Scales:
    if METADATA in texts:
        table = parse_json(texts[METADATA], f"{file}: metadata '{METADATA}'", ConceptFileError)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in table.items() if isinstance(table, dict) else ():
            part, _, name = key.partition(".")
            configs.setdefault(part, {})[name] = value
        return Scales(configs)
    beside = Path(file).with_name(BESIDE)
    if Path(file).stem == WEIGHTS and beside.is_file():
        table = parse_json(read_bytes(beside, 2**20), str(beside), ConceptFileError)
        return Scales({"": table} if isinstance(table, dict) else {})
    return Scales()


def _own(alpha: Tensor) -> float:
    if alpha.numel() != 1 or alpha.is_complex() or not abs(float(alpha)) <= LARGEST:
        raise ValueError(f"expected alpha to be one finite number of at most {LARGEST:g}")
    return float(alpha)


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"expected {name} to be a finite number of at most {LARGEST:g}, found {shown(value)}")
    if name == "r" and value <= 0:
        raise ValueError(f"expected a rank r above 0, found {value}")
    return value


def _matches(pattern: str, path: str) -> bool:
    """Whether a module's path ends with what the pattern names, as peft has it. A stranger's regular expression is not
    run: some take for ever. Raises ValueError for one that is more than a name."""
    found = _LITERAL.fullmatch(pattern)
    if found is None:
        raise ValueError(f"alpha_pattern: '{shown(pattern)}' is a regular expression; only names are followed")
    return f".{path}".endswith("." + found[1].replace("\\.", "."))
