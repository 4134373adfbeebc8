"""What exported files say about themselves: the model card, and the metadata of kohya's scripts and of modelspec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import yaml

from mixofshow.bases.families import version_of
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.delta import Compression
from mixofshow.errors import shown

MODELSPEC: Final = "1.0.1"
_VERSIONS: Final = {
    "SD 1.x": ("sd_v1", "stable-diffusion-v1"),
    "SD 2.x": ("sd_v2", "stable-diffusion-v2-768-v"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
"""What kohya's scripts and modelspec call the kinds of base."""
_HOW: Final = {
    "diffusers": """```python
pipeline.load_lora_weights(".", weight_name="{lora}")
pipeline.load_textual_inversion(".", weight_name="{embeddings}")
pipeline("a photo of {trigger}")
```""",
    "diffusers, two tables": """```python
from safetensors.torch import load_file

pipeline.load_lora_weights(".", weight_name="{lora}")
words = load_file("{embeddings}")
encoders = {{"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}}
for table, (text_encoder, tokenizer) in encoders.items():
    parts = {{"text_encoder": getattr(pipeline, text_encoder), "tokenizer": getattr(pipeline, tokenizer)}}
    pipeline.load_textual_inversion(words[table], token="{trigger}", **parts)
pipeline("a photo of {trigger}")
```""",
    "kohya": "Put `{lora}` among your LoRA and `{embeddings}` among your embeddings, and write `{trigger}` and the LoRA at "
    "strength 1 into the prompt, as `a photo of {trigger} <lora:{name}:1>`.",
}


def trigger(concept: Concept, to: str) -> str:
    """What draws the concept in a prompt: for A1111 an embedding's file name, which must be no ordinary word."""
    return f"<{concept.info.name}>" if to == "diffusers" else f"{concept.info.name}-words"


def model_card(
    concept: Concept,
    to: str,
    *,
    lora: str,
    embeddings: str,
    words: Mapping[str, float],
    lost: Compression,
    tables: int = 1,
) -> str:
    """A README.md with the header that Hugging Face reads; `tables` is how many text encoders have a table of the words."""
    info, prompt = concept.info, trigger(concept, to)
    header: dict[str, Any] = {"tags": ["text-to-image", "lora", "diffusers", "mix-of-show"], "instance_prompt": prompt}
    header |= {"base_model": info.base} if "/" in info.base else {}
    header |= {"license": shown(info.license)} if info.license else {}
    how = _HOW.get(f"{to}, two tables" if tables > 1 else to, _HOW[to]).format(
        lora=lora, embeddings=embeddings, trigger=prompt, name=info.name
    )
    lines = [
        f"# {info.name}",
        f"A concept ({shown(info.class_word)}) for the base model {shown(info.base)}"
        + (f", by {shown(info.author)}." if info.author else "."),
        how,
        *([f"`{lora}` holds its weight changes: {rounding(lost)}."] if concept.deltas else []),
        f"`{embeddings}` holds one vector for each of its {len(words)} words. {fidelity(words)}",
        "Its words and changes belong together: neither draws the concept faithfully without the other.",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(lines) + "\n"


def fidelity(words: Mapping[str, float]) -> str:
    """In one line, what is lost where a word has one vector and no longer one per layer."""
    if max(words.values()) == 0:
        return "Each word had one vector for all layers, so nothing is lost."
    apart = ", ".join(f"{word} {one:.2g}" for word, one in words.items())
    return f"Each is the mean over the layers; relative distance of the layers' vectors to it: {apart}."


def rounding(lost: Compression) -> str:
    """In a few words, what cutting changes to a rank lost."""
    if lost.worst < 1e-6:
        return "exact"
    return f"relative error {lost.overall:.2g}, at most {lost.worst:.2g} in {lost.layer}"


def kohya_metadata(concept: Concept, pipeline: Any, ranks: set[int], digest: str) -> dict[str, str]:
    """`ss_*` as kohya's scripts write it and modelspec, as far as a concept knows it; no dates, so that bytes repeat."""
    info, prompt = concept.info, trigger(concept, "kohya")
    kind = version_of(pipeline)
    version, architecture = _VERSIONS[kind]
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    prediction = pipeline.scheduler.config.prediction_type
    rank = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    table = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_v2": str(kind == "SD 2.x"),
        "ss_base_model_version": version,
        "ss_sd_model_name": info.base,
        "ss_output_name": info.name,
        "ss_resolution": f"({side}, {side})",
        "ss_tag_frequency": json.dumps({f"1_{prompt}": {prompt: 1}}),
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.name,
        "modelspec.description": f"A concept ({info.class_word}) with an embedding of its own, {prompt}.",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
        "modelspec.trigger_phrase": prompt,
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.author": info.author,
        "modelspec.license": info.license,
    }
    return {key: value for key, value in table.items() if value is not None}
