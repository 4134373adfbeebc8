"""What a model in one file does not hold and the package carries: CLIP's vocabulary, configurations of the usual kinds.

And what such a file says of itself beside its weights: what its UNet predicts.
"""

from __future__ import annotations

import gzip
import inspect
import logging
import re
from pathlib import Path
from typing import Any, Final

import torch

from mixofshow.errors import BaseModelError, SettingsError, shown
from mixofshow.files import TensorFile

logger = logging.getLogger(__name__)

FOLDER: Final = Path(__file__).parent / "original"
_KINDS: Final = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
"""Our folder of configurations by the hub id that diffusers takes for usual."""
_WIDE: Final = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
}
"""By which the full-sized models are known from smaller ones under the same names."""
_PADDING: Final = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""Of each of their tokenizers."""
PREDICTIONS: Final = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What a UNet predicts, noise or v, as diffusers calls it, by its names in files and options."""


PREDICTION: Final = "modelspec.prediction_type"
"""Where a file's metadata say it."""
_CALLED_V: Final = re.compile(r"v[-_ ]?pred", re.IGNORECASE)


def usual_id(file: TensorFile) -> str:
    """The hub id that is usual for a file of such weights."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = {name: torch.empty(shape, device="meta") for name, shape in file.shapes().items()}
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def carried(kind: str, file: TensorFile) -> Path | None:
    """The package's folder of configurations for such a hub id, if the file's sizes are the usual ones."""
    shapes = file.shapes()
    fits = all(shapes.get(name, shape) == shape for name, shape in _WIDE.items())
    return FOLDER / _KINDS[kind] if kind in _KINDS and fits else None


def carried_tokenizers(folder: Path) -> dict[str, Any]:
    """The tokenizers that belong to one of the package's folders, by their parts of the pipeline; none to others."""
    if folder.parent != FOLDER:
        return {}
    from transformers import CLIPTokenizer

    with gzip.open(FOLDER / "clip-merges.txt.gz", "rt", encoding="utf-8") as file:
        merges = [(left, right) for left, right in (line.split() for line in file)]
    letters = list(_letters())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    ids = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    made = (
        CLIPTokenizer(vocab=ids, merges=merges, pad_token=padding, model_max_length=77)  # type: ignore[arg-type]
        for padding in _PADDING[folder.name]
    )
    return dict(zip(("tokenizer", "tokenizer_2"), made, strict=False))


def _letters() -> str:
    """What byte-level BPE writes for each byte, printable ones first, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return "".join(map(chr, [*printable, *range(256, 512 - len(printable))]))


def follow(pipeline: Any, file: TensorFile, source: str) -> None:
    """Let the scheduler be what the file says: v-prediction, zero terminal SNR. Said where the configuration differs."""
    if any(name.startswith("edm_") for name in file.shapes()):
        raise BaseModelError(f"{source}: its UNet predicts as EDM does, which is not supported; epsilon and v are")
    noted = file.metadata.get(PREDICTION)
    found = "v_prediction" if "v_pred" in file else PREDICTIONS.get(str(noted))
    if found is None and noted is not None:
        logger.warning("%s: its prediction type '%s' is not known; `prediction` sets it", source, shown(noted, 40))
    predict(pipeline, found, source, zero_snr="ztsnr" in file)


def predict_as_told(pipeline: Any, prediction: str | None, name: str) -> None:
    """As `predict`. Without being told, say where a base called one of v-prediction is read as one of noise."""
    predict(pipeline, prediction, name)
    own = pipeline.scheduler.config.get("prediction_type")
    if prediction is None and own == "epsilon" and _CALLED_V.search(Path(name).name):
        logger.warning("%s: called v-prediction, but read as epsilon; `prediction` v_prediction sets it", name)


def predict(pipeline: Any, prediction: str | None, source: str, *, zero_snr: bool = False) -> None:
    """Give the pipeline the scheduler of a UNet that predicts so, down to a last time step of noise alone (`zero_snr`).

    Raises SettingsError for an unknown prediction. (Lin et al. 2023, arXiv:2305.08891.)
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise SettingsError(f"prediction: expected one of {', '.join(PREDICTIONS)}, found '{shown(prediction)}'")
    config, kind = pipeline.scheduler.config, type(pipeline.scheduler)
    wanted: dict[str, Any] = {"prediction_type": PREDICTIONS[prediction]} if prediction else {}
    if zero_snr:
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            from diffusers import DDIMScheduler

            kind = DDIMScheduler
    changed = {key: value for key, value in wanted.items() if config.get(key) != value}
    if not changed:
        return
    pipeline.scheduler = kind.from_config(config, **changed)
    said = ", ".join(f"{key} {value} (not {config.get(key)})" for key, value in changed.items())
    logger.warning("%s: followed, against its configuration: %s", source, said)
