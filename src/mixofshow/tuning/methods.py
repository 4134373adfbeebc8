"""What a tuning method trains; the training loop knows nothing of it.

ED-LoRA (Mix-of-Show §3.2): two words per concept with one vector per cross-attention layer, the first random, the
second started as the class word; and a LoRA on every linear layer in the attention of text encoder and UNet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from einops import repeat
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mixofshow.bases.layers import lora_layers, module_path, token_width
from mixofshow.concepts.concept import LowRank
from mixofshow.errors import TokenError, shown
from mixofshow.tuning.settings import TuningSettings

ADAPTER: Final = "concept"


def class_token(pipeline: Any, class_word: str) -> int:
    """The token id of the class word; of several tokens the last, as "officer" of "police officer". Raises TokenError."""
    ids = pipeline.tokenizer(class_word, add_special_tokens=False).input_ids
    if not ids or ids[-1] in (pipeline.tokenizer.eos_token_id, pipeline.tokenizer.unk_token_id):
        raise TokenError(f"class word '{shown(class_word)}' means nothing to this base model; choose a word it knows")
    return int(ids[-1])


def initial_words(pipeline: Any, class_word: str, *, layers: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Start of V_rand and V_class, equal in all layers: (layers, 2, dim)."""
    random = sigma * torch.randn(token_width(pipeline), generator=generator)
    known = pipeline.text_encoder.get_input_embeddings().weight[class_token(pipeline, class_word)]
    pair = torch.stack([random.to(known), known.detach()])
    return repeat(pair, "words dim -> layers words dim", layers=layers).clone().float()


@contextlib.contextmanager
def lora_injected(pipeline: Any, settings: TuningSettings) -> Iterator[dict[str, nn.Module]]:
    """Inside, every LoRA layer is wrapped by peft; yields the wrappers by our layer names. Afterwards all is as before.

    Only the wrappers' own matrices can be trained; the base stays frozen.
    """
    names = list(lora_layers(pipeline))
    paths = [module_path(pipeline, name) for name in names]
    try:
        for part in ("text_encoder", "unet"):
            targets = [path for own_part, path in paths if own_part == part]
            # peft scales by lora_alpha / r; the reference scales by alpha.
            config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha * settings.rank, target_modules=targets)  # type: ignore[arg-type]
            inject_adapter_in_model(config, getattr(pipeline, part), ADAPTER)
        yield {
            name: getattr(pipeline, part).get_submodule(path) for name, (part, path) in zip(names, paths, strict=True)
        }
    finally:
        for part, path in paths:
            module = getattr(pipeline, part).get_submodule(path)
            getattr(pipeline, part).set_submodule(path, getattr(module, "base_layer", module))
        for model in (pipeline.text_encoder, pipeline.unet):
            if hasattr(model, "peft_config"):
                del model.peft_config


def low_rank(wrapper: Any, alpha: float) -> LowRank:
    """The change that a peft wrapper holds, alpha included."""
    down, up = wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight
    # Half precision is what the file holds; rounding here makes the concept in memory the one in the file.
    return LowRank(down.detach().cpu().half().float(), (alpha * up.detach()).cpu().half().float())
