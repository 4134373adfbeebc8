"""Loading base models, and telling them apart."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from mixofshow.bases.checkpoints import SUFFIX, check_weights, load_checkpoint
from mixofshow.bases.families import family_of, text_encoders
from mixofshow.errors import BaseModelError, SettingsError, shown
from mixofshow.files import raw

EMBEDDED: Final = {"emojiland": Path(__file__).parent / "emojiland" / "weights"}
"""Base models that ship with the package."""
EMBEDDED_CONTROLS: Final = {
    f"emojiland-{kind}": Path(__file__).parent / "emojiland" / "controls" / kind
    for kind in ("t2i-adapter", "controlnet")
}
"""Controls that ship with the package, for `mixofshow.sampling.controls.load_control`."""
USUAL_GUIDANCE: Final = 7.5
GUIDANCE: Final = {"emojiland": 2.0}
"""How much classifier-free guidance a base is drawn with, where that is not the usual: small ones overdo it soon."""
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights are kept as, by the names that settings and options have for it."""

FINGERPRINTED: Final = ("conv_in", "conv_out", "mid_block", "final_layer_norm")
_PLAIN_NAME: Final = re.compile(r"[^/\\.~][^/\\]*(/[^/\\.][^/\\]*)?")


def load_base(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    variant: str | None = None,
    config: str | Path | None = None,
    download: bool = False,
) -> Any:
    """A base model as an ordinary diffusers pipeline, on one device, without safety checker.

    `name` is the name of an embedded base, a diffusers folder, one `.safetensors` file in the original layout (for
    `config` see `load_checkpoint`), or a hub id: one that is already in the local cache, unless `download` is asked for.
    `dtype` may also be a name: fp32, bf16 or fp16. `variant` is that of the weight files, such as fp16. Raises
    BaseModelError, and SettingsError for an unknown dtype.
    """
    _quiet()
    dtype = _dtype(dtype)
    # bfloat16 has too few digits to tell base models apart: that is done with those of half precision.
    precise = torch.float16 if dtype == torch.bfloat16 else dtype
    try:
        if Path(name).suffix == SUFFIX:
            pipeline = load_checkpoint(Path(name), config, dtype=precise, download=download)
        else:
            pipeline = _from_folder(name, dtype=precise, variant=variant, download=download)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"{name}: could not be loaded as a base model ({reason})") from error
    _require_whole(pipeline, name)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline, pipeline.unet, pipeline.vae):
        # diffusers notes the folder here, and would write it into every model saved from this one.
        part.register_to_config(_name_or_path=_public_name(name))
    for part in (pipeline.unet, pipeline.vae, *(one.model for one in text_encoders(pipeline))):
        part.requires_grad_(False).eval()
    if precise != dtype:
        pipeline.unet.fingerprint_of_base = fingerprint(pipeline)
    return pipeline.to(device, dtype)


def _dtype(named: torch.dtype | str) -> torch.dtype:
    if isinstance(named, torch.dtype):
        return named
    if named not in DTYPES:
        raise SettingsError(f"dtype: expected one of {', '.join(DTYPES)}, found '{shown(named)}'")
    return DTYPES[named]


def _quiet() -> None:
    # Loading a tiny model takes a second; importing diffusers takes four, so only those who load pay for it.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _from_folder(name: str | Path, *, dtype: torch.dtype, variant: str | None, download: bool) -> Any:
    """From an embedded base, a folder, or the hub's cache, its weight files checked first."""
    from diffusers import DiffusionPipeline

    folder = Path(EMBEDDED.get(str(name), name))
    if isinstance(name, Path) and not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{name}: not a diffusers folder, there is no model_index.json in it")
    if any(mark in str(name) for mark in "/\\.") and not folder.exists() and not _looks_like_hub_id(str(name)):
        raise BaseModelError(f"{name}: no such folder; give a diffusers folder or one of {', '.join(EMBEDDED)}")
    which = {"variant": variant, "local_files_only": not download}
    if not folder.exists():
        folder = Path(DiffusionPipeline.download(str(name), safety_checker=None, **which))
    check_weights(folder, name, variant)
    return DiffusionPipeline.from_pretrained(
        str(folder), dtype=dtype, safety_checker=None, requires_safety_checker=False, **which
    )


def _require_whole(pipeline: Any, name: str | Path) -> None:
    """Raise BaseModelError unless the pipeline is of a known family and has all that we use of it."""
    needed = ("unet", "vae", "scheduler", *(part for pair in family_of(pipeline).text_encoders for part in pair))
    if missing := [part for part in needed if getattr(pipeline, part, None) is None]:
        raise BaseModelError(f"{name}: the base model has no {', '.join(missing)}")


def load_named_base(name: str, given: str | Path | None, source: str, **options: Any) -> Any:
    """The base that a file of ours names, or the `given` one instead; `options` are `load_base`'s.

    Raises BaseModelError that says how to give it. A stranger's file can name no folder elsewhere on this machine.
    """
    if given is not None:
        return load_base(given, **options)
    way_out = f"{source}: was made on base '{shown(name)}', which is not here by that name; give its folder as the base"
    if not _PLAIN_NAME.fullmatch(name):
        raise BaseModelError(way_out)
    try:
        return load_base(name, **{**options, "download": False})
    except BaseModelError as error:
        raise BaseModelError(way_out) from error


def base_name(pipeline: Any) -> str:
    """What others can call this base: an embedded base, a hub id, or the last part of a folder's path."""
    return str(pipeline.config.get("_name_or_path") or "unnamed")


def _public_name(name: str | Path) -> str:
    is_hub_id = not Path(name).exists() and _looks_like_hub_id(str(name))
    return str(name) if is_hub_id else Path(name).name.removesuffix(SUFFIX)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def fingerprint(pipeline: Any) -> str:
    """16 hex digits that tell base models apart: a hash of a fixed set of weights, taken in half precision.

    Half precision makes the same model loaded as fp16 or fp32 give the same digits; what `load_base` loads in bfloat16
    remembers them. Raises BaseModelError for what was made bfloat16 by others.
    """
    if pipeline.unet.dtype == torch.bfloat16:
        if (known := getattr(pipeline.unet, "fingerprint_of_base", None)) is None:
            raise BaseModelError(
                f"{base_name(pipeline)}: its weights in bfloat16 cannot tell it from others; load it by load_base(..., "
                "dtype=torch.bfloat16)"
            )
        return str(known)
    digest = hashlib.sha256()
    for part in (*(one.model for one in text_encoders(pipeline)), pipeline.unet):
        for name, tensor in sorted(part.state_dict().items()):
            if any(mark in name for mark in FINGERPRINTED):
                digest.update(f"{name.removeprefix('text_model.')} {tuple(tensor.shape)}".encode())
                digest.update(raw(tensor.half()))
    return digest.hexdigest()[:16]


def scheduler_settings(pipeline: Any) -> dict[str, Any]:
    """The kind and settings of what draws a pipeline's pictures; others draw other pictures."""
    config = json.loads(pipeline.scheduler.to_json_string())
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
