"""Weight files of base models: checked before a library opens them; and whole models in one file.

Such a file has the layout of the original code, as the community shares them (`model.diffusion_model.…`). It holds
weights alone: configurations and tokenizer come from the package, or from a diffusers folder of the same kind.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Final

import torch

from mixofshow.bases.configs import INDEX, check_configs
from mixofshow.bases.families import FAMILIES
from mixofshow.bases.originals import carried, carried_tokenizers, follow, usual_id
from mixofshow.errors import BadInputError, BaseModelError, ConceptFileError, shown
from mixofshow.files import TensorFile
from mixofshow.reading import read_json

SUFFIX: Final = ".safetensors"
PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ORIGINAL: Final = "model.diffusion_model.input_blocks.0.0.weight"
_LEFT_OUT: Final = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
_PARTS: Final = {"unet", "vae", *(part for family in FAMILIES for part, _ in family.text_encoders)}


def is_checkpoint(path: Path) -> bool:
    """Whether this is a whole base model in one file, as far as its header tells."""
    try:
        return path.suffix == SUFFIX and os.path.isfile(path) and ORIGINAL in TensorFile(path)
    except ConceptFileError:
        return False


def check_weights(folder: Path, name: str | Path, variant: str | None = None) -> None:
    """Raise BaseModelError that names a weight file which is cut (expected and found size) or missing from a shard list.

    Also where none is of this variant, or a part has none but of another, or pickles, which are not opened.
    """
    parts = sorted(one for one in _PARTS if (folder / one).is_dir())
    for part in parts:
        _require_weights(folder / part, name, variant)
        ending = f"{SUFFIX}.index.{variant}.json" if variant else f"{SUFFIX}.index.json"
        for listing in folder.glob(f"{part}/*{ending}"):
            if lost := [one for one in _shards(listing, name) if not (folder / part / one).is_file()]:
                raise BaseModelError(f"{name}: {part}/{shown(lost[0])} is missing, which {listing.name} lists")
        for path in sorted(folder.glob(f"{part}/*{SUFFIX}")):
            if _variant(path) == variant:
                _open(path, f"{name}: {part}/{path.name}")
    # A part without a variant is read as it is, beside others that have it.
    if variant and not any(_variant(path) == variant for part in parts for path in (folder / part).glob(f"*{SUFFIX}")):
        raise BaseModelError(f"{name}: no weights of the variant {shown(variant, 20)} in it; leave out `variant`")


def _require_weights(folder: Path, name: str | Path, variant: str | None) -> None:
    found = sorted({_variant(path) or "" for path in folder.glob(f"*{SUFFIX}")})
    if "" in found or variant in found:
        return
    where = f"{name}: {folder.name}: "
    if found:
        way_out = f"give `variant` {shown(found[0], 20)}"
        raise BaseModelError(f"{where}there are only weights of the variant {shown(', '.join(found), 60)}; {way_out}")
    if pickles := sorted(path for path in folder.iterdir() if path.suffix in PICKLES):
        raise BaseModelError(
            f"{where}{shown(pickles[0].name, 60)} is a pickle, which is not opened; save the model as safetensors "
            "(diffusers: pipe.save_pretrained(folder, safe_serialization=True))"
        )
    raise BaseModelError(f"{where}no weights ({SUFFIX}) in it")


def _shards(listing: Path, name: str | Path) -> list[str]:
    try:
        return sorted(set(read_json(listing)["weight_map"].values()))
    except (BadInputError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{name}: {listing.parent.name}/{listing.name} is no list of shards") from error


def _variant(path: Path) -> str | None:
    """`fp16` of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    _, found, variant = path.stem.partition(".")
    return variant.split("-")[0] if found else None


def _open(path: Path, name: str) -> TensorFile:
    try:
        return TensorFile(path, name)
    except ConceptFileError as error:
        raise BaseModelError(str(error)) from error


def load_checkpoint(path: Path, config: str | Path | None, *, dtype: torch.dtype, download: bool) -> Any:
    """A pipeline from one file; `config` is a diffusers folder of the same kind, or a hub id.

    Without one, it is the folder of the file's own name beside it, what the package carries for SD 1.x, 2.x and SDXL, or
    the hub id that is usual for such a file, if that is in the local cache (or may be fetched). What the file says of
    itself goes before any of them. Raises BaseModelError.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    file = _open(path, str(path))
    folder = _config_folder(path, config or _usual_config(path, file), download=download)
    tokenizers = carried_tokenizers(folder)
    kind = check_configs(folder, f"{path}: its config {folder}").pipeline_class
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    options = {key: value for key, value in {**_LEFT_OUT, "requires_safety_checker": False}.items() if key in known}
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **options, **tokenizers
        )
    except (NotImplementedError, SingleFileComponentError) as error:
        # What the file does not hold stays without numbers, and then cannot be moved.
        raise BaseModelError(f"{path}: weights are missing that a model such as {config or folder.name} has") from error
    follow(pipeline, file, str(path))
    return pipeline


def _usual_config(path: Path, file: TensorFile) -> str | Path:
    if (path.with_suffix("") / INDEX).is_file():
        return path.with_suffix("")
    return carried(kind := usual_id(file), file) or kind


def _config_folder(path: Path, config: str | Path, *, download: bool) -> Path:
    """A local folder. diffusers would fetch one from the hub even when told not to."""
    if Path(config).is_dir():
        return Path(config)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(config), local_files_only=not download, allow_patterns=["*.json", "*.txt"]))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path}: a file of weights alone, and the configuration and tokenizer of {config} are not here; give a "
            f"diffusers folder of its kind as `config`, or put one beside the file as {path.with_suffix('').name}/"
        ) from error
