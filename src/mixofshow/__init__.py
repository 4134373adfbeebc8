"""Tune concepts, fuse them, and draw them together, each where it was put (Mix-of-Show, NeurIPS 2023).

from mixofshow import load_base, tune, fuse, load_concept, MixOfShowPipeline, Region
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mixofshow.bases.loading import load_base
    from mixofshow.concepts.concept import Concept, load_concept
    from mixofshow.concepts.model import ConceptModel, load_model, load_unfused
    from mixofshow.errors import MixOfShowError
    from mixofshow.fusion.settings import FusionSettings
    from mixofshow.fusion.stages import fuse
    from mixofshow.sampling.pipeline import MixOfShowPipeline
    from mixofshow.sampling.redo import redo
    from mixofshow.sampling.settings import Region
    from mixofshow.tuning.settings import TuningSettings, make_settings
    from mixofshow.tuning.trainer import tune

__version__ = "0.1.0"
__all__ = [
    "Concept",
    "ConceptModel",
    "FusionSettings",
    "MixOfShowError",
    "MixOfShowPipeline",
    "Region",
    "TuningSettings",
    "fuse",
    "load_base",
    "load_concept",
    "load_model",
    "load_unfused",
    "make_settings",
    "redo",
    "tune",
]

_HOMES: Final = {
    "load_base": "bases.loading",
    "Concept": "concepts.concept",
    "load_concept": "concepts.concept",
    "ConceptModel": "concepts.model",
    "load_model": "concepts.model",
    "load_unfused": "concepts.model",
    "MixOfShowError": "errors",
    "FusionSettings": "fusion.settings",
    "fuse": "fusion.stages",
    "MixOfShowPipeline": "sampling.pipeline",
    "redo": "sampling.redo",
    "Region": "sampling.settings",
    "TuningSettings": "tuning.settings",
    "make_settings": "tuning.settings",
    "tune": "tuning.trainer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import mixofshow` costs nothing, torch and diffusers seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mixofshow' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mixofshow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, which are not here before they are used."""
    return [*__all__, "__version__"]
