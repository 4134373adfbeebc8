"""A base folder's configurations, checked before a library builds from them what they say.

The libraries believe what stands there: a thousand million steps of training, a million layers in a block, a word where
a number belongs, are found out while memory fills, or in the midst of drawing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from mixofshow.bases.families import Family, family_named
from mixofshow.errors import BaseModelError, MixOfShowError, shown
from mixofshow.reading import MAX_JSON_BYTES, parse_json, read_bytes

INDEX: Final = "model_index.json"
CONFIGS: Final = ("config.json", "scheduler_config.json")
CLASSES: Final = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    "scheduler": ("diffusers", ("*Scheduler",)),
    "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
"""Library and classes of a part of a pipeline; a second text encoder's and tokenizer's are the first one's."""
LARGEST: Final = {
    "layers_per_block": 16,
    "transformer_layers_per_block": 64,
    "reverse_transformer_layers_per_block": 64,
    "num_hidden_layers": 128,
    "num_attention_heads": 1024,
    "attention_head_dim": 1024,
    "addition_embed_type_num_heads": 1024,
    "block_out_channels": 2**13,
    "norm_num_groups": 2**13,
    "channels": 2**13,
    "conditioning_embedding_out_channels": 2**13,
    "num_res_blocks": 16,
    "downscale_factor": 64,
    "hidden_size": 2**14,
    "projection_dim": 2**14,
    "intermediate_size": 2**16,
    "cross_attention_dim": 2**14,
    "encoder_hid_dim": 2**14,
    "time_embedding_dim": 2**14,
    "time_cond_proj_dim": 2**14,
    "addition_time_embed_dim": 2**14,
    "projection_class_embeddings_input_dim": 2**16,
    "num_class_embeds": 2**14,
    "max_position_embeddings": 2**13,
    "vocab_size": 2**20,
    "in_channels": 64,
    "out_channels": 64,
    "latent_channels": 64,
    "conv_in_kernel": 15,
    "conv_out_kernel": 15,
    "sample_size": 2**13,
    "num_train_timesteps": 10_000,
    "downsample_padding": 1,
    "solver_order": 3,
}
"""Whole numbers from 1 on, and lists of such: what a library makes so many of, or so large. Models in use are well below."""
LISTS: Final = {
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "only_cross_attention",
    "trained_betas",
    "latents_mean",
    "latents_std",
}
"""What may be a list though its default is none."""
NULL: Final = {"mid_block_type"}
"""What may be null though its default is not."""
TEXT: Final = {
    *("hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "hidden_size", "intermediate_size", "projection_dim"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"),
}
"""What a text encoder is built by; the rest of its configuration is not."""
MAX_LIST: Final = 16
MAX_BETAS: Final = LARGEST["num_train_timesteps"]
MAX_NUMBER: Final = 10**6
BETAS: Final = {"beta_start", "beta_end", "trained_betas"}


def check_config(table: Mapping[str, Any], kind: Any, where: str, error: type[MixOfShowError] = BaseModelError) -> None:
    """Raise an `error` that names `where`, unless a configuration says what a class (None: of any kind) can build."""
    for problem in _problems(table, kind):
        raise error(f"{where}: {problem}")


def check_configs(folder: Path, name: str | Path) -> Family:
    """The family of the pipeline in a folder. Raises BaseModelError unless its parts say what can be built."""
    index = _table(folder / INDEX, name)
    family = family_named(index.get("_class_name"), f"{name}: ")
    for part in ("unet", "vae", "scheduler", *(one for pair in family.text_encoders for one in pair)):
        found = _class(index, part, name)
        for path in sorted((folder / part).glob("*.json")):
            table = _table(path, name)
            if path.name in CONFIGS:
                check_config(table, found, f"{name}: {part}/{path.name}")
    return family


def _class(index: Mapping[str, Any], part: str, name: str | Path) -> Any:
    """The class whose defaults say what a part's configuration may hold."""
    library, classes = CLASSES[part.removesuffix("_2")]
    entry = index.get(part)
    if entry is None or entry == [None, None]:
        raise BaseModelError(f"{name}: the base model has no {part}")
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(one, str) for one in entry):
        raise BaseModelError(f"{name}: {INDEX}: '{part}': expected a library and a class, found {shown(entry)}")
    if entry[0] != library or not any(fnmatchcase(entry[1], one) for one in classes):
        expected = f"{' or '.join(classes)} of {library}"
        raise BaseModelError(f"{name}: {INDEX}: '{part}': expected {expected}, found {shown(' of '.join(entry[::-1]))}")
    if library == "transformers":
        from transformers import CLIPTextConfig

        return CLIPTextConfig
    import diffusers

    if not inspect.isclass(found := getattr(diffusers, entry[1], None)):
        raise BaseModelError(f"{name}: {INDEX}: '{part}': diffusers has no {shown(entry[1])}")
    return found


def _table(path: Path, name: str | Path) -> dict[str, Any]:
    where = f"{name}: {path.name if path.name == INDEX else f'{path.parent.name}/{path.name}'}"
    data = read_bytes(path, MAX_JSON_BYTES, BaseModelError, where)
    table = parse_json(data, where, BaseModelError, finite=False)
    if not isinstance(table, dict):
        raise BaseModelError(f"{where}: expected a table, found {type(table).__name__}")
    return table


def _problems(table: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """What is wrong with a configuration; of a class, also what is of another type than its default."""
    defaults = _defaults(kind)
    for key, value in table.items():
        if key.startswith("_"):
            continue
        if value is None:
            if defaults.get(key) is not None and key not in NULL:
                yield f"'{key}': expected such as {shown(defaults[key])}, found null"
            continue
        if not kind and isinstance(value, dict):
            yield from _problems(value, None)  # models of several towers
        values = list(_flat(value))
        most = MAX_BETAS if key == "trained_betas" else MAX_LIST
        may_be_list = not kind or key not in defaults or key in LISTS or isinstance(defaults[key], tuple | list)
        if isinstance(value, list) and not (may_be_list and len(values) <= most and (values or not kind)):
            yield f"'{shown(key)}': not to be a list of {len(values)}"
        for one in values:
            if problem := _problem(key, one, next(_flat(defaults.get(key)), None)):
                yield f"'{shown(key)}': {problem}, found {shown(value)}"


def _defaults(kind: Any) -> Mapping[str, Any]:
    """What a class takes where nothing is said, by key."""
    if hasattr(kind, "to_dict"):  # transformers' configurations
        return {key: value for key, value in kind().to_dict().items() if key in TEXT}
    return {key: one.default for key, one in inspect.signature(kind.__init__).parameters.items()} if kind else {}


def _problem(key: str, value: Any, default: Any) -> str | None:
    """What is wrong with a value, or one of a list."""
    if key in LARGEST and not (type(value) is int and 1 <= value <= LARGEST[key]):
        return f"expected whole numbers from 1 to {LARGEST[key]}"
    if key in BETAS and not (_is_number(value) and 0 < value <= 1):
        return "expected numbers above 0, at most 1"
    if _is_number(value) and MAX_NUMBER < abs(value) < math.inf:
        return f"expected numbers up to {MAX_NUMBER}"
    if default not in (None, inspect.Parameter.empty) and not (
        type(value) is type(default) or (_is_number(value) and _is_number(default))
    ):
        return f"expected such as {shown(default)}"
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
