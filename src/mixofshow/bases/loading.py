"""Loading base models, and telling them apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from mixofshow.bases.configs import check_configs
from mixofshow.bases.families import clip_skips, family_of, skip_text_layers, takes_masks, text_encoders
from mixofshow.bases.originals import predict_as_told
from mixofshow.bases.parts import exclusive, glimpse, own_tensors, plain
from mixofshow.bases.strangers import quiet, strangers_model
from mixofshow.bases.weight_files import SUFFIX, check_weights, load_checkpoint
from mixofshow.errors import BaseModelError, ResourceError, SettingsError, ours, shown
from mixofshow.files import raw
from mixofshow.reading import named_in

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
_KNOWN: Final[WeakKeyDictionary[Any, tuple[str, str]]] = WeakKeyDictionary()
"""What UNets' bases looked like when their fingerprint was taken, and that."""
REHEARSED_STEPS: Final = 4
SISTER: Final = "sister"
"""Another base of the same family and shapes, whose concepts are taken if this is allowed."""
LONGEST_NAME: Final = 128
"""Characters of a base's name in our files."""
_PLAIN_NAME: Final = re.compile(r"[^/\\.~][^/\\]*(/[^/\\.][^/\\]*)?")


@quiet()
def load_base(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    variant: str | None = None,
    config: str | Path | None = None,
    prediction: str | None = None,
    clip_skip: int | str | Sequence[int] | None = None,
    allow_base: str | None = None,
    download: bool = False,
) -> Any:
    """A base model as an ordinary diffusers pipeline, on one device, without safety checker.

    `name` is the name of an embedded base, a diffusers folder, one `.safetensors` file in the original layout (for
    `config` see `load_checkpoint`), or a hub id: one that is already in the local cache, unless `download` is asked for.
    `dtype` may also be a name: fp32, bf16 or fp16. `variant` is that of the weight files, such as fp16. `prediction` is
    what its UNet predicts, epsilon or v_prediction, where neither its configuration nor the file says so. `clip_skip`
    leaves out as many of the text encoders' last layers, or of each, as (0, 1). With `allow_base` "sister", concepts that
    were made for another base of its family and shapes are taken, with a warning. Raises BaseModelError, and SettingsError
    for an unknown dtype or device.
    """
    dtype, device, clip_skip = _dtype(dtype), device_of(device), clip_skips(clip_skip)
    if allow_base not in (None, SISTER):
        raise SettingsError(f"`allow_base`: expected {SISTER}, found '{shown(allow_base)}'")
    name = named_in(Path(), name) if str(name).startswith("~") else name
    # bfloat16 has too few digits to tell base models apart: that is done with those of half precision.
    precise = torch.float16 if dtype == torch.bfloat16 else dtype
    with strangers_model(f"{name}: could not be loaded as a base model"):
        if Path(name).suffix == SUFFIX:
            pipeline = load_checkpoint(Path(name), config, dtype=precise, download=download)
        else:
            pipeline = _from_folder(name, dtype=precise, variant=variant, download=download)
        predict_as_told(pipeline, prediction, str(name))
        skip_text_layers(pipeline, clip_skip)
        _require_whole(pipeline, name)
        _rehearse(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline, pipeline.unet, pipeline.vae):
        # diffusers notes the folder here, and would write it into every model saved from this one.
        part.register_to_config(_name_or_path=_public_name(name))
    for part in (pipeline.unet, pipeline.vae, *(one.model for one in text_encoders(pipeline))):
        part.requires_grad_(False).eval()
    pipeline.unet.takes_sisters = allow_base == SISTER
    exact = fingerprint(pipeline) if precise != dtype else None
    pipeline = pipeline.to(device, dtype)
    if exact:
        pipeline.unet.fingerprint_of_rounded = {_hash_of_weights(pipeline): exact}
    return pipeline


def _dtype(named: torch.dtype | str) -> torch.dtype:
    if isinstance(named, torch.dtype):
        return named
    if named not in DTYPES:
        raise SettingsError(f"dtype: expected one of {', '.join(DTYPES)}, found '{shown(named)}'")
    return DTYPES[named]


def device_of(named: str | torch.device) -> torch.device:
    """The device of that name. Raises SettingsError for one that torch does not know, or that this machine has not."""
    try:
        device = torch.device(named)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(machine := ours(error), ResourceError):
            raise machine from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"device '{shown(named)}': torch cannot use it here ({shown(reason, 120)}); expected cpu, cuda, cuda:1, mps or "
            "the like"
        ) from error
    return device


def _from_folder(name: str | Path, *, dtype: torch.dtype, variant: str | None, download: bool) -> Any:
    """From an embedded base, a folder, or the hub's cache, its weight files checked first."""
    import diffusers

    folder = Path(EMBEDDED.get(str(name), name))
    if isinstance(name, Path) and not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{name}: not a diffusers folder, there is no model_index.json in it")
    if any(mark in str(name) for mark in "/\\.") and not folder.exists() and not _looks_like_hub_id(str(name)):
        raise BaseModelError(f"{name}: no such folder; give a diffusers folder or one of {', '.join(EMBEDDED)}")
    which = {"variant": variant, "local_files_only": not download}
    if not folder.exists():
        folder = _from_hub(str(name), which)
    family = check_configs(folder, name)
    check_weights(folder, name, variant)
    # An inpainting base too is a pipeline of its family.
    return getattr(diffusers, family.pipeline_class).from_pretrained(
        str(folder),
        dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
        use_safetensors=True,  # a pickle could run code
        **which,
    )


def _from_hub(name: str, which: dict[str, Any]) -> Path:
    """The folder in the local cache, of safetensors alone."""
    from diffusers import DiffusionPipeline

    with strangers_model(f"{name}: could not be fetched"):
        try:
            return Path(DiffusionPipeline.download(name, safety_checker=None, use_safetensors=True, **which))
        except (OSError, ValueError) as error:
            if not which["local_files_only"]:
                raise
            raise BaseModelError(f"{name}: not in the local cache, or not whole; `download` fetches it") from error


def _require_whole(pipeline: Any, name: str | Path) -> None:
    """Raise BaseModelError unless the pipeline has all that we use of it, with all its weights, and the parts fit."""
    encoders = text_encoders(pipeline)
    needed = ("unet", "vae", "scheduler", *(part for pair in family_of(pipeline).text_encoders for part in pair))
    if missing := [part for part in needed if getattr(pipeline, part, None) is None]:
        raise BaseModelError(f"{name}: the base model has no {', '.join(missing)}")
    for part in ("unet", "vae", *(one.part for one in encoders)):
        for key, tensor in getattr(pipeline, part).state_dict().items():
            if tensor.is_meta:
                raise BaseModelError(
                    f"{name}: {part}: its file has no tensor '{shown(key)}', which its config.json asks for"
                )
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if unet.sample_size is None:
        raise BaseModelError(f"{name}: unet: sample_size: expected a number, found null")
    for what, found, expected in (
        ("unet: cross_attention_dim", unet.cross_attention_dim, sum(one.width for one in encoders)),
        ("unet: in_channels", unet.in_channels, (1 + takes_masks(pipeline)) * vae.latent_channels + takes_masks(pipeline)),
        ("unet: out_channels", unet.out_channels, vae.latent_channels),
        ("vae: in_channels", vae.in_channels, 3),
        ("vae: out_channels", vae.out_channels, 3),
    ):
        if found != expected:
            raise BaseModelError(
                f"{name}: {what}: expected {expected}, as the other parts have it, found {shown(found)}"
            )
    for one in encoders:
        if (last := max(one.tokenizer.get_vocab().values(), default=0)) >= one.first_id:
            raise BaseModelError(f"{name}: its tokenizer knows a token {last}, {one.part} only {one.first_id}")


def _rehearse(pipeline: Any) -> None:
    """Draw a few steps without the networks: what the scheduler's configuration and the tokenizers say works together."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(REHEARSED_STEPS)
    latents = torch.ones(1, 1, 8, 8)
    with torch.random.fork_rng(devices=[]):  # some schedulers add noise
        for time in scheduler.timesteps:
            scheduler.scale_model_input(latents, time)
            latents = scheduler.step(torch.ones_like(latents), time, latents).prev_sample
    if not torch.isfinite(latents).all():
        raise ValueError("its scheduler makes latents that are not finite")
    for one in text_encoders(pipeline):
        one.tokenizer("a photo")
        one.tokenizer("a photo", padding="max_length", max_length=one.length, truncation=True)


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
    named = pipeline.config.get("_name_or_path") or "unnamed"  # diffusers itself notes the whole path
    return _public_name(named)[:LONGEST_NAME]


def _public_name(name: str | Path) -> str:
    is_hub_id = not Path(name).exists() and _looks_like_hub_id(str(name))
    return str(name) if is_hub_id else Path(name).name.removesuffix(SUFFIX)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def fingerprint(pipeline: Any) -> str:
    """16 hex digits that tell base models apart: a hash of a fixed set of weights, taken in half precision.

    Half precision makes the same model loaded as fp16 or fp32 give the same digits; what `load_base` loads in bfloat16
    remembers them, as long as nobody changes it. Adapters that are attached do not count. Weights that are as they were
    last time are not hashed again.
    Raises BaseModelError for what was made bfloat16, or changed in it, by others.
    """
    found = _hash_of_weights(pipeline)
    if pipeline.unet.dtype != torch.bfloat16:
        return found
    known: dict[str, str] = getattr(pipeline.unet, "fingerprint_of_rounded", {})
    if found not in known:
        raise BaseModelError(
            f"{base_name(pipeline)}: its weights in bfloat16 cannot tell it from others; load it by load_base(..., "
            "dtype=torch.bfloat16), and change none of them"
        )
    return known[found]


def _hash_of_weights(pipeline: Any) -> str:
    digest = hashlib.sha256()
    with exclusive(pipeline):
        parts = (*(one.model for one in text_encoders(pipeline)), pipeline.unet)
        named = [one for part in parts for one in own_tensors(part) if any(mark in one[0] for mark in FINGERPRINTED)]
        seen, unet = glimpse(named), plain(pipeline.unet)
        if _KNOWN.get(unet, ("", ""))[0] == seen:
            return _KNOWN[unet][1]
        for name, tensor in named:
            digest.update(f"{name.removeprefix('text_model.')} {tuple(tensor.shape)}".encode())
            digest.update(raw(tensor.half()))
        found = digest.hexdigest()[:16]
        _KNOWN[unet] = seen, found
    return found


def scheduler_settings(pipeline: Any) -> dict[str, Any]:
    """The kind and settings of what draws a pipeline's pictures; others draw other pictures."""
    config = json.loads(pipeline.scheduler.to_json_string())
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
